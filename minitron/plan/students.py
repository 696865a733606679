"""Which students a walk may come to, before anything is measured: the likely one, the smallest, and the range between."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from memory_budget.architecture import Architecture
from memory_budget.calculator import memory_report
from minitron.search.space import fixed_student, parameter_limits, space_of
from minitron.settings.derived import budget_of, couplings_of, fixed_sizes, floors, workload_of
from minitron.settings.run import Settings
from nas.axes import AXES, WIDTHS
from nas.couplings import completed, following
from nas.depth import kept_layers, spelled
from nas.space import SearchSpace

STEPS = 64  # from the largest options down to the smallest


@dataclass(frozen=True, slots=True)
class Students:
    """Of one lap: the `likely` student, about the largest that fits; the `smallest`, than which none is smaller in any axis; the depths that may be chosen;
    the least and most of every axis's options; how many candidates there are; the axes whose sizes `follow` from other axes'."""

    likely: Architecture
    smallest: Architecture
    depths: tuple[int, ...]
    ranges: Mapping[str, tuple[int, int]]
    candidates: int
    follow: tuple[str, ...] = ()


def uncut(base: Architecture) -> Students:
    """Of a walk that cuts nothing."""
    return Students(base, base, (base.num_layers,), {}, 1)


def students_of(settings: Settings, base: Architecture) -> Students:
    """Of the search that the settings ask for, cut from `base`. Raises ValueError as the search's own check does."""
    if settings.search.fixed.given():
        return _fixed(settings, base)
    space, later = space_of(settings, base), settings.search.later_widths.given()
    points = [_at(settings, base, space, step / STEPS) for step in range(STEPS, -1, -1)]
    points = [point for point in points if all(0 < getattr(point, field) <= getattr(base, field) for field in space.follows)] or [base]
    smallest = points[-1]
    points = [point for point in points if all(coupling.holds(point, base) for coupling in space.couplings)] or [smallest]
    limit, workload, counts = budget_of(settings).bytes, workload_of(settings), parameter_limits(settings)
    fitting = [point for point in points if memory_report(replace(point, **later), workload).total <= limit
               and all(count(point) <= most for most, count in counts.values())]  # fmt: skip
    sizes = {"num_layers": space.num_layers, **{field: tuple(filter(None, options)) for field, options in space.sizes(base).items()}}
    ranges = {axis.name: (min(options), max(options)) for axis in AXES.values() if (options := sizes[axis.field])}
    return Students((fitting or points[-1:])[0], smallest, space.num_layers, ranges, space.size, _names(space.follows))


def _fixed(settings: Settings, base: Architecture) -> Students:
    """The one that is given."""
    sizes, student = fixed_sizes(settings, base), fixed_student(settings, base)
    if "num_layers" in sizes:
        student = _of_depth(settings, student, sizes["num_layers"])
    ranges = {axis.name: (axis.size(student), axis.size(student)) for axis in AXES.values()}
    follows = following(couplings_of(base), settings.search.fixed.given())
    return Students(student, student, (student.num_layers,), ranges, 1, _names(follows))


def _names(fields: Iterable[str]) -> tuple[str, ...]:
    return tuple(WIDTHS[field] for field in fields)


def _at(settings: Settings, base: Architecture, space: SearchSpace, share: float) -> Architecture:
    """What is at this share of the way from every axis's smallest option to its largest."""
    chosen = {name: options[round(share * (len(options) - 1))] for name, options in space.widths(base).items()}
    deep = _of_depth(settings, base, space.num_layers[round(share * (len(space.num_layers) - 1))])
    return completed(replace(deep, **chosen), base, space.follows)


def _of_depth(settings: Settings, model: Architecture, depth: int) -> Architecture:
    """The model with so many layers. Which ones go nobody knows yet: those in the middle, from where most go."""
    middle = sorted(range(model.num_layers), key=lambda layer: abs(layer - model.num_layers / 2))
    return replace(model, pattern=spelled(model, kept_layers(model.layer_kinds, middle, depth, floors(settings, model))))
