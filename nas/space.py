"""The search space: which values each axis may take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memory_budget.architecture import Architecture

Floors = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Options per axis, each ascending; `floors` is the least number of layers of each kind, by its letter."""

    num_layers: tuple[int, ...]
    hidden: tuple[int, ...]
    ffn: tuple[int, ...]
    mamba_num_heads: tuple[int, ...]
    floors: Floors

    @property
    def size(self) -> int:
        return len(self.num_layers) * len(self.hidden) * len(self.ffn) * len(self.mamba_num_heads)


def axis_options(axis: str, teacher_value: int, values: Sequence[int] | None, low: int | None, high: int | None, step: int) -> tuple[int, ...]:
    """The options of one axis, from an explicit list or from low/high/step, high included.

    With neither, the teacher's value is the only option. Raises ValueError naming the setting, value and rule.
    """
    if values is not None:
        options = tuple(sorted(set(values)))
        if not options:
            raise ValueError(f"search.{axis}.values is empty; give at least one value or leave it out")
    else:
        low, high = (teacher_value if bound is None else bound for bound in (low, high))
        if step < 1:
            raise ValueError(f"search.{axis}.step ({step}) must be at least 1")
        if low > high:
            raise ValueError(f"search.{axis}.low ({low}) must be at most high ({high})")
        options = tuple(range(low, high + 1, step))
        if options[-1] != high:
            raise ValueError(f"search.{axis}: steps of {step} from {low} never meet high ({high}); nearest: {options[-1]}, {options[-1] + step}")
    if options[0] < 1:
        raise ValueError(f"search.{axis} has the option {options[0]}; it must be at least 1")
    if options[-1] > teacher_value:
        raise ValueError(f"search.{axis} has the option {options[-1]}, above the teacher's {teacher_value}; a cut only makes it smaller")
    return options


def check_space(space: SearchSpace, teacher: Architecture) -> None:
    """Refuse options that no student can have. Raises ValueError."""
    for heads in space.mamba_num_heads:
        if teacher.mamba_num_groups and heads % teacher.mamba_num_groups:
            below = heads - heads % teacher.mamba_num_groups
            raise ValueError(
                f"mamba heads to keep ({heads}) must be a multiple of the {teacher.mamba_num_groups} groups; "
                f"nearest: {max(below, teacher.mamba_num_groups)}, {below + teacher.mamba_num_groups}"
            )
    for kind, floor in space.floors.items():
        if floor > teacher.num_layers_of(kind):
            raise ValueError(f"search.floors keeps {floor} layers of kind {kind!r}; the teacher has {teacher.num_layers_of(kind)}")
    least = sum(min(teacher.num_layers_of(kind), space.floors.get(kind, 0)) for kind in set(teacher.pattern))
    if space.num_layers[0] < least:
        raise ValueError(f"search.layers has the option {space.num_layers[0]}; the floors per kind of layer keep at least {least}")
