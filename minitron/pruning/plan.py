"""A pruning plan: which layers and which units of every axis stay, as indices into the teacher.

Indices are kept in ascending order, so that a plan that keeps everything is the identity and grouped units
(Mamba heads, attention heads) stay with their group.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from memory_budget.architecture import Architecture, check_architecture
from minitron.families.base import ATTENTION_HEAD, FFN, HIDDEN, MAMBA_CHANNEL, MAMBA_HEAD
from minitron.importance.scores import ImportanceScores

Indices = tuple[int, ...]
AXIS_OF_KIND = {"M": (MAMBA_HEAD, MAMBA_CHANNEL), "-": (FFN,), "*": (ATTENTION_HEAD,)}


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """`units` maps an axis to the kept indices per teacher layer; hidden has one entry, under layer -1, for all layers."""

    teacher: Architecture
    student: Architecture
    kept_layers: Indices
    units: Mapping[str, Mapping[int, Indices]]

    def kept(self, axis: str, layer: int) -> Indices | None:
        """Kept indices of an axis in a teacher layer; None where all stay."""
        return self.units.get(axis, {}).get(-1 if axis == HIDDEN else layer)

    def to_json(self) -> dict:
        return asdict(self)


def make_plan(teacher: Architecture, student: Architecture, kept_layers: Indices, scores: ImportanceScores) -> PruningPlan:
    """Choose the highest scored units of every axis that the student has fewer of.

    Raises ValueError where the student is no cut of the teacher.
    """
    check_is_cut(teacher, student, kept_layers)
    units: dict[str, dict[int, Indices]] = {}
    if student.hidden < teacher.hidden:
        units[HIDDEN] = {-1: top(scores.hidden(), student.hidden)}
    for layer in kept_layers:
        for axis in AXIS_OF_KIND[teacher.pattern[layer]]:
            kept = _choose(axis, layer, teacher, student, scores)
            if kept is not None:
                units.setdefault(axis, {})[layer] = kept
    return PruningPlan(teacher=teacher, student=student, kept_layers=tuple(kept_layers), units=units)


def _choose(axis: str, layer: int, teacher: Architecture, student: Architecture, scores: ImportanceScores) -> Indices | None:
    if axis == FFN and student.ffn < teacher.ffn:
        return top(scores.ffn(layer), student.ffn)
    if axis == MAMBA_CHANNEL and student.mamba_head_dim < teacher.mamba_head_dim:
        return top(scores.mamba_channels(layer), student.mamba_head_dim)
    if axis == MAMBA_HEAD and student.mamba_num_heads < teacher.mamba_num_heads:
        channels = _choose(MAMBA_CHANNEL, layer, teacher, student, scores)
        return top_per_group(scores.mamba_heads(layer, channels), teacher.mamba_num_groups, student.mamba_num_heads)
    if axis == ATTENTION_HEAD and student.num_attention_heads < teacher.num_attention_heads:
        return top_per_group(scores.attention_heads(layer), teacher.num_key_value_heads, student.num_attention_heads)
    return None


def top(scores: np.ndarray, number: int) -> Indices:
    """Indices of the highest scores, ascending; ties go to the lower index."""
    return tuple(sorted(np.argsort(-scores, kind="stable")[:number].tolist()))


def top_per_group(scores: np.ndarray, groups: int, number: int) -> Indices:
    """The same number of highest scored units from each of `groups` equal runs (SSM, arXiv 2504.11409, §3)."""
    size = len(scores) // groups
    return tuple(group * size + index for group in range(groups) for index in top(scores[group * size : (group + 1) * size], number // groups))


def check_is_cut(teacher: Architecture, student: Architecture, kept_layers: Indices) -> None:
    """Refuse a student that cannot be cut from the teacher. Raises ValueError."""
    check_architecture(student)
    pattern = "".join(teacher.pattern[layer] for layer in kept_layers)
    if pattern != student.pattern:
        raise ValueError(f"kept layers give the pattern {pattern}, the student's is {student.pattern}")
    for name in ("hidden", "ffn", "mamba_num_heads", "mamba_head_dim", "num_attention_heads"):
        if getattr(student, name) > getattr(teacher, name):
            raise ValueError(f"{name} of the student ({getattr(student, name)}) must be at most the teacher's ({getattr(teacher, name)})")
    for name in ("vocab", "mamba_num_groups", "mamba_state_size", "mamba_conv_kernel", "num_key_value_heads", "attention_head_dim", "tied_embeddings"):
        if getattr(student, name) != getattr(teacher, name):
            raise ValueError(f"{name} of the student ({getattr(student, name)}) must equal the teacher's ({getattr(teacher, name)}); it is not a cut axis")


def subsequence_layers(teacher_pattern: str, student_pattern: str, prefer: Mapping[int, int] | None = None) -> Indices:
    """Teacher layers that spell the student's pattern, dropping the layers removed first in `prefer` (layer → rank of removal).

    Raises ValueError where the pattern is no subsequence. Without ranks the earliest match of each letter is taken.
    """
    prefer = prefer or {}
    # best[j] after reading teacher layers 0..i: highest total rank of a match of the student's first j letters.
    worst = float("-inf")
    best: list[tuple[float, Indices]] = [(0.0, ())] + [(worst, ())] * len(student_pattern)
    for layer, kind in enumerate(teacher_pattern):
        for j in range(min(layer + 1, len(student_pattern)), 0, -1):
            value = best[j - 1][0] + prefer.get(layer, len(teacher_pattern))
            if student_pattern[j - 1] == kind and value > best[j][0]:
                best[j] = (value, (*best[j - 1][1], layer))
    if best[-1][0] == worst:
        raise ValueError(f"pattern {student_pattern} is not the teacher's {teacher_pattern} with layers left out")
    return best[-1][1]
