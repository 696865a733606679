"""Which layers stay at a given depth, from an order of removal."""

from collections.abc import Mapping, Sequence

from memory_budget.architecture import Architecture, check_architecture
from nas.space import Floors


def check_layer_order(order: Sequence[int], pattern: str) -> None:
    """Refuse an order that names layers the teacher lacks, or one twice. Raises ValueError."""
    for layer in order:
        if not 0 <= layer < len(pattern):
            raise ValueError(f"layer order names layer {layer}; the teacher has layers 0 to {len(pattern) - 1}")
    if len(set(order)) != len(order):
        twice = next(layer for position, layer in enumerate(order) if layer in order[:position])
        raise ValueError(f"layer order names layer {twice} twice; every layer may stand once")


def kept_layers(pattern: str, removal_order: Sequence[int], num_layers: int, floors: Floors) -> tuple[int, ...]:
    """The layers that stay when layers go in `removal_order` (least important first) until `num_layers` are left.

    A removal that would leave fewer than `floors[kind]` layers of a kind is passed over.
    Raises ValueError where the order is too short for that depth.
    """
    kept = list(range(len(pattern)))
    for layer in removal_order:
        if len(kept) == num_layers:
            break
        left = sum(pattern[other] == pattern[layer] for other in kept)
        if left > floors.get(pattern[layer], 0):
            kept.remove(layer)
    if len(kept) > num_layers:
        raise ValueError(f"search.layers has the option {num_layers}, but the layer order and the floors reach only {len(kept)} layers")
    return tuple(kept)


def check_is_cut(teacher: Architecture, student: Architecture, kept_layers: tuple[int, ...]) -> None:
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


def subsequence_layers(teacher_pattern: str, student_pattern: str, prefer: Mapping[int, int] | None = None) -> tuple[int, ...]:
    """Teacher layers that spell the student's pattern, dropping the layers removed first in `prefer` (layer → rank of removal).

    Raises ValueError where the pattern is no subsequence. Without ranks the earliest match of each letter is taken.
    """
    prefer = prefer or {}
    # best[j] after reading teacher layers 0..i: highest total rank of a match of the student's first j letters.
    worst = float("-inf")
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] + [(worst, ())] * len(student_pattern)
    for layer, kind in enumerate(teacher_pattern):
        for j in range(min(layer + 1, len(student_pattern)), 0, -1):
            value = best[j - 1][0] + prefer.get(layer, len(teacher_pattern))
            if student_pattern[j - 1] == kind and value > best[j][0]:
                best[j] = (value, (*best[j - 1][1], layer))
    if best[-1][0] == worst:
        raise ValueError(f"pattern {student_pattern} is not the teacher's {teacher_pattern} with layers left out")
    return best[-1][1]
