"""Cutting tensors by the family's axis table. One cutter for every family; nothing is matched by size."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import nn

from minitron.families.base import EXPERT, Dimension, Family
from minitron.families.state import load_tensors, stored_state
from minitron.families.table import check_tensors, expert_of, row_of, split_layer
from minitron.pruning.plan import PruningPlan

# numpy knows no bf16 and no fp8; moving numbers needs only their size.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class TensorCut:
    """One tensor of the student: which teacher tensor it comes from, which indices of each dimension stay (None: all), and what becomes of the numbers:
    `factor` · number + `shift`."""

    source: str
    target: str
    shape: tuple[int, ...]
    keep: tuple[torch.Tensor | None, ...]
    factor: float = 1.0
    shift: float = 0.0

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stays of the source: a view where every dimension keeps a run of neighbours and numbers stay as they are, else a copy."""
        return self._changed(_select(tensor, self.keep))

    def apply_rows(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """What stays of a piece of the source, its rows from `first` on. Kept rows must be in ascending order, as in every plan that is made."""
        kept, *others = self.keep
        if kept is not None:
            assert bool((kept[1:] > kept[:-1]).all()), f"kept rows of {self.source} are not in ascending order"
            begin, end = torch.searchsorted(kept, torch.tensor([first, first + len(rows)])).tolist()
            kept = kept[begin:end] - first
        return self._changed(_select(rows, (kept, *others)))

    def _changed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if (self.factor, self.shift) == (1.0, 0.0) else (tensor.float() * self.factor + self.shift).to(tensor.dtype)


def _select(tensor: torch.Tensor, keep: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    for dimension, indices in enumerate(keep):
        if indices is None:
            continue
        if is_run(indices):
            tensor = tensor.narrow(dimension, int(indices[0]), len(indices))
        elif tensor.device.type == "cpu" and dimension == tensor.ndim - 1:
            tensor = _take_last(tensor, indices)
        else:
            tensor = tensor.index_select(dimension, indices.to(tensor.device))
    return tensor


def _take_last(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """index_select of the last dimension by numpy, four times as fast on bf16 matrices; "clip" is its way without a check of every index."""
    assert bool(((indices >= 0) & (indices < tensor.shape[-1])).all()), "indices out of range"
    integers = _INTEGERS[tensor.itemsize]
    taken = torch.empty(*tensor.shape[:-1], len(indices), dtype=integers)  # by torch: numpy's large arrays are new pages every time
    np.take(tensor.view(integers).numpy(), indices.numpy(), axis=-1, out=taken.numpy(), mode="clip")
    return taken.view(tensor.dtype)


def is_run(indices: torch.Tensor) -> bool:
    """Whether indices are neighbours in ascending order."""
    numbers = indices.numpy()
    return len(numbers) > 0 and numbers[-1] - numbers[0] == len(numbers) - 1 and bool((np.diff(numbers) == 1).all())


def plan_cuts(family: Family, plan: PruningPlan, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorCut]:
    """Every tensor of the student, in the teacher's order. `shapes` maps canonical teacher names to their shapes.

    Raises ValueError for a tensor of the wrong shape, one matched by no row or by two, or one missing.
    """
    check_tensors(family, plan.teacher, shapes)
    new_position = {layer: position for position, layer in enumerate(plan.kept_sublayers)}
    new_experts = {layer: {expert: place for place, expert in enumerate(experts)} for layer, experts in plan.units.get(EXPERT, {}).items()}
    cuts, made = [], {}
    for name, shape in shapes.items():
        layer, suffix = split_layer(name)
        if layer is not None and layer not in new_position:
            continue
        if layer in new_experts and (expert := expert_of(suffix)) is not None:
            if expert not in new_experts[layer]:
                continue
            suffix = suffix.replace(f"experts.{expert}.", f"experts.{new_experts[layer][expert]}.")
        keep = kept_indices(family, plan, name, made)
        new_shape = tuple(size if indices is None else len(indices) for size, indices in zip(shape, keep, strict=True))
        target = name if layer is None else f"layers.{new_position[layer]}.{suffix}"
        factor, shift = _rescaled(family, plan, name)
        cuts.append(TensorCut(name, target, new_shape, keep, factor, shift))
    return cuts


def _rescaled(family: Family, plan: PruningPlan, name: str) -> tuple[float, float]:
    """Factor and shift of a tensor's numbers. A model that multiplies its embeddings by a number of its sizes would give a student smaller ones: the table is
    made larger by as much, and the last norm's factor smaller where the table is the head too."""
    ratio = family.embed_scale(plan.teacher) / family.embed_scale(plan.student)
    if name.startswith(family.outside_names["embed"]):
        return ratio, 0.0
    if name.startswith(family.outside_names["norm"]) and plan.student.tied_embeddings:
        return 1 / ratio, family.norm_offset / ratio - family.norm_offset
    return 1.0, 0.0


def kept_indices(family: Family, plan: PruningPlan, name: str, made: dict | None = None) -> tuple[torch.Tensor | None, ...]:
    """What a plan keeps of each dimension of the tensor of this canonical name; None where all stays. `made`, one for all names of a plan, keeps what
    several tensors have in common."""
    sizes, (layer, suffix) = family.axis_sizes(plan.teacher), split_layer(name)
    expert, made = expert_of(suffix), {} if made is None else made

    def of_dimension(dimension: Dimension) -> torch.Tensor | None:
        chosen = {axis: plan.kept(axis, layer, expert) for segment in dimension for axis in segment}
        key = (dimension, *map(id, chosen.values()))  # of the plan's own tuples, which stay where they are
        if key not in made:
            made[key] = _kept_of_dimension(dimension, sizes, chosen)
        return made[key]

    return tuple(map(of_dimension, row_of(family, plan.teacher, name).dimensions))


def _kept_of_dimension(dimension: Dimension, sizes: Mapping[str, int], chosen: Mapping[str, tuple[int, ...] | None]) -> torch.Tensor | None:
    """Indices that stay of a dimension of fused segments; None where all stay."""
    if all(indices is None for indices in chosen.values()):
        return None
    pieces, offset = [], 0
    for segment in dimension:
        indices = np.zeros(1, np.int64)
        for axis in segment:  # slowest first: index = (i·size of next + j)·…
            of_axis = np.arange(sizes[axis]) if chosen[axis] is None else np.array(chosen[axis])
            indices = (indices[:, None] * sizes[axis] + of_axis).reshape(-1)
        pieces.append(indices + offset)
        offset += prod(sizes[axis] for axis in segment)
    return torch.from_numpy(np.concatenate(pieces))


def build_pruned(family: Family, teacher: nn.Module, plan: PruningPlan, teacher_config: dict) -> nn.Module:
    """The student of a plan as a model in memory, cut from the teacher's weights."""
    with torch.device("meta"):
        student = family.build(family.hf_config(teacher_config, plan.student))
    load_tensors(family, student, {name: tensor.clone() for name, tensor in cut_state(family, plan, stored_state(teacher)).items()})
    return student.eval()


def cut_state(family: Family, plan: PruningPlan, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student's tensors from a teacher's in memory, by canonical names; views of it where they can be."""
    canonical = {family.canonical_name(name): tensor for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in canonical.items()}
    return {cut.target: cut.apply(canonical[cut.source]) for cut in plan_cuts(family, plan, shapes)}
