"""What the search may choose from, by the settings and config.json alone: options, limits, the throughput model. Loads no torch."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from memory_budget.architecture import Architecture, check_architecture
from memory_budget.calculator import memory_report
from memory_budget.parameters import count_active_parameters, count_total_parameters
from memory_budget.units import GIB, format_gib
from minitron.importance.scores import protected_experts
from minitron.settings.derived import axis_of, budget_of, couplings_of, fixed_sizes, floors, given_widths, serving_device, workload_of
from minitron.settings.run import Settings
from nas.axes import AXES, identifier
from nas.depth import check_is_cut, kept_layers, spelled, subsequence_layers
from nas.filters import Filters, advice
from nas.space import SearchSpace, check_space
from nas.throughput import Serving, device_of

NO_BUDGET = 2**62


def space_of(settings: Settings, teacher: Architecture) -> SearchSpace:
    """The options of every axis. Raises ValueError for options no student can have."""
    options = {name: axis_of(settings, name, teacher) for name in AXES}
    always = {AXES[name].field: options[name] for name in ("layers", "hidden", "ffn", "mamba_heads")}
    optional = {axis.field: options[name] for name, axis in AXES.items() if axis.field not in always and options[name] != (getattr(teacher, axis.field),)}
    space = SearchSpace(**always, floors=floors(settings, teacher), **optional, couplings=couplings_of(teacher), given=given_widths(settings))
    check_space(space, teacher)
    return space


def serving_of(settings: Settings) -> Serving | None:
    """Device and load of the throughput model; None where nobody named a device and the budget is no card's. Raises ValueError for one that is not known."""
    throughput, name = settings.throughput, serving_device(settings)
    if name is None and throughput.gb_per_second is None:
        return None
    rates = {"bytes_per_second": throughput.gb_per_second, "flops_per_second": throughput.tflops}
    scales = {"bytes_per_second": 1e9, "flops_per_second": 1e12}
    try:
        device = device_of(name or "device", **{name: value * scales[name] for name, value in rates.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"throughput.{error}") from None
    return Serving(device=device, input_tokens=throughput.input_tokens, output_tokens=throughput.output_tokens, batch=throughput.batch or 1)


def filters_of(settings: Settings) -> Filters:
    """The limits on candidates. Raises ValueError where they contradict each other."""
    search = settings.search
    if search.min_tokens_per_second is not None and settings.throughput.batch is None:
        raise ValueError(f"search.min_tokens_per_second is {search.min_tokens_per_second}; it needs throughput.batch, the sequences served at once")
    if search.min_tokens_per_second is not None and serving_of(settings) is None:
        raise ValueError(f"search.min_tokens_per_second is {search.min_tokens_per_second}; it needs throughput.device, the card whose speed is modelled")
    least, most = (None if gib is None else int(gib * GIB) for gib in (search.min_gib, search.max_gib))
    budget_bytes = NO_BUDGET if search.later_widths.given() else budget_of(settings).bytes
    return Filters(budget_bytes=budget_bytes, max_parameters=search.max_parameters, max_active_parameters=search.max_active_parameters, min_bytes=least,
                   max_bytes=most, min_tokens_per_second=search.min_tokens_per_second, serving=serving_of(settings))  # fmt: skip


def parameter_limits(settings: Settings) -> dict[str, tuple[int, Callable[[Architecture], int]]]:
    """The most parameters that a candidate may have, and what counts them, by the settings that say so."""
    limits = {"search.max_parameters": (settings.search.max_parameters, count_total_parameters),
              "search.max_active_parameters": (settings.search.max_active_parameters, count_active_parameters)}  # fmt: skip
    return {name: (most, count) for name, (most, count) in limits.items() if most is not None}


def check_search(settings: Settings, teacher: Architecture) -> None:
    """Refuse a space, budget or workload before any work is done. Raises ValueError."""
    space, workload, budget = space_of(settings, teacher), workload_of(settings), budget_of(settings)
    serving_of(settings), filters_of(settings)
    check_protected_experts(settings, teacher)
    if settings.search.fixed.given():
        depth = fixed_sizes(settings, teacher).get("num_layers", teacher.num_layers)
        if not 1 <= depth <= teacher.num_layers:
            raise ValueError(f"search.fixed.layers ({depth}) must be at least 1 and at most the teacher's {teacher.num_layers}")
        fixed_student(settings, teacher)
        return
    # Any layers that the floors allow do for a lower bound: the depth's true pattern is not known before scoring.
    sizes = {name: options[0] for name, options in space.sizes(teacher).items()}
    name = identifier(teacher, {"num_layers": space.num_layers[0], **sizes})

    def smallest(weigh: Callable[[Architecture], int], **later: int) -> Architecture:
        narrow, kinds = replace(teacher, **sizes | later), teacher.layer_kinds
        dearest = sorted(range(teacher.num_layers), key=lambda layer: -weigh(replace(narrow, pattern=kinds[layer])))
        return replace(narrow, pattern=spelled(teacher, kept_layers(kinds, dearest, space.num_layers[0], space.floors)))

    lightest = smallest(lambda one: memory_report(one, workload).total, **settings.search.later_widths.given())
    needed = memory_report(lightest, workload).total
    if needed > budget.bytes:
        raise ValueError(
            f"budget of {format_gib(budget.bytes)} fits none of the {space.size:,} candidates; the smallest, {name}, "
            f"needs at least {format_gib(needed)}; {advice(lightest, space, workload)}"
        )
    for setting, (most, count) in parameter_limits(settings).items():
        if (least := count(smallest(count))) > most:
            raise ValueError(f"{setting} ({most:,}) lets none of the {space.size:,} candidates pass; the smallest, {name}, has at least {least:,}")


def check_protected_experts(settings: Settings, teacher: Architecture) -> None:
    """Refuse experts to protect that are more than would stay of a layer, or of a routing group, or that there are not. Raises ValueError."""
    protected, groups = protected_experts(settings, teacher), teacher.moe_groups
    fixed = fixed_sizes(settings, teacher) if settings.search.fixed.given() else {"moe_num_experts": axis_of(settings, "experts", teacher)[0]}
    fewest, of_group = fixed.get("moe_num_experts", teacher.moe_num_experts), teacher.moe_num_experts // groups
    for sublayer, experts in protected.items():
        if max(Counter(expert // of_group for expert in experts).values()) > fewest // groups:
            within = f" of {groups} routing groups, {fewest // groups} of each" if groups > 1 else ""
            layer = sublayer // teacher.sublayers_per_layer
            raise ValueError(f"search.protect_experts has {experts} of layer {layer}; search.experts leaves {fewest} experts in a layer{within}, so no more "
                             "can be protected")  # fmt: skip


def fixed_student(settings: Settings, teacher: Architecture) -> Architecture:
    """The architecture of `search.fixed`. Raises ValueError where it is no cut of the teacher."""
    student = replace(teacher, **{name: value for name, value in fixed_sizes(settings, teacher).items() if name != "num_layers"})
    try:
        check_architecture(student)
    except ValueError as error:
        raise ValueError(f"search.fixed: {error}") from None
    check_is_cut(teacher, student, subsequence_layers(teacher.layer_kinds, student.layer_kinds), couplings_of(teacher))
    return student
