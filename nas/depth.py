"""Which layers stay at a given depth, from an order of removal."""

from collections.abc import Mapping, Sequence

from memory_budget.architecture import WINDOWED, Architecture, check_architecture
from nas.axes import WIDTHS
from nas.couplings import Coupling
from nas.space import Floors

# Sizes that a student has from its teacher.
UNCUT = ("vocab", "mamba_num_groups", "mamba_state_size", "mamba_conv_kernel", "attention_head_dim", "tied_embeddings")
UNCUT_OF_EXPERTS = ("moe_experts_per_token", "moe_latent", "moe_groups", "moe_groups_per_token")


def check_layer_order(order: Sequence[int], num_layers: int) -> None:
    """Refuse an order that names layers the teacher lacks, or one twice. Raises ValueError."""
    for layer in order:
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer order names layer {layer}; the teacher has layers 0 to {num_layers - 1}")
    if len(set(order)) != len(order):
        twice = next(layer for position, layer in enumerate(order) if layer in order[:position])
        raise ValueError(f"layer order names layer {twice} twice; every layer may stand once")


def kept_layers(kinds: Sequence[str], removal_order: Sequence[int], num_layers: int, floors: Floors) -> tuple[int, ...]:
    """The layers that stay when layers go in `removal_order` (least important first) until `num_layers` are left.

    `kinds` has every layer's letters (Architecture.layer_kinds). A removal that would leave fewer than `floors[kind]` layers of a kind is passed over, and
    one that would leave windows alone where there was a layer that sees all tokens.
    Raises ValueError where the order is too short for that depth.
    """
    kept, floors = list(range(len(kinds))), with_sight(kinds, floors)
    for layer in removal_order:
        if len(kept) == num_layers:
            break
        left = sum(kinds[other] == kinds[layer] for other in kept)
        if left > floors.get(kinds[layer], 0):
            kept.remove(layer)
    if len(kept) > num_layers:
        raise ValueError(f"search.layers has the option {num_layers}, but the layer order and the floors reach only {len(kept)} layers")
    return tuple(kept)


def with_sight(kinds: Sequence[str], floors: Floors) -> Floors:
    """The floors, and of layers that see all tokens, beside others with a window, at least one: without it no layer would see farther than the window."""
    seeing = {kind for kind in kinds if "*" in kind} if any(WINDOWED in kind for kind in kinds) else set()
    return {**floors, **{kind: max(1, floors.get(kind, 0)) for kind in seeing}}


def spelled(teacher: Architecture, layers: Sequence[int]) -> str:
    """The pattern of the teacher's layers that stay."""
    kinds = teacher.layer_kinds
    return "".join(kinds[layer] for layer in layers)


def check_is_cut(teacher: Architecture, student: Architecture, kept_layers: tuple[int, ...], couplings: Sequence[Coupling] = ()) -> None:
    """Refuse a student that cannot be cut from the teacher. Raises ValueError."""
    check_architecture(student)
    pattern = spelled(teacher, kept_layers)
    if pattern != student.pattern:
        raise ValueError(f"kept layers give the pattern {pattern}, the student's is {student.pattern}")
    if WINDOWED in student.pattern and "*" in teacher.pattern and "*" not in student.pattern:
        raise ValueError(f"the kept layers {', '.join(map(str, kept_layers))} all have a window of {teacher.window:,} tokens, and no other layer would see "
                         "farther; at least one layer of full attention must stay")  # fmt: skip
    for name in WIDTHS:
        if getattr(student, name) > getattr(teacher, name):
            raise ValueError(f"{name} of the student ({getattr(student, name)}) must be at most the teacher's ({getattr(teacher, name)})")
    if "E" in student.pattern and teacher.moe_shared_ffn and student.moe_shared_ffn < 1:
        raise ValueError(f"moe_shared_ffn of the student ({student.moe_shared_ffn}) must be at least 1: a {teacher.model_type} has a shared expert")
    for name in (*UNCUT, *(UNCUT_OF_EXPERTS if "E" in student.pattern else ())):
        if getattr(student, name) != getattr(teacher, name):
            raise ValueError(f"{name} of the student ({getattr(student, name)}) must equal the teacher's ({getattr(teacher, name)}); it is not a cut axis")
    if teacher.num_key_value_heads and student.num_attention_heads * teacher.num_key_value_heads > teacher.num_attention_heads * student.num_key_value_heads:
        raise ValueError(f"{student.num_attention_heads} query heads for {student.num_key_value_heads} KV heads are more for each than the teacher has "
                         f"({teacher.num_attention_heads} for {teacher.num_key_value_heads}); a cut only makes it smaller")  # fmt: skip
    for coupling in couplings:
        if not coupling.holds(student, teacher):
            first, *others = [(name, getattr(student, name)) for name in coupling.fields]
            sizes = ", ".join(["{} is {}".format(*first), *("{} {}".format(*other) for other in others)])
            raise ValueError(f"the student breaks {coupling}: {sizes}; no loader of {teacher.model_type} takes it")


def subsequence_layers(teacher_kinds: Sequence[str], student_kinds: Sequence[str], prefer: Mapping[int, int] | None = None) -> tuple[int, ...]:
    """Teacher layers of the student's kinds, in order, dropping the layers removed first in `prefer` (layer → rank of removal).

    Raises ValueError where the pattern is no subsequence. Without ranks the earliest match of each letter is taken.
    """
    prefer = prefer or {}
    # best[j] after reading teacher layers 0..i: highest total rank of a match of the student's first j letters.
    worst = float("-inf")
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] + [(worst, ())] * len(student_kinds)
    for layer, kind in enumerate(teacher_kinds):
        for j in range(min(layer + 1, len(student_kinds)), 0, -1):
            value = best[j - 1][0] + prefer.get(layer, len(teacher_kinds))
            if student_kinds[j - 1] == kind and value > best[j][0]:
                best[j] = (value, (*best[j - 1][1], layer))
    if best[-1][0] == worst:
        raise ValueError(f"pattern {''.join(student_kinds)} is not the teacher's {''.join(teacher_kinds)} with layers left out")
    return best[-1][1]
