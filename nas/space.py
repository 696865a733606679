"""The search space: which values each axis may take."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memory_budget.architecture import Architecture, least_experts
from nas.axes import WIDTHS
from nas.couplings import Coupling, combined, following

Floors = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Options per axis, each ascending; `floors` is the least number of layers of each kind, by its letter.

    mamba_head_dim (channels of a Mamba head), num_attention_heads (query heads), num_key_value_heads and the sizes of experts are None where only the
    teacher's value is allowed. `couplings` are equations that every candidate keeps; `given` the fields whose axes somebody gave options, from which others
    may follow.
    """

    num_layers: tuple[int, ...]
    hidden: tuple[int, ...]
    ffn: tuple[int, ...]
    mamba_num_heads: tuple[int, ...]
    floors: Floors
    mamba_head_dim: tuple[int, ...] | None = None
    num_attention_heads: tuple[int, ...] | None = None
    num_key_value_heads: tuple[int, ...] | None = None
    moe_num_experts: tuple[int, ...] | None = None
    moe_ffn: tuple[int, ...] | None = None
    moe_shared_ffn: tuple[int, ...] | None = None
    couplings: tuple[Coupling, ...] = ()
    given: frozenset[str] = frozenset()

    @property
    def follows(self) -> dict[str, Coupling]:
        """The fields that follow from others, each with its equation; their one option is no more than a place."""
        return following(self.couplings, self.given)

    @property
    def size(self) -> int:
        """Number of points: depths times the options of every width, those included that couplings leave out."""
        return len(self.num_layers) * math.prod(len(options) for name in WIDTHS if (options := getattr(self, name)) is not None)

    def widths(self, teacher: Architecture) -> dict[str, tuple[int, ...]]:
        """Options of every axis of width, by the architecture's field; the teacher's value where the space leaves an axis open."""
        given = {name: getattr(self, name) for name in WIDTHS}
        return {name: (getattr(teacher, name),) if options is None else options for name, options in given.items()}

    def sizes(self, teacher: Architecture) -> dict[str, tuple[int, ...]]:
        """The same, with all sizes that what follows may have; none where no option of the others leads to one that can be cut."""
        widths = self.widths(teacher)
        for field, coupling in self.follows.items():
            found = getattr(combined(teacher, {name: widths[name] for name in coupling.fields}, {field: coupling}), field)
            widths[field] = tuple(size for size in np.unique(found).tolist() if 0 < size <= getattr(teacher, field))
        return widths


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
    widths = space.widths(teacher)
    for heads in widths["mamba_num_heads"]:
        _check_multiple("mamba heads", heads, teacher.mamba_num_groups, "groups")
    if space.num_key_value_heads is None:
        for heads in widths["num_attention_heads"]:
            _check_multiple("attention heads", heads, teacher.num_key_value_heads, "key-value heads")
    if "E" in teacher.pattern:
        _check_experts(widths["moe_num_experts"], teacher)
    sizes = space.sizes(teacher)
    for coupling in space.couplings:
        fields = set(coupling.fields).union(*(other.fields for field, other in space.follows.items() if field in coupling.fields))
        if not np.any(coupling.holds(combined(teacher, {name: widths[name] for name in fields}, space.follows), teacher)):
            names = [f"search.{WIDTHS[name]} ({', '.join(map(str, sizes[name])) or 'none follows'})" for name in coupling.fields]
            listed = f"{', '.join(names[:-1])} and {names[-1]}"
            raise ValueError(f"{coupling} holds for no options of {listed}; no loader of {teacher.model_type} takes another")
    for kind, floor in space.floors.items():
        if floor and kind not in teacher.layer_kinds:
            raise ValueError(f"search.floors keeps {floor} layers of kind {kind!r}; the teacher's layers are of the kinds {sorted(set(teacher.layer_kinds))}")
        if floor > teacher.num_layers_of(kind):
            raise ValueError(f"search.floors keeps {floor} layers of kind {kind!r}; the teacher has {teacher.num_layers_of(kind)}")
    least = sum(min(teacher.num_layers_of(kind), space.floors.get(kind, 0)) for kind in set(teacher.layer_kinds))
    if space.num_layers[0] < least:
        raise ValueError(f"search.layers has the option {space.num_layers[0]}; the floors per kind of layer keep at least {least}")


def _check_experts(options: Sequence[int], teacher: Architecture) -> None:
    """As many experts go from every routing group, and the router must find enough of them for a token among those that stay."""
    for experts in options:
        _check_multiple("experts", experts, teacher.moe_groups, "routing groups")
        if experts < (least := least_experts(teacher)):
            within = f", in {teacher.moe_groups_per_token} of {teacher.moe_groups} routing groups of two or more" if teacher.moe_groups > 1 else ""
            per_token = teacher.moe_experts_per_token
            raise ValueError(f"search.experts has the option {experts}; it must be at least {least}: a token goes to {per_token} experts{within}")


def _check_multiple(what: str, heads: int, divisor: int, of: str) -> None:
    """Heads that share keys, or B and C, go in equal numbers from each of those that they share; a teacher without any has divisor 0."""
    if divisor and heads % divisor:
        below = heads - heads % divisor
        nearest = ", ".join(str(value) for value in (below, below + divisor) if value)
        raise ValueError(f"{what} to keep ({heads}) must be a multiple of the {divisor} {of}; nearest: {nearest}")
