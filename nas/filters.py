"""What a candidate must keep to, and what to say where none does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from memory_budget.architecture import Architecture, least_experts
from memory_budget.calculator import memory_report
from memory_budget.units import format_count, format_gib
from memory_budget.workload import Workload
from nas.axes import AXES, WIDTHS, usual_step
from nas.couplings import Coupling, completed, following
from nas.space import SearchSpace
from nas.throughput import Serving

USUAL_STEPS = {"hidden": 128, "ffn": 64}  # for an axis with one option; heads go one per group


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Limits on a candidate; None is no limit.

    budget_bytes, max_bytes: most bytes in all under the workload · min_bytes: least · max_parameters: most parameters · max_active_parameters: most that one
    token passes through (memory_budget.parameters: embeddings and head whole, of the routed experts those it is sent to) ·
    min_tokens_per_second: least modelled throughput, of `serving` (nas.throughput), which it needs.
    Raises ValueError for limits that contradict each other.
    """

    budget_bytes: int
    max_parameters: int | None = None
    max_active_parameters: int | None = None
    min_bytes: int | None = None
    max_bytes: int | None = None
    min_tokens_per_second: float | None = None
    serving: Serving | None = None

    def __post_init__(self) -> None:
        if self.min_tokens_per_second is not None and self.serving is None:
            raise ValueError(f"search.min_tokens_per_second ({self.min_tokens_per_second}) needs a device to model; none is given")
        most = self.most_bytes
        if self.min_bytes is not None and self.min_bytes > most:
            raise ValueError(f"search.min_gib ({format_gib(self.min_bytes)}) must be at most the budget and search.max_gib, {format_gib(most)}")

    @property
    def most_bytes(self) -> int:
        """The lower of budget and max_bytes."""
        return self.budget_bytes if self.max_bytes is None else min(self.budget_bytes, self.max_bytes)

    def of_sizes(self, parameters: np.ndarray, total_bytes: np.ndarray, active_parameters: Callable[[], np.ndarray]) -> dict[str, np.ndarray]:
        """Mask of who passes, per limit on bytes and parameters that is set, by the limit's name for people. Active parameters are counted where one is on
        them."""
        passes = {f"budget of {format_gib(self.budget_bytes)}": total_bytes <= self.budget_bytes}
        if self.max_bytes is not None:
            passes[f"search.max_gib of {format_gib(self.max_bytes)}"] = total_bytes <= self.max_bytes
        if self.min_bytes is not None:
            passes[f"search.min_gib of {format_gib(self.min_bytes)}"] = total_bytes >= self.min_bytes
        if self.max_parameters is not None:
            passes[f"search.max_parameters of {self.max_parameters:,}"] = parameters <= self.max_parameters
        if self.max_active_parameters is not None:
            passes[f"search.max_active_parameters of {self.max_active_parameters:,}"] = active_parameters() <= self.max_active_parameters
        return passes


def advice(smallest: Architecture, space: SearchSpace, workload: Workload) -> str:
    """Which axis to lower below the smallest candidate to save most, and what one step of each saves; "" where none can go lower."""
    savings = sorted(step_savings(smallest, space, workload).items(), key=lambda item: -item[1][1])
    if not savings:
        return ""
    (setting, (step, saved)), *others = savings
    best = f"lowering search.{setting} helps most: each step of {step} saves {format_gib(saved)}"
    return best + "".join(f"; search.{setting}, by {step}: {format_gib(saved)}" for setting, (step, saved) in others)


def step_savings(smallest: Architecture, space: SearchSpace, workload: Workload) -> dict[str, tuple[int, int]]:
    """For every axis that could go lower: its setting → (one further step, the bytes that it saves).

    A step is the distance of the two lowest options. For depth it is the most that the step can save within the floors, since
    which layers go is the layer order's matter. Channels and attention heads are left out unless the space cuts them; so is what follows from others, which
    goes with them.
    """
    total, follows = memory_report(smallest, workload).total, space.follows
    lower = {}
    for name, setting in WIDTHS.items():
        options, value = getattr(space, name), getattr(smallest, name)
        if options is None or name in follows or (step := _width_step(name, options, smallest, space.couplings)) >= value:
            continue
        if name == "moe_num_experts" and value - step < least_experts(smallest):
            continue
        along = following(space.couplings, {*space.given, name})
        narrower = completed(replace(smallest, **{name: value - step}), smallest, along)
        if all(getattr(narrower, field) for field in along):
            lower[setting] = step, narrower
    step = space.num_layers[1] - space.num_layers[0] if len(space.num_layers) > 1 else 1
    if shallower := _shallower(smallest, step, space.floors, workload):
        lower["layers"] = step, replace(smallest, pattern=shallower)
    savings = {setting: (step, total - memory_report(architecture, workload).total) for setting, (step, architecture) in lower.items()}
    return {setting: (step, saved) for setting, (step, saved) in savings.items() if saved > 0}


def nothing_passes(removed: Mapping[str, int], smallest: Architecture, name: str, *, workload: Workload, space: SearchSpace, filters: Filters) -> str:
    """The line for a search that no candidate passes: how many each limit removed of those before it, the smallest, what would help."""
    said = [f"{limit} removed {number:,}" for limit, number in removed.items() if number]
    needed = memory_report(smallest, workload).total
    text = f"none of the {format_count(sum(removed.values()), 'candidates')} passes: {', '.join(said)}; the smallest, {name}, needs {format_gib(needed)}"
    helps = advice(smallest, space, workload) if needed > filters.most_bytes else ""
    return f"{text}; {helps}" if helps else text


def _width_step(name: str, options: tuple[int, ...], architecture: Architecture, couplings: Sequence[Coupling]) -> int:
    if len(options) > 1:
        return options[1] - options[0]
    if any(name in coupling.fields and coupling.unit(name, architecture) > 1 for coupling in couplings):
        return usual_step(AXES[WIDTHS[name]], architecture, couplings)
    per_group = {"mamba_num_heads": architecture.mamba_num_groups, "num_attention_heads": architecture.num_key_value_heads}
    of_experts = {axis.field: axis.step(architecture) for axis in AXES.values() if axis.kind == "E"}
    return {**USUAL_STEPS, **per_group, **of_experts}.get(name, 1)


def _shallower(architecture: Architecture, num_removed: int, floors: Mapping[str, int], workload: Workload) -> str:
    """The pattern without so many layers, each time one of the kind that saves most; "" where the floors forbid it."""
    pattern = architecture.pattern
    for _ in range(num_removed):
        kinds = set(replace(architecture, pattern=pattern).layer_kinds)
        shorter = [pattern.replace(kind, "", 1) for kind in kinds if pattern.count(kind) > floors.get(kind, 0)]
        if len(pattern) <= architecture.sublayers_per_layer or not shorter:
            return ""
        pattern = min(shorter, key=lambda left: memory_report(replace(architecture, pattern=left), workload).total)
    return pattern
