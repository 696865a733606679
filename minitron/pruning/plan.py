"""A pruning plan: which layers and which units of every axis stay, as indices into the teacher; and the recipe of a compensated cut. Loads no torch.

Indices are kept in ascending order, so that a plan that keeps everything is the identity and grouped units
(Mamba heads, attention heads) stay with their group.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from memory_budget.architecture import Architecture
from minitron.families.base import ATTENTION_HEAD, EXPERT, EXPERT_FFN, FFN, HIDDEN, KEY_VALUE_HEAD, MAMBA_CHANNEL, MAMBA_HEAD, SHARED_FFN
from minitron.importance.scores import ImportanceScores
from minitron.settings.run import PruneSettings
from nas.depth import check_is_cut

Indices = tuple[int, ...]
RIDGE = 1e-3  # where none is set, of a fit whose ridge is not chosen
LEAST_IN_FLOAT32 = 1e-4  # the ridge beside which the rounding of products in float32 is small
MIXTURES = 128  # of a matrix's outputs, by which ridges are compared
SWEEPS = 2  # over the matrices of a layer with experts (docs/notes/moe.md)
LOCAL_STEPS = 200  # of training for each expert, where the setting says none (docs/notes/moe.md)
FEED_FORWARD_STEPS = 48  # and of a feed-forward layer (docs/notes/real_model.md)
TRAINED_TOKENS = 2048  # of such a step of a feed-forward layer, as far as whole rows are as many
JUDGE = 8  # of so many rows one judges it
IN_VAIN = 3  # layers one after another that were trained in vain; those behind them are not trained
LOCAL_BATCH, SHARED_BATCH = 512, 2048  # tokens of such a step: of an expert, of the shared one, which sees all
ENOUGH_FOR_EXPERT = 300.0  # tokens an input of an expert's matrix below which its ridge is raised (docs/notes/moe.md)
SUMS_BYTES = 2**32  # of all sums of second moments: where they are more, neighbouring norms share one
AXIS_OF_KIND = {"M": (MAMBA_HEAD, MAMBA_CHANNEL), "-": (FFN,), "*": (KEY_VALUE_HEAD, ATTENTION_HEAD), "E": (EXPERT, SHARED_FFN)}


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """`kept_layers` are layers as config.json counts them. `units` maps an axis to the kept indices per sublayer of the teacher; hidden has one entry,
    under -1, for all of them, and the neurons of experts one for every expert, under `expert_place`. `chosen_by_refit` are the feed-forward sublayers whose
    neurons a compensated cut has chosen in place of the scores (refits/neurons.py), `trained_in_vain` those whose training served no row held back
    (refits/local_training.py)."""

    teacher: Architecture
    student: Architecture
    kept_layers: Indices
    units: Mapping[str, Mapping[int, Indices]]
    chosen_by_refit: frozenset[int] = frozenset()
    trained_in_vain: frozenset[int] = frozenset()

    def kept(self, axis: str, layer: int | None, expert: int | None = None) -> Indices | None:
        """Kept indices of an axis in a sublayer of the teacher, or in an expert of it; None where all stay."""
        if axis == EXPERT_FFN:
            return self.units.get(axis, {}).get(expert_place(self.teacher, layer, expert))
        return self.units.get(axis, {}).get(-1 if axis == HIDDEN else layer)

    @property
    def kept_sublayers(self) -> Indices:
        return self.teacher.sublayers_of(self.kept_layers)

    def to_json(self) -> dict:
        """Without a copy of the units, which in a mixture of experts are millions."""
        found = {name: sorted(getattr(self, name)) for name in ("chosen_by_refit", "trained_in_vain") if getattr(self, name)}
        return {"teacher": asdict(self.teacher), "student": asdict(self.student), "kept_layers": self.kept_layers, "units": self.units, **found}

    def with_neurons(self, neurons: Mapping[int, Indices]) -> "PruningPlan":
        """With these neurons of feed-forward sublayers, which a compensated cut has chosen."""
        if not neurons:
            return self
        units = {**self.units, FFN: {**self.units[FFN], **neurons}}
        return replace(self, units=units, chosen_by_refit=self.chosen_by_refit | set(neurons))

    def trains(self, layer: int) -> bool:
        """Whether a feed-forward sublayer is trained: not behind IN_VAIN of them, one after another, where that served nothing. What training can do falls
        from layer to layer, so the rest would be too."""
        before = [one in self.trained_in_vain for one in self.kept_sublayers if one < layer and self.teacher.mixers[one] == "-"]
        return not any(all(before[first : first + IN_VAIN]) for first in range(len(before) - IN_VAIN + 1))


def expert_place(teacher: Architecture, layer: int, expert: int) -> int:
    """The number of an expert among those of all sublayers."""
    return layer * teacher.moe_num_experts + expert


def make_plan(teacher: Architecture, student: Architecture, kept_layers: Indices, scores: ImportanceScores) -> PruningPlan:
    """Choose the highest scored units of every axis that the student has fewer of.

    Raises ValueError where the student is no cut of the teacher.
    """
    check_is_cut(teacher, student, kept_layers)
    units: dict[str, dict[int, Indices]] = {}
    if student.hidden < teacher.hidden:
        units[HIDDEN] = {-1: top(scores.hidden(), student.hidden)}
    for layer in teacher.sublayers_of(kept_layers):
        for axis in AXIS_OF_KIND[teacher.mixers[layer]]:
            kept = _choose(axis, layer, teacher, student, scores)
            if kept is not None:
                units.setdefault(axis, {})[layer] = kept
        if teacher.mixers[layer] == "E" and student.moe_ffn < teacher.moe_ffn:
            experts, neurons_EF = units.get(EXPERT, {}).get(layer, range(teacher.moe_num_experts)), scores.expert_neurons(layer)
            neurons = {expert_place(teacher, layer, expert): top(neurons_EF[expert], student.moe_ffn) for expert in experts}
            units.setdefault(EXPERT_FFN, {}).update(neurons)
    return PruningPlan(teacher=teacher, student=student, kept_layers=tuple(kept_layers), units=units)


def _choose(axis: str, layer: int, teacher: Architecture, student: Architecture, scores: ImportanceScores) -> Indices | None:
    if axis == FFN and student.ffn < teacher.ffn:
        return top(scores.ffn(layer), student.ffn)
    if axis == MAMBA_CHANNEL and student.mamba_head_dim < teacher.mamba_head_dim:
        return top(scores.mamba_channels(layer), student.mamba_head_dim)
    if axis == MAMBA_HEAD and student.mamba_num_heads < teacher.mamba_num_heads:
        channels = _choose(MAMBA_CHANNEL, layer, teacher, student, scores)
        return top_per_group(scores.mamba_heads(layer, channels), teacher.mamba_num_groups, student.mamba_num_heads)
    if axis == KEY_VALUE_HEAD and student.num_key_value_heads < teacher.num_key_value_heads:
        return top(scores.key_value_heads(layer, teacher.num_key_value_heads), student.num_key_value_heads)
    if axis == ATTENTION_HEAD and student.num_attention_heads < teacher.num_attention_heads:
        groups = _choose(KEY_VALUE_HEAD, layer, teacher, student, scores)
        return top_per_group(scores.attention_heads(layer), teacher.num_key_value_heads, student.num_attention_heads, groups)
    if axis == EXPERT and student.moe_num_experts < teacher.moe_num_experts:
        return top_per_group(scores.experts(layer), teacher.moe_groups, student.moe_num_experts)
    if axis == SHARED_FFN and student.moe_shared_ffn < teacher.moe_shared_ffn:
        return top(scores.shared_neurons(layer), student.moe_shared_ffn)
    return None


def top(scores: np.ndarray, number: int) -> Indices:
    """Indices of the highest scores, ascending; ties go to the lower index."""
    return tuple(sorted(np.argsort(-scores, kind="stable")[:number].tolist()))


def top_per_group(scores: np.ndarray, groups: int, number: int, kept: Indices | None = None) -> Indices:
    """The same number of highest scored units from each of `groups` equal runs, or of those of them that are kept (SSM, arXiv 2504.11409, §3)."""
    size, kept = len(scores) // groups, tuple(range(groups)) if kept is None else kept
    return tuple(group * size + index for group in kept for index in top(scores[group * size : (group + 1) * size], number // len(kept)))


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which parts are on, and the weight of the cut without refits in those that are, chosen matrix by matrix where it is None; see compensate.py. Without
    directions nothing is rotated. Not balanced, a norm has the fitted number s itself, and readers may be many times smaller than the base's: the control of
    what balancing is good for.
    """

    directions: str | None = "loss"
    refit_reading: bool = True
    refit_writing: bool = True
    ridge: float | None = None
    direction_samples: int = 8
    balanced: bool = True
    refit_experts: bool = True
    refit_shared: bool = True
    local_steps: int = 0
    feed_forward_steps: int = 0
    choose_neurons: bool = True

    @property
    def chooses_neurons(self) -> bool:
        """By what refitted writers would miss, so where they are."""
        return self.choose_neurons and self.refit_writing


def set_ridge(asked: Recipe | PruneSettings) -> float:
    """Of fits whose ridge is not chosen: of experts, of the last norm before a tied head, and of ranking."""
    return RIDGE if asked.ridge is None else asked.ridge


def _directions(settings: PruneSettings, student: Architecture) -> str:
    """By loss, but by variance for a head that is the table of embeddings and cannot be refitted (docs/compensated.md)."""
    if settings.directions is not None:
        return settings.directions.value
    return "variance" if student.tied_embeddings else "loss"


def recipe_of(settings: PruneSettings, student: Architecture) -> Recipe:
    """The parts that settings ask for, of a cut down to `student`."""
    directions = _directions(settings, student) if settings.rotate is not False and not student.post_norms else None
    return Recipe(directions, settings.refit_reading, settings.refit_writing, settings.ridge, settings.direction_samples, refit_experts=settings.refit_experts,
                  refit_shared=settings.refit_shared, local_steps=_local_steps(settings, student),
                  feed_forward_steps=FEED_FORWARD_STEPS if settings.local_steps is None else settings.local_steps,
                  choose_neurons=settings.choose_neurons)  # fmt: skip


def _local_steps(settings: PruneSettings, student: Architecture) -> int:
    """As set, else LOCAL_STEPS, where there are experts."""
    if "E" not in student.mixers:
        return 0
    return LOCAL_STEPS if settings.local_steps is None else settings.local_steps


def ridge_for(ridge: float, num_inputs: int, num_tokens: float, *, enough: float = 1.0) -> float:
    """The ridge of a fit: as set, and raised by as much as tokens are fewer than `enough` for each of the inputs solved for."""
    return ridge * max(1.0, enough * num_inputs / num_tokens)


def num_sites(hidden: int, num_layers: int) -> int:
    """Every norm's own, the last one's among them, as far as the sums of all are SUMS_BYTES; the last norm's is its own in any case."""
    return max(2, min(num_layers + 1, SUMS_BYTES // (2 * 8 * hidden**2)))
