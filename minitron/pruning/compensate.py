"""The compensated cut: a student that does what the base did, as far as its sizes let it, before any training.

Base and student walk the layers in lock-step over the same calibration tokens, each with its own residual stream: x of the base, and
y of the student, which should be Q_Kᵀx. Three parts, each of which can be left out:

- The stream is written in the basis Q_K (rotation.py) of the directions that the loss needs most or that hold most of it (directions.py), or of the
  kept channels.
- Reading. A layer wants n(x) and has g·n(y), g being its norm's weight. Least squares gives the matrix R [D, K] of n(x) ≈ R·g·n(y); every matrix W
  that reads becomes W·diag(w)·R, whatever W is. Without a refit R = Q_K·s/g, s being the number of n(x) ≈ Q_K·s·n(y). Any g makes the same function;
  it is the root mean square of the base's weights w, so that readers are as large as they were: an optimiser's step that knows no size, as Adam's, would
  soon forget a matrix made small.
- A head that is the table of embeddings cannot take w and R in. There the last norm keeps a weight for every direction, fitted so that the
  logits are closest (refits/tied_head.py).
- Writing. The layer's last matrix is solved anew, from the student's own activations before it to what is missing in y to be
  Q_Kᵀx after the layer, and after those removed behind it. So it answers for cut neurons and heads, for removed layers and for what
  the layers before left wrong. In a layer with experts every one of them answers for its tokens (refits/experts.py). Where a norm stands behind
  the writer nothing is rotated, and the two are fitted together (refits/least_squares.py).

- Feed-forward layers: before all this the neurons are chosen that the student's layer would miss most (refits/neurons.py), and after it all matrices of the
  layer are trained on its own output (refits/local_training.py).

Both refits are drawn by the ridge towards the cut without one. Matrices are rounded to the dtype they are stored in before
the walk goes on, so that rounding is corrected too.
Letters: B batch, T tokens of a row, N tokens of a batch, D hidden of the base, K hidden of the student, I inputs of a writing matrix.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import nn

from minitron.checkpoints.placement import PlacedModel, give_back_memory, ids_and_mask, look_up, run_layer
from minitron.checkpoints.stored_linear import load_to_compute
from minitron.families.base import FFN, HIDDEN, POST_NORM
from minitron.families.experts import experts_of
from minitron.families.state import load_tensors
from minitron.families.table import expected_shape, expert_of, required_names, row_of
from minitron.pruning.basis import Basis
from minitron.pruning.cut import TensorCut, plan_cuts
from minitron.pruning.directions import stream_basis
from minitron.pruning.plan import PruningPlan, Recipe, set_ridge
from minitron.pruning.refits.experts import ExpertsFit, Trained, is_trained
from minitron.pruning.refits.least_squares import Refit, fit_behind_norm
from minitron.pruning.refits.local_training import train_feed_forward
from minitron.pruning.refits.neurons import least_missed
from minitron.pruning.refits.tied_head import TiedHead
from minitron.pruning.rotation import BEHIND, NORM, WRITE, check_rms, check_turns, factors, in_basis, stream_role
from minitron.pruning.streams import Streams

GIVEN_BACK_BYTES = 2**28  # of one Gram matrix


@dataclass(frozen=True, slots=True)
class _Reading:
    """How the student reads the stream at one norm: what the norm multiplies by, a number or one for each direction, and what takes rows [V, D] of a matrix
    that reads there to [V, K]."""

    scale: float | torch.Tensor
    rows: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Begun:
    """A layer of the student that is final but for its writer and a norm behind it, as it computes (in float32) and as it is stored; `unfinished` says
    that one of those is not stored yet."""

    block: nn.Module
    layer: int
    position: int
    tensors: dict[str, torch.Tensor]
    unfinished: bool

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        """A fitted tensor, rounded as it is stored."""
        self.tensors[name] = tensor.to(self.tensors[name].dtype)
        parameter = self.block.get_parameter(name)
        parameter.data = self.tensors[name].to(parameter.dtype)


def build_compensated(base: PlacedModel, plan: PruningPlan, batches: Sequence[torch.Tensor], recipe: Recipe, *, config: dict,
                      basis: Basis | None = None, dtypes: Mapping[str, torch.dtype] = MappingProxyType({})) -> nn.Module:  # fmt: skip
    """The student as a float32 model in memory, rounded as `dtypes` say; see CompensatedCut. The basis is the plan's own unless one is given."""
    if basis is None:
        basis = stream_basis(base, plan, batches, directions=recipe.directions, samples=recipe.direction_samples, config=config)
    with torch.device("meta"):
        student = base.family.build(base.family.hf_config(config, plan.student))
    tensors = CompensatedCut(base, plan, batches, basis, recipe, config=config, dtypes=dtypes).tensors()
    load_tensors(base.family, student, {name: torch.cat([piece.float() for piece in pieces]) for name, pieces in tensors})
    return student.eval()


class CompensatedCut:
    """The walk of base and student over calibration rows.

    `base` computes in float32; `config` is its config.json; `batches` are calibration rows [B, T], padding included; `dtypes` gives the dtype
    each tensor is stored in by the canonical name of its source (else float32); `stored` gives what is stored already, of an interrupted walk, by
    the student's canonical names: it is taken as it is, and solved for no more. In memory are both models' residuals of all tokens, one layer of
    each and the Gram matrix of one layer. The units kept of every axis but hidden are the plan's, but for neurons that are chosen on the way, where
    the plan has none chosen so: `plan` is then another one, as it is once a layer was trained in vain, and `on_plan` hears of it before the layer's tensors
    are there.
    """

    def __init__(self, base: PlacedModel, plan: PruningPlan, batches: Sequence[torch.Tensor], basis: Basis, recipe: Recipe, *, config: dict,
                 dtypes: Mapping[str, torch.dtype] = MappingProxyType({}), stored: Mapping[str, Callable[[], torch.Tensor]] = MappingProxyType({}),
                 on_layer: Callable[[], None] = lambda: None, on_plan: Callable[[PruningPlan], None] = lambda _: None):  # fmt: skip
        self.base, self.family, self.plan, self.basis, self.recipe, self.dtypes, self.stored = base, base.family, plan, basis, recipe, dtypes, stored
        self.epsilon = check_rms(self.family, config)
        if not basis.is_of_channels:
            check_turns(plan.teacher)
        self.on_layer, self.on_plan = on_layer, on_plan
        self.trained: list[Trained] = []  # what the local training of each layer with experts came to, of those made now
        self.feed_forward_kept: list[bool] = []  # of each feed-forward layer trained now, whether that served rows held back
        self.not_trained = 0  # feed-forward layers behind those where that served nothing
        self.config, self.student_config = config, self.family.hf_config(config, plan.student)
        self.scales = self.family.embed_scale(plan.teacher), self.family.embed_scale(plan.student)
        self.multiplier = self.family.embed_multiplier(config)
        rows = {name: row_of(self.family, plan.teacher, name) for name in required_names(self.family, plan.teacher)}
        self.shapes = {name: expected_shape(self.family, plan.teacher, row) for name, row in rows.items()}
        self.cuts = self._cuts_of(plan)
        self.roles = {name: stream_role(self.family, row) for name, row in rows.items()}
        self.streams = Streams([ids_and_mask(batch) for batch in batches], basis, self.epsilon, self.family.added_multiplier(config))

    def _cuts_of(self, plan: PruningPlan) -> dict[str, TensorCut]:
        """Of every axis but hidden, by name in the base."""
        inner = replace(plan, units={axis: kept for axis, kept in plan.units.items() if axis != HIDDEN})
        return {cut.source: cut for cut in plan_cuts(self.family, inner, self.shapes)}

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Iterable[torch.Tensor]]]:
        """The student's tensors by canonical name, layer by layer, but for those stored already; each as pieces that follow each other along the
        first dimension and are made as they are asked for. Raises ValueError naming the layer whose sums are not finite or singular."""
        table, norm, head = (f"{self.family.outside_names[part]}weight" for part in ("embed", "norm", "head"))
        embedding = self._embedding(table)
        if table not in self.stored:
            yield table, embedding
        for _ in embedding:  # to its end, whoever wants it
            pass
        positions, begun = {layer: position for position, layer in enumerate(self.plan.kept_sublayers)}, None
        for layer, base_block in self.base.visit(range(self.plan.teacher.num_sublayers)):
            if layer in positions:
                if begun is not None:  # the base is now behind it and behind the layers removed after it
                    yield from self._finish(begun)
                    begun = None  # its memory is the next one's
                begun = self._begin(base_block, layer, positions[layer])
            self.streams.base = run_layer(base_block, self.streams.base)
            self.on_layer()
        yield from self._finish(begun)
        del begun
        outside = (norm,) if self.plan.student.tied_embeddings else (norm, head)
        if not self.stored.keys() >= set(outside):
            ((_, weight_D),) = self.base.stored_rows(norm)
            if self.plan.student.tied_embeddings:
                reading = self._tied_reading(weight_D, table)
            else:
                reading = self._reading(weight_D, self.dtypes.get(norm, torch.float32), "the output head")
            yield from ((name, self._outside(name, reading)) for name in outside if name not in self.stored)

    def _outside(self, name: str, reading: _Reading) -> Iterator[torch.Tensor]:
        return (self._made(name, rows, reading) for _, rows in self.base.stored_rows(name))

    def _tied_reading(self, weight_D: torch.Tensor, table: str) -> _Reading:
        """Of the last norm before a head that is the table of embeddings."""
        fit = TiedHead(factors(self.family, weight_D), self.basis)
        for wanted_ND, own_NK in self.streams.normalised():
            fit.add(wanted_ND, own_NK)
        for first, rows_VD in self.base.stored_rows(table):
            fit.add_rows(rows_VD.float(), sum(torch.bincount(ids[(ids >= first) & (ids < first + len(rows_VD))] - first, minlength=len(rows_VD))
                                              for ids in self.streams.real_ids()))  # fmt: skip
        scale = self.scales[1] / self.scales[0]  # the student's table is larger by as much
        return _Reading(fit.solve(set_ridge(self.recipe)) * scale, lambda rows_VD: rows_VD)

    def _embedding(self, name: str) -> Iterator[torch.Tensor]:
        """The student's table in pieces; on the way both models' tokens are looked up."""
        stored = self.stored[name]() if name in self.stored else None
        self.streams.begin(self.plan.teacher.hidden, self.plan.student.hidden, self.base.device)
        for first, rows_VD in self.base.stored_rows(name):
            made_VK = self._made(name, rows_VD, None) if stored is None else stored[first : first + len(rows_VD)].to(self.base.device)
            for ids_BT, base_BTD, student_BTK in zip(self.streams.ids, self.streams.base, self.streams.student, strict=True):
                look_up(ids_BT, first, rows_VD, base_BTD, self.scales[0] * self.multiplier)
                look_up(ids_BT, first, made_VK, student_BTK, self.scales[1] * self.multiplier)
            yield made_VK

    def _begin(self, base_block: nn.Module, layer: int, position: int) -> _Begun:
        """The student's layer with its readers refitted. What is fitted in _finish is as the base has it, unless all of it is stored."""
        targets = {name: self.cuts[name].target for name in (f"layers.{layer}.{name}" for name in base_block.state_dict()) if name in self.cuts}
        unfinished = [name for name in self._fitted_last(targets) if targets[name] not in self.stored]
        known = {name for name in targets if targets[name] in self.stored} - set(self._fitted_last(targets) if unfinished else ())
        made = {targets[name]: self.stored[targets[name]]().to(self.base.device) for name in known}
        if len(made) < len(targets):
            (norm,) = [name for name in targets if self.roles[name] == NORM]
            reading = self._reading(base_block.norm.weight, self.dtypes.get(norm, torch.float32), f"layer {layer}")
            if self._chooses(layer):
                self._choose_neurons(base_block, layer, position, reading)
            made |= {targets[name]: self._made(name, tensor, reading) for name, tensor in _tensors(base_block, layer, targets.keys() - known)}
        tensors = {name.removeprefix(f"layers.{position}."): tensor for name, tensor in made.items()}
        return _Begun(self._block(position, tensors, self.student_config), layer, position, tensors, bool(unfinished))

    def _block(self, position: int, tensors: Mapping[str, torch.Tensor], config: dict) -> nn.Module:
        with torch.device("meta"):
            block = self.family.build_layer(config, position)
        return load_to_compute(block, tensors, torch.float32)

    def _chooses(self, layer: int) -> bool:
        cut = layer in self.plan.units.get(FFN, {}) and layer not in self.plan.chosen_by_refit
        return cut and self.recipe.chooses_neurons and not self.plan.student.post_norms

    def _choose_neurons(self, base_block: nn.Module, layer: int, position: int, reading: _Reading) -> None:
        """Puts in the plan's place the neurons that the student's layer, with all of them, would miss most."""
        names, number = [name for name in self.shapes if name.startswith(f"layers.{layer}.")], self.plan.student.ffn
        wide = replace(self.plan, student=replace(self.plan.student, ffn=self.plan.teacher.ffn), units={**self.plan.units, FFN: {}})
        cuts = self._cuts_of(wide)
        tensors = {cuts[name].target.removeprefix(f"layers.{position}."): self._made(name, tensor, reading, cuts[name])
                   for name, tensor in _tensors(base_block, layer, names)}  # fmt: skip
        block = self._block(position, tensors, self.family.hf_config(self.config, wide.student))
        (name,) = [name for name in names if self.roles[name] == WRITE]
        writer = block.get_submodule(name.removeprefix(f"layers.{layer}.").removesuffix(".weight"))
        inputs = (inner_NI * weight_N1 for inner_NI, weight_N1 in zip(self.streams.given(block, writer), self.streams.token_weights(), strict=True))
        self.plan = self.plan.with_neurons({layer: least_missed(inputs, writer.weight, number, place=f"layer {layer}")})
        _let_go(writer.in_features)
        self.cuts = self._cuts_of(self.plan)
        self.on_plan(self.plan)

    def _fitted_last(self, names: Iterable[str]) -> list[str]:
        """A layer's writers, one but for its experts', the norm behind it where there is one, and what local training changes beside them."""
        return [name for name in names if self.roles[name] in (WRITE, BEHIND) or self._is_trained(name)]

    def _is_trained(self, name: str) -> bool:
        layer, _, part = name.removeprefix("layers.").partition(".")
        of_feed_forward = self.plan.teacher.mixers[int(layer)] == "-" and part.startswith("mixer.")
        return bool(self.recipe.local_steps and is_trained(name)) or bool(self.recipe.feed_forward_steps and of_feed_forward)

    def _finish(self, begun: _Begun) -> Iterator[tuple[str, Iterable[torch.Tensor]]]:
        """Refits the layer's writers, moves the student's residuals behind the layer and gives the layer's tensors."""
        if begun.unfinished:
            self._refit_writers(begun)
        self.streams.student = run_layer(begun.block, self.streams.student)
        named = ((f"layers.{begun.position}.{name}", tensor) for name, tensor in begun.tensors.items())
        yield from ((name, [tensor]) for name, tensor in named if name not in self.stored)

    def _refit_writers(self, begun: _Begun) -> None:
        block, place = begun.block, f"layer {begun.layer}"
        names = [name for name in block.state_dict() if self.roles[f"layers.{begun.layer}.{name}"] == WRITE and expert_of(name) is None]
        if experts_of(block) is not None:
            if self.recipe.refit_experts or self.recipe.refit_shared:
                fit = ExpertsFit(block, self.streams.student, self.streams.masks, self.streams.missing(), begun.keep, self.streams.added)
                self.trained.append(fit.run(self.recipe, names, place=place))
        elif self.recipe.refit_writing:
            (name,) = names
            writer = block.get_submodule(name.removesuffix(".weight"))
            fitted = self._behind_norm(block, writer, name, place) if self.plan.student.post_norms else {name: self._writing(block, writer, place)}
            for name, tensor in fitted.items():
                begun.keep(name, tensor)
            if self.recipe.feed_forward_steps and self.plan.teacher.mixers[begun.layer] == "-":
                if self.plan.trains(begun.layer):
                    self._train(begun)
                else:
                    self.not_trained += 1

    def _train(self, begun: _Begun) -> None:
        trained = train_feed_forward(begun.block, self.streams, self.recipe.feed_forward_steps)
        self.feed_forward_kept.append(trained is not None)
        if trained is not None:
            for name, tensor in trained.named_parameters(prefix="mixer"):
                begun.keep(name, tensor.detach())
        else:
            self.plan = replace(self.plan, trained_in_vain=self.plan.trained_in_vain | {begun.layer})
            self.on_plan(self.plan)

    def _writing(self, block: nn.Module, writer: nn.Linear, place: str) -> torch.Tensor:
        """The writer's matrix [K, I] by least squares."""
        refit = Refit(writer.in_features, writer.out_features, self.base.device, self.recipe.ridge)
        for (inner_NI, missing_NK, second_N), weight_N1 in zip(self.streams.given_and_missing(block, writer), self.streams.token_weights(), strict=True):
            refit.add(inner_NI * weight_N1, (missing_NK if writer.bias is None else missing_NK - writer.bias) * weight_N1, second_N)
        fitted_KI = refit.solve(writer.weight, place=place)
        del refit
        _let_go(writer.in_features)
        return fitted_KI

    def _behind_norm(self, block: nn.Module, writer: nn.Linear, name: str, place: str) -> dict[str, torch.Tensor]:
        """The writer's matrix [K, I] and the weight [K] of the norm behind it, by name."""
        weight_KI, factor_K = fit_behind_norm(writer, factors(self.family, block.post_norm.weight), lambda: self.streams.given_and_missing(block, writer),
                                              self.epsilon, self.recipe.ridge, place=place)  # fmt: skip
        return {name: weight_KI, POST_NORM: factor_K - self.family.norm_offset}

    def _reading(self, weight_D: torch.Tensor, stored: torch.dtype, place: str) -> _Reading:
        """At a norm of this weight, to be stored so: the student's, then the matrix by least squares from n(y) to n(x)."""
        weight_D, basis_DK, offset = factors(self.family, weight_D), self.basis.matrix_DK, self.family.norm_offset
        refit = Refit(basis_DK.shape[1], basis_DK.shape[0], basis_DK.device, self.recipe.ridge)
        for (wanted_ND, own_NK), second_N in zip(self.streams.normalised(), self.streams.second_half(), strict=True):
            refit.add(own_NK, wanted_ND, second_N)
        fitted = refit.factor(basis_DK)
        scale = offset + float((torch.as_tensor(weight_D.square().mean().sqrt() if self.recipe.balanced else fitted) - offset).to(stored))
        if not self.recipe.refit_reading:
            return _Reading(scale, lambda rows_VD: self.basis.project(rows_VD, weight_D).mul_(fitted / scale))
        folded_DK = weight_D[:, None] * (refit.solve(fitted * basis_DK, place=f"the stream before {place}") / scale)
        return _Reading(scale, lambda rows_VD: rows_VD @ folded_DK)

    def _made(self, name: str, tensor: torch.Tensor, reading: _Reading | None, cut: TensorCut | None = None) -> torch.Tensor:
        """A tensor of the base, or rows of it, as the student has it: cut, folded, in its basis and in the dtype it is stored in."""
        cut, role, dtype = cut or self.cuts[name], self.roles[name], self.dtypes.get(name, torch.float32)
        if role == NORM:
            stored = reading.scale - self.family.norm_offset
            return torch.as_tensor(stored, dtype=dtype, device=tensor.device).expand(self.plan.student.hidden).contiguous()
        return in_basis(cut.apply(tensor), role, self.basis, reading and reading.rows, dtype).contiguous()


def _let_go(num_inputs: int) -> None:
    """Gives back what large Gram matrices of so many inputs have left: what comes next has other shapes and would lie beside it."""
    if 8 * num_inputs**2 >= GIVEN_BACK_BYTES:
        give_back_memory()


def _tensors(block: nn.Module, layer: int, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Some of a layer's tensors by canonical name; those of experts last and expert by expert, wherever they are: each is to be taken before the next one."""
    prefix = f"layers.{layer}."
    yield from ((name, tensor) for name, tensor in ((prefix + name, tensor) for name, tensor in block.state_dict().items())
                if name in names and expert_of(name) is None)  # fmt: skip
    wanted = sorted({expert_of(name) for name in names} - {None})
    for number, expert in experts_of(block).opened(wanted) if wanted else ():
        for name, tensor in expert.state_dict(prefix=f"{prefix}mixer.experts.{number}.").items():
            if name in names:
                yield name, tensor
