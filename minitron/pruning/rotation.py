"""Rotations of the residual stream: which orthogonal basis, and what tensors meet the stream.

x ← x + mixer(w ∘ n(x)), with n RMSNorm without a weight, stays the same function when w is folded into the matrices that read the
stream and every residual is written Qᵀx for an orthogonal Q: n looks at lengths alone, which Q keeps, so n(Qᵀx) = Qᵀn(x)
(SliceGPT, arXiv 2401.15024, §3). A student of hidden size K keeps the first K columns of Q: what reads becomes W·Q_K, what writes Q_Kᵀ·W,
embeddings E·Q_K. One basis serves every hidden size, since each takes a prefix of it.

Letters: B batch, T tokens of a row, N tokens of a batch, D hidden of the base, K hidden of the student.
"""

from collections.abc import Callable, Sequence

import torch

from minitron.families.base import HIDDEN, Family, TensorAxes
from minitron.importance.placement import PlacedModel, ids_and_mask
from minitron.pruning.plan import Indices, PruningPlan

EMBED, READ, WRITE, WRITE_BIAS, NORM = "embed", "read", "write", "write bias", "norm"


def stream_role(family: Family, row: TensorAxes) -> str | None:
    """What a tensor does with the residual stream, by the axes in its row of the family's table; None where it has no hidden axis."""
    hidden = [dimension == ((HIDDEN,),) for dimension in row.dimensions]
    if not any(hidden):
        return None
    if row.suffix.startswith(family.outside_names["embed"]):
        return EMBED
    if len(hidden) == 1:
        return NORM if row.kind in ("", "any") else WRITE_BIAS
    assert sum(hidden) == 1 and len(hidden) == 2, f"{row.suffix} meets the residual stream in a way that is neither reading nor writing"
    return WRITE if hidden[0] else READ


def check_rms(family: Family, config: dict) -> float:
    """The epsilon of the family's RMSNorms. Raises ValueError for a family with other norms, with which rotations do not commute."""
    if family.rms_epsilon is None:
        raise ValueError(f"prune.method is compensated, but the norms of {family.model_type} are not RMSNorm; it must be slice")
    return family.rms_epsilon(config)


def normalised(residual: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm without a weight, of residuals [..., D], float32."""
    residual = residual.float()
    return residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + epsilon)


def real_tokens(values_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """The vectors of the tokens that are no padding, [N, D]."""
    return values_BTD.flatten(0, 1) if mask_BT is None else values_BTD[mask_BT]


@torch.no_grad()
def stream_covariance(base: PlacedModel, batches: Sequence[torch.Tensor], epsilon: float, on_layer: Callable[[], None] = lambda: None) -> torch.Tensor:
    """Σ n nᵀ over tokens and norm inputs (every layer's and the last), n the normalised residual; float64 [D, D].

    `batches` are rows [B, T], padding included; all walk the layers together. Raises ValueError naming the layer whose
    residuals are not finite.
    """
    pairs = [ids_and_mask(batch) for batch in batches]
    residuals, masks = base.embed([ids for ids, _ in pairs]), [mask for _, mask in pairs]
    total_DD = torch.zeros(base.architecture.hidden, base.architecture.hidden, dtype=torch.float64, device=base.device)

    def add(place: str) -> None:
        for residual_BTD, mask in zip(residuals, masks, strict=True):
            tokens_ND = real_tokens(normalised(residual_BTD, epsilon), mask).double()
            total_DD.addmm_(tokens_ND.T, tokens_ND)
        if not torch.isfinite(total_DD).all():
            raise ValueError(f"prune: the residuals before {place} are not finite")

    for layer, block in base.visit(range(base.architecture.num_layers)):
        add(f"layer {layer}")
        residuals = [block(residual_BTD) for residual_BTD in residuals]
        on_layer()
    add("the output head")
    return total_DD


def stream_basis(base: PlacedModel, plan: PruningPlan, batches: Sequence[torch.Tensor], *, rotate: bool, config: dict,
                 on_layer: Callable[[], None] = lambda: None) -> torch.Tensor:  # fmt: skip
    """Q_K [D, K] of a plan: the principal directions, or the kept channels, also where hidden is not cut and there is nothing to choose."""
    if rotate and plan.student.hidden < plan.teacher.hidden:
        covariance_DD = stream_covariance(base, batches, check_rms(base.family, config), on_layer)
        return principal_basis(covariance_DD)[:, : plan.student.hidden].contiguous()
    return channel_basis(plan.kept(HIDDEN, -1), plan.teacher.hidden, base.device)


def principal_basis(covariance_DD: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns [D, D], float32, by descending share of the covariance: the first K hold the most that K can."""
    return torch.linalg.eigh(covariance_DD)[1].flip(1).float().contiguous()


def channel_basis(kept: Indices | None, hidden: int, device: torch.device) -> torch.Tensor:
    """The columns [D, K] of the identity that a plan keeps: no rotation, hidden channels as they are."""
    everything = torch.eye(hidden, device=device)
    return everything if kept is None else everything[:, list(kept)].contiguous()
