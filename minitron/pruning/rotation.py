"""Rotations of the residual stream: what tensors meet the stream, and what they become in another basis.

x ← x + mixer(w ∘ n(x)), with n RMSNorm without a weight, stays the same function when w is folded into the matrices that read the
stream and every residual is written Qᵀx for an orthogonal Q: n looks at lengths alone, which Q keeps, so n(Qᵀx) = Qᵀn(x)
(SliceGPT, arXiv 2401.15024, §3). A student of hidden size K keeps K directions (directions.py), in a basis Q_K of them (basis.py): what reads
becomes W·Q_K, what writes Q_Kᵀ·W, embeddings E·Q_K.

Letters: B batch, T tokens of a row, N tokens of a batch, D hidden of the base, K hidden of the student.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from memory_budget.architecture import Architecture
from minitron.checkpoints.placement import PlacedModel, ids_and_mask, run_layer
from minitron.families.base import HIDDEN, POST_NORM, Family, TensorAxes
from minitron.pruning.basis import Basis

EMBED, READ, WRITE, WRITE_BIAS, NORM, BEHIND = "embed", "read", "write", "write bias", "norm", "norm behind a mixer"
AT_ONCE = 512  # rows or columns of a matrix: what they become is rounded while it is still in the processor's cache


def stream_role(family: Family, row: TensorAxes) -> str | None:
    """What a tensor does with the residual stream, by the axes in its row of the family's table; None where it has no hidden axis."""
    hidden = [dimension == ((HIDDEN,),) for dimension in row.dimensions]
    if not any(hidden):
        return None
    if row.suffix.startswith(family.outside_names["embed"]):
        return EMBED
    if row.suffix == POST_NORM:
        return BEHIND
    if len(hidden) == 1:
        return NORM if row.kind in ("", "any") else WRITE_BIAS
    assert sum(hidden) == 1 and len(hidden) == 2, f"{row.suffix} meets the residual stream in a way that is neither reading nor writing"
    return WRITE if hidden[0] else READ


def check_rms(family: Family, config: dict) -> float:
    """The epsilon of the family's RMSNorms. Raises ValueError for a family with other norms, with which rotations do not commute."""
    if family.rms_epsilon is None:
        raise ValueError(f"prune.method is compensated, but the norms of {family.model_type} are not RMSNorm; it must be slice")
    return family.rms_epsilon(config)


def check_turns(architecture: Architecture) -> None:
    """Refuse to write the stream of this model in another basis. Raises ValueError saying why."""
    if architecture.post_norms:
        raise ValueError(f"a {architecture.model_type} cannot be rotated: the norm behind every mixer weighs the channels of what is added to the stream, "
                         "which in another basis no matrix behind it could do")  # fmt: skip


def factors(family: Family, weight_D: torch.Tensor) -> torch.Tensor:
    """What a norm of this stored weight multiplies by, float32."""
    return weight_D.float() + family.norm_offset


def normalised(residual: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm without a weight, of residuals [..., D], float32."""
    residual = residual.float()
    return residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + epsilon)


def real_tokens(values_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """The vectors of the tokens that are no padding, [N, D]."""
    return values_BTD.flatten(0, 1) if mask_BT is None else values_BTD[mask_BT]


@torch.no_grad()
def norm_inputs(base: PlacedModel, batches: Sequence[torch.Tensor], on_layer: Callable[[], None] = lambda: None) -> Iterator[tuple[int | None, torch.Tensor]]:
    """Residuals [N, D] at the input of every norm, a batch at a time, with the norm's layer; None is the last norm's, before the output head.

    `batches` are rows [B, T], padding included; all walk the layers together. Raises ValueError naming the layer whose
    residuals are not finite.
    """
    pairs = [ids_and_mask(batch) for batch in batches]
    residuals, masks = base.embed([ids for ids, _ in pairs]), [mask for _, mask in pairs]

    def tokens(place: str) -> Iterator[torch.Tensor]:
        for residual_BTD, mask in zip(residuals, masks, strict=True):
            tokens_ND = real_tokens(residual_BTD, mask).float()
            if not torch.isfinite(tokens_ND).all():
                raise ValueError(f"prune: the residuals before {place} are not finite")
            yield tokens_ND

    for layer, block in base.visit(range(base.architecture.num_sublayers)):
        yield from ((layer, tokens_ND) for tokens_ND in tokens(f"layer {layer}"))
        residuals = run_layer(block, residuals)
        on_layer()
    yield from ((None, tokens_ND) for tokens_ND in tokens("the output head"))


def in_basis(tensor: torch.Tensor, role: str | None, basis: Basis, read: Callable[[torch.Tensor], torch.Tensor] | None, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that reads or writes the stream as it does so in a basis, by its role; all others, norms too, as they are.

    `read` takes rows [V, D] of a matrix that reads to [V, K]; it knows the norm's weight.
    """
    if role in (READ, EMBED):
        return _by_rows(tensor, basis.project if role == EMBED else read, basis.matrix_DK.shape[1], dtype)
    if role == WRITE:
        return _by_columns(tensor, basis, dtype)
    if role in (WRITE_BIAS, BEHIND):  # of a stream that is not turned, where it is a norm's: the kept entries
        return basis.project(tensor).to(dtype)
    return tensor.to(dtype)


def _by_rows(rows_VD: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor], width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows changed in float32 and rounded to `dtype` some at a time: there is no second float32 copy."""
    result_VK = torch.empty(len(rows_VD), width, dtype=dtype, device=rows_VD.device)
    for rows, result in zip(rows_VD.split(AT_ONCE), result_VK.split(AT_ONCE), strict=True):
        result.copy_(change(rows.float()))
    return result_VK


def _by_columns(matrix_DI: torch.Tensor, basis: Basis, dtype: torch.dtype) -> torch.Tensor:
    """A writing matrix in the basis, as _by_rows."""
    result_KI = torch.empty(basis.matrix_DK.shape[1], matrix_DI.shape[1], dtype=dtype, device=matrix_DI.device)
    for columns, result in zip(matrix_DI.split(AT_ONCE, 1), result_KI.split(AT_ONCE, 1), strict=True):
        result.copy_(basis.project_columns(columns))
    return result_KI
