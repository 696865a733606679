"""Cutting tensors by the family's axis table. One cutter for every family; nothing is matched by size."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import nn

from memory_budget.architecture import Architecture
from minitron.families.base import Dimension, Family, TensorAxes
from minitron.pruning.plan import PruningPlan

# numpy knows no bf16 and no fp8; moving numbers needs only their size.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class TensorCut:
    """One tensor of the student: which teacher tensor it comes from and which indices of each dimension stay (None: all)."""

    source: str
    target: str
    shape: tuple[int, ...]
    keep: tuple[torch.Tensor | None, ...]

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stays of the source: a view where every dimension keeps a run of neighbours, else a copy."""
        return _select(tensor, self.keep)

    def apply_rows(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """What stays of a piece of the source, its rows from `first` on. Kept rows must be in ascending order, as in every plan that is made."""
        kept, *others = self.keep
        if kept is not None:
            assert bool((kept[1:] > kept[:-1]).all()), f"kept rows of {self.source} are not in ascending order"
            begin, end = torch.searchsorted(kept, torch.tensor([first, first + len(rows)])).tolist()
            kept = kept[begin:end] - first
        return _select(rows, (kept, *others))


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
    return len(indices) > 0 and torch.equal(indices, torch.arange(int(indices[0]), int(indices[0]) + len(indices)))


def plan_cuts(family: Family, plan: PruningPlan, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorCut]:
    """Every tensor of the student, in the teacher's order. `shapes` maps canonical teacher names to their shapes.

    Raises ValueError for a tensor of the wrong shape, one matched by no row or by two, or one missing.
    """
    check_tensors(family, plan.teacher, shapes)
    new_position = {layer: position for position, layer in enumerate(plan.kept_layers)}
    cuts = []
    for name, shape in shapes.items():
        layer, suffix = split_layer(name)
        if layer is not None and layer not in new_position:
            continue
        keep = kept_indices(family, plan, name)
        new_shape = tuple(size if indices is None else len(indices) for size, indices in zip(shape, keep, strict=True))
        target = name if layer is None else f"layers.{new_position[layer]}.{suffix}"
        cuts.append(TensorCut(source=name, target=target, shape=new_shape, keep=keep))
    return cuts


def kept_indices(family: Family, plan: PruningPlan, name: str) -> tuple[torch.Tensor | None, ...]:
    """What a plan keeps of each dimension of the tensor of this canonical name; None where all stays."""
    sizes, (layer, _) = family.axis_sizes(plan.teacher), split_layer(name)
    return tuple(_kept_of_dimension(dimension, sizes, lambda axis: plan.kept(axis, layer)) for dimension in row_of(family, plan.teacher, name).dimensions)


def split_layer(name: str) -> tuple[int | None, str]:
    """("layers.7.mixer.D") → (7, "mixer.D"); a tensor outside the layers has layer None. Raises ValueError for `layers.` without a number."""
    if not name.startswith("layers."):
        return None, name
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"tensor {name} is not named layers.NUMBER.…, as tensors of a layer are")
    return int(match[1]), match[2]


def row_of(family: Family, architecture: Architecture, name: str) -> TensorAxes:
    """The table's row for a canonical tensor name. Raises ValueError where none or two match."""
    layer, suffix = split_layer(name)
    if layer is not None and layer >= architecture.num_layers:
        raise ValueError(f"tensor {name} belongs to layer {layer}; the pattern has {architecture.num_layers} layers")
    kinds = ("",) if layer is None else (architecture.pattern[layer], "any")
    rows = [row for row in family.table if row.suffix == suffix and row.kind in kinds]
    if len(rows) != 1:
        raise ValueError(f"tensor {name} is matched by {len(rows)} rows of the {family.model_type} axis table; it must be exactly 1")
    return rows[0]


def expected_shape(family: Family, architecture: Architecture, row: TensorAxes) -> tuple[int, ...]:
    sizes = family.axis_sizes(architecture)
    return tuple(sum(prod(sizes[axis] for axis in segment) for segment in dimension) for dimension in row.dimensions)


def check_tensors(family: Family, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold a checkpoint's tensors against its config. Raises ValueError naming the tensor that is wrong, missing or too many."""
    for name, shape in shapes.items():
        row = row_of(family, architecture, name)
        expected = expected_shape(family, architecture, row)
        if tuple(shape) != expected:
            raise ValueError(f"tensor {name} has shape {list(shape)}; config.json says {list(expected)}")
        if not _has(architecture, row):
            raise ValueError(f"tensor {name} is in the checkpoint, but config.json describes a model without it ({row.only_if} is false)")
    for name in required_names(family, architecture):
        if name not in shapes:
            raise ValueError(f"tensor {name} is missing from the checkpoint; config.json's pattern needs it")


def required_names(family: Family, architecture: Architecture) -> Iterator[str]:
    """Every tensor the pattern and the architecture's bias flags call for."""
    rows = [row for row in family.table if _has(architecture, row)]
    yield from (row.suffix for row in rows if row.kind == "")
    for layer, kind in enumerate(architecture.pattern):
        yield from (f"layers.{layer}.{row.suffix}" for row in rows if row.kind in (kind, "any"))


def _has(architecture: Architecture, row: TensorAxes) -> bool:
    return not row.only_if or getattr(architecture, row.only_if)


def _kept_of_dimension(dimension: Dimension, sizes: Mapping[str, int], kept: Callable[[str], tuple[int, ...] | None]) -> torch.Tensor | None:
    """Indices that stay of a dimension of fused segments; None where all stay."""
    chosen = {axis: kept(axis) for segment in dimension for axis in segment}
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
    state = {name: tensor.clone() for name, tensor in cut_state(family, plan, teacher.state_dict()).items()}
    names = {family.canonical_name(name): name for name in student.state_dict()}
    student.load_state_dict({names[name]: tensor for name, tensor in state.items()}, assign=True)
    return student.eval()


def cut_state(family: Family, plan: PruningPlan, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student's tensors from a teacher's in memory, by canonical names; views of it where they can be."""
    canonical = {family.canonical_name(name): tensor for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in canonical.items()}
    return {cut.target: cut.apply(canonical[cut.source]) for cut in plan_cuts(family, plan, shapes)}
