"""The compensated cut: a student that does what the base did, as far as its sizes let it, before any training.

Base and student walk the layers in lock-step over the same calibration tokens, each with its own residual stream: x of the base, and
y of the student, which should be Q_Kᵀx. Three parts, each of which can be left out:

- The stream is written in the basis Q_K (rotation.py): the directions that hold most of it, or with `rotate` off the kept channels.
- Reading. A layer wants n(x) and has s·n(y), s being its norm's weight, one number fitted to the calibration tokens. Least squares
  gives the matrix R [D, K] of n(x) ≈ R·s·n(y); every matrix W that reads becomes W·diag(w)·R, whatever W is. Without a refit R = Q_K.
- Writing. The layer's last matrix is solved anew, from the student's own activations before it to what is missing in y to be
  Q_Kᵀx after the layer, and after those removed behind it. So it answers for cut neurons and heads, for removed layers and for what
  the layers before left wrong.

Both refits are drawn by the ridge towards the cut without one. Matrices are rounded to the dtype they are stored in before
the walk goes on, so that rounding is corrected too.
Letters: B batch, T tokens of a row, N tokens of a batch, D hidden of the base, K hidden of the student, I inputs of a writing matrix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from minitron.families.base import HIDDEN
from minitron.importance.placement import PlacedModel, ids_and_mask
from minitron.pruning.cut import expected_shape, plan_cuts, required_names, row_of
from minitron.pruning.plan import PruningPlan
from minitron.pruning.refit import NormalEquations
from minitron.pruning.rotation import NORM, WRITE, check_rms, in_basis, normalised, real_tokens, stream_basis, stream_role


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which parts are on, and the weight of the cut without refits in those that are; see the file's top."""

    rotate: bool = True
    refit_reading: bool = True
    refit_writing: bool = True
    ridge: float = 1e-3


@dataclass(frozen=True, slots=True)
class _Reading:
    """How the student reads the stream at one norm: w ∘ n(x) ≈ diag(w) · matrix · scale · n(y)."""

    weight_D: torch.Tensor
    matrix_DK: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class _Begun:
    """A layer of the student that is final but for its writer; `stored` gives the dtype of each of its tensors on disk."""

    block: nn.Module
    layer: int
    position: int
    stored: Mapping[str, torch.dtype]


def compensated_tensors(base: PlacedModel, plan: PruningPlan, batches: Sequence[torch.Tensor], basis_DK: torch.Tensor, recipe: Recipe, *, config: dict,
                        dtypes: Mapping[str, torch.dtype] | None = None, on_layer: Callable[[], None] = lambda: None
                        ) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """The student's tensors by canonical name, layer by layer, each in the dtype that `dtypes` gives for its source (None: float32).

    `base` computes in float32; `config` is its config.json; `batches` are calibration rows [B, T], padding included; `basis_DK` has orthonormal
    columns. In memory are both models' residuals of all tokens, one layer of each and the Gram matrix of one layer. The units kept
    of every axis but hidden are the plan's. Raises ValueError naming the layer whose sums are not finite or singular.
    """
    return _LockStep(base, plan, batches, basis_DK, recipe, config, dtypes or {}, on_layer).tensors()


def build_compensated(base: PlacedModel, plan: PruningPlan, batches: Sequence[torch.Tensor], recipe: Recipe, *, config: dict,
                      basis_DK: torch.Tensor | None = None, dtypes: Mapping[str, torch.dtype] | None = None) -> nn.Module:  # fmt: skip
    """The student as a float32 model in memory, rounded as `dtypes` say; see compensated_tensors. The basis is the plan's own unless one is given."""
    if basis_DK is None:
        basis_DK = stream_basis(base, plan, batches, rotate=recipe.rotate, config=config)
    with torch.device("meta"):
        student = base.family.build(base.family.hf_config(config, plan.student))
    names = {base.family.canonical_name(name): name for name in student.state_dict()}
    tensors = compensated_tensors(base, plan, batches, basis_DK, recipe, config=config, dtypes=dtypes)
    student.load_state_dict({names[name]: tensor.float() for name, tensor in tensors}, assign=True)
    return student.eval()


class _LockStep:
    """The walk of compensated_tensors: one list entry of residuals per batch."""

    def __init__(self, base: PlacedModel, plan: PruningPlan, batches: Sequence[torch.Tensor], basis_DK: torch.Tensor, recipe: Recipe, config: dict,
                 dtypes: Mapping[str, torch.dtype], on_layer: Callable[[], None]):  # fmt: skip
        self.base, self.family, self.plan, self.recipe, self.dtypes, self.on_layer = base, base.family, plan, recipe, dtypes, on_layer
        self.epsilon = check_rms(self.family, config)
        self.basis_DK = basis_DK
        self.student_config = self.family.hf_config(config, plan.student)
        inner = replace(plan, units={axis: kept for axis, kept in plan.units.items() if axis != HIDDEN})
        rows = {name: row_of(self.family, plan.teacher, name) for name in required_names(self.family, plan.teacher)}
        shapes = {name: expected_shape(self.family, plan.teacher, row) for name, row in rows.items()}
        self.cuts = {cut.source: cut for cut in plan_cuts(self.family, inner, shapes)}
        self.roles = {name: stream_role(self.family, row) for name, row in rows.items()}
        pairs = [ids_and_mask(batch) for batch in batches]
        self.masks = [mask for _, mask in pairs]
        self.base_residuals = base.embed([ids for ids, _ in pairs])
        self.student_residuals = [self._projected(residual_BTD) for residual_BTD in self.base_residuals]

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        with self.base.open_embedding() as embedding:
            yield from self._cut({f"{self.family.outside_names['embed']}weight": embedding.weight}, None).items()
        del embedding  # 2.5 GiB of a 12B's, in float32
        positions, begun = {layer: position for position, layer in enumerate(self.plan.kept_layers)}, None
        for layer, base_block in self.base.visit(range(self.plan.teacher.num_layers)):
            if layer in positions:
                if begun is not None:  # the base is now behind it and behind the layers removed after it
                    yield from self._finish(begun)
                begun = self._begin(base_block, layer, positions[layer])
            self.base_residuals = [base_block(residual_BTD) for residual_BTD in self.base_residuals]
            self.on_layer()
        yield from self._finish(begun)
        with self.base.open_head() as head:
            parts = {"norm": head.norm, "head": head.projection}
            state = {f"{self.family.outside_names[part]}{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}
            yield from self._cut(state, self._reading(state, "the output head")).items()

    def _begin(self, base_block: nn.Module, layer: int, position: int) -> _Begun:
        """The student's layer with its readers refitted."""
        state = {f"layers.{layer}.{name}": tensor for name, tensor in base_block.state_dict().items()}
        made = self._cut(state, self._reading(state, f"layer {layer}"))
        tensors = {name.removeprefix(f"layers.{position}."): tensor for name, tensor in made.items()}
        with torch.device("meta"):
            block = self.family.build_layer(self.student_config, position)
        block.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return _Begun(block.eval(), layer, position, {name: tensor.dtype for name, tensor in tensors.items()})

    def _finish(self, begun: _Begun) -> Iterator[tuple[str, torch.Tensor]]:
        """Refits the layer's writer, moves the student's residuals behind the layer and gives the layer's tensors."""
        block = begun.block
        (name,) = [name for name in block.state_dict() if self.roles[f"layers.{begun.layer}.{name}"] == WRITE]
        writer = block.get_submodule(name.removesuffix(".weight"))
        if self.recipe.refit_writing:
            inner: list[torch.Tensor] = []  # a batch each, [B, T, I]: what the writer is given
            handle = writer.register_forward_pre_hook(lambda _module, args: inner.append(args[0]))
            for residual_BTK in self.student_residuals:
                block(residual_BTK)
            handle.remove()
            writer.weight.data = self._writing(writer, inner, f"layer {begun.layer}").to(begun.stored[name]).float()
            self.student_residuals = [residual + writer(given) for residual, given in zip(self.student_residuals, inner, strict=True)]
        else:
            self.student_residuals = [block(residual_BTK) for residual_BTK in self.student_residuals]
        for name, tensor in block.state_dict().items():
            yield f"layers.{begun.position}.{name}", tensor.to(begun.stored[name])

    def _writing(self, writer: nn.Linear, inner: Sequence[torch.Tensor], place: str) -> torch.Tensor:
        """The writer's matrix [K, I] by least squares."""
        equations = NormalEquations(writer.in_features, writer.out_features, self.base.device)
        for inner_BTI, base_BTD, student_BTK, mask in zip(inner, self.base_residuals, self.student_residuals, self.masks, strict=True):
            missing_BTK = self._projected(base_BTD) - student_BTK
            if writer.bias is not None:
                missing_BTK = missing_BTK - writer.bias
            equations.add(real_tokens(inner_BTI, mask), real_tokens(missing_BTK, mask))
        return equations.solve(writer.weight, self.recipe.ridge, place=place)

    def _reading(self, state: Mapping[str, torch.Tensor], place: str) -> _Reading:
        """The norm's scale, then the matrix, both by least squares from n(y) to n(x)."""
        (norm,) = [name for name in state if self.roles[name] == NORM]
        weight_D, stored, basis_DK = state[norm].float(), self.dtypes.get(norm, torch.float32), self.basis_DK
        alike = square = 0.0
        for wanted_ND, own_NK in self._normalised():
            alike += (self._projected(wanted_ND) * own_NK).sum(dtype=torch.float64)
            square += own_NK.square().sum(dtype=torch.float64)
        scale = float((alike / square).to(stored))
        if not self.recipe.refit_reading:
            return _Reading(weight_D, basis_DK, scale)
        equations = NormalEquations(basis_DK.shape[1], basis_DK.shape[0], basis_DK.device)
        for wanted_ND, own_NK in self._normalised():
            equations.add(scale * own_NK, wanted_ND)
        return _Reading(weight_D, equations.solve(basis_DK, self.recipe.ridge, place=f"the stream before {place}"), scale)

    def _normalised(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """n(x) [N, D] and n(y) [N, K] of every batch."""
        for base_BTD, student_BTK, mask in zip(self.base_residuals, self.student_residuals, self.masks, strict=True):
            yield real_tokens(normalised(base_BTD, self.epsilon), mask), real_tokens(normalised(student_BTK, self.epsilon), mask)

    def _cut(self, state: Mapping[str, torch.Tensor], reading: _Reading | None) -> dict[str, torch.Tensor]:
        """Tensors of the base as the student has them: cut, folded, in the student's basis and in the dtypes they are stored in."""
        made, folded_DK = {}, None if reading is None else reading.weight_D[:, None] * reading.matrix_DK
        for name, tensor in state.items():
            cut, dtype = self.cuts[name], self.dtypes.get(name, torch.float32)
            if self.roles[name] == NORM:
                kept = torch.full((self.plan.student.hidden,), reading.scale, dtype=dtype, device=tensor.device)
            else:
                kept = in_basis(cut.apply(tensor), self.roles[name], self.basis_DK, folded_DK, dtype)
            made[cut.target] = kept.contiguous()
        return made

    def _projected(self, residual: torch.Tensor) -> torch.Tensor:
        """Residuals [..., D] in the student's basis, [..., K], float32."""
        return residual.float() @ self.basis_DK
