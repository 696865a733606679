"""shortlist: every architecture that passes the filters, a diversified few of them, and their zero-shot losses."""

import csv
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from memory_budget.architecture import Architecture, check_architecture
from memory_budget.budget import PRESETS, Budget
from memory_budget.calculator import memory_report
from memory_budget.units import GIB, format_gib
from memory_budget.workload import Workload
from minitron.search.layer_order import order_and_damage
from minitron.settings.derived import axis_of, fixed_sizes, floors, ranks_refitted, ranks_rotated
from minitron.settings.run import Settings
from minitron.settings.search import Shortlist
from minitron.settings.teachers import base_architecture
from minitron.walk.models import scores_of
from minitron.walk.pipeline import StageContext
from nas.candidates import Candidates, enumerate_candidates, enumerate_fitting
from nas.depth import kept_layers
from nas.filters import Filters, advice
from nas.shortlist import diversified, largest
from nas.space import SearchSpace, check_space
from nas.throughput import Serving, device_of, largest_batch, tokens_per_second

CANDIDATES_CSV = "candidates.csv"
NO_BUDGET = 2**62


def workload_of(settings: Settings) -> Workload:
    return Workload(**asdict(settings.workload))


def budget_of(settings: Settings) -> Budget:
    """The budget of the settings: a preset by name, or the device's own numbers when device_gib is given."""
    budget = settings.budget
    if budget.device_gib is None:
        if budget.name not in PRESETS:
            raise ValueError(f"budget.name is {budget.name!r}; without budget.device_gib it must be one of {', '.join(PRESETS)}")
        return PRESETS[budget.name]
    return Budget(budget.name, budget.device_gib, budget.cushion_fraction, budget.set_aside_gib)


def space_of(settings: Settings, teacher: Architecture) -> SearchSpace:
    """The options of every axis. Raises ValueError for options no student can have."""
    axes = ("layers", "hidden", "ffn", "mamba_heads", "mamba_channels", "attention_heads")
    layers, hidden, ffn, heads, channels, attention_heads = (axis_of(settings, axis, teacher) for axis in axes)
    optional = ((channels, teacher.mamba_head_dim), (attention_heads, teacher.num_attention_heads))
    space = SearchSpace(layers, hidden, ffn, heads, floors(settings), *(None if options == (value,) else options for options, value in optional))
    check_space(space, teacher)
    return space


def serving_of(settings: Settings) -> Serving:
    """Device and load of the throughput model. Raises ValueError for a device that is not known."""
    throughput = settings.throughput
    rates = {"bytes_per_second": throughput.gb_per_second, "flops_per_second": throughput.tflops}
    scales = {"bytes_per_second": 1e9, "flops_per_second": 1e12}
    try:
        device = device_of(throughput.device, **{name: value * scales[name] for name, value in rates.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"throughput.{error}") from None
    return Serving(device=device, input_tokens=throughput.input_tokens, output_tokens=throughput.output_tokens, batch=throughput.batch or 1)


def filters_of(settings: Settings) -> Filters:
    """The limits on candidates. Raises ValueError where they contradict each other."""
    search = settings.search
    if search.min_tokens_per_second is not None and settings.throughput.batch is None:
        raise ValueError(f"search.min_tokens_per_second is {search.min_tokens_per_second}; it needs throughput.batch, the sequences served at once")
    least, most = (None if gib is None else int(gib * GIB) for gib in (search.min_gib, search.max_gib))
    budget_bytes = NO_BUDGET if search.later_widths.given() else budget_of(settings).bytes
    return Filters(budget_bytes=budget_bytes, max_parameters=search.max_parameters, min_bytes=least, max_bytes=most,
                   min_tokens_per_second=search.min_tokens_per_second, serving=serving_of(settings))  # fmt: skip


def check_search(settings: Settings, teacher: Architecture) -> None:
    """Refuse a space, budget or workload before any work is done. Raises ValueError."""
    space, workload, budget = space_of(settings, teacher), workload_of(settings), budget_of(settings)
    serving_of(settings), filters_of(settings)
    if settings.search.fixed.given():
        fixed = fixed_sizes(settings, teacher)
        if "pattern" in fixed or "num_layers" not in fixed:
            fixed_student(settings, teacher)
        return
    # Any layers that the floors allow do for a lower bound: the depth's true pattern is not known before scoring.
    cheapest = sorted(range(teacher.num_layers), key=lambda layer: -memory_report(replace(teacher, pattern=teacher.pattern[layer]), workload).total)
    layers = kept_layers(teacher.pattern, cheapest, space.num_layers[0], space.floors)
    widths = {name: options[:1] for name, options in space.widths(teacher).items()}
    bound = enumerate_candidates(teacher, replace(space, num_layers=(len(layers),), **widths), {len(layers): layers}, workload)
    smallest = replace(bound.architecture(0), **settings.search.later_widths.given())
    needed = memory_report(smallest, workload).total
    if needed > budget.bytes:
        raise ValueError(
            f"budget of {format_gib(budget.bytes)} fits none of the {space.size:,} candidates; the smallest, {bound.identifier(0)}, "
            f"needs at least {format_gib(needed)}; {advice(smallest, space, workload)}"
        )


def fixed_student(settings: Settings, teacher: Architecture) -> Architecture:
    """The architecture of `search.fixed`. Raises ValueError where it is no cut of the teacher."""
    from minitron.pruning.plan import check_is_cut, subsequence_layers

    student = replace(teacher, **{name: value for name, value in fixed_sizes(settings, teacher).items() if name != "num_layers"})
    check_architecture(student)
    check_is_cut(teacher, student, subsequence_layers(teacher.pattern, student.pattern))
    return student


def run(context: StageContext) -> dict:
    """Writes candidates.csv (what passes the filters, at most search.listed rows); the shortlist is in the facts."""
    settings = context.settings
    teacher, workload, budget = base_architecture(settings), workload_of(settings), budget_of(settings)
    order, damage = order_and_damage(context, teacher)
    if settings.search.fixed.given():
        candidates, rows, looked_at = _fixed_candidate(settings, teacher, order, workload), [0], 1
    else:
        space = space_of(settings, teacher)
        layers = _layers_by_depth(context, teacher, order, space)
        candidates, looked_at = enumerate_fitting(teacher, replace(space, num_layers=tuple(layers)), layers, workload, filters_of(settings))
        candidates = _within_later_budget(settings, candidates, workload, budget)
        rows = _shortlist(context, candidates, damage)
    entries = {candidates.identifier(row): _entry(settings, candidates, row, workload, budget) for row in rows}
    _write_csv(context.folder / CANDIDATES_CSV, candidates, rows, settings.search.listed)
    best_first = list(entries)
    if "score" in context.inputs and len(rows) > 1:
        from minitron.search.zero_shot import measure_zero_shot

        measured = measure_zero_shot(context, entries)
        entries = {name: {**entry, **measured.means[name]} for name, entry in entries.items()}
        best_first = measured.best_first
    fitting = f"{len(candidates):,} of {looked_at:,} architectures fit {format_gib(budget.bytes)}"
    if settings.search.later_widths.given():
        fitting = f"{len(candidates):,} of {looked_at:,} depths leave room for widths that fit {format_gib(budget.bytes)}"
    best = entries[best_first[0]]["zero_shot_loss"]
    foretold = ", in the rotated basis" * ranks_rotated(settings) + ", refitted to its widths" * ranks_refitted(settings)
    zero_shot = "" if best is None else f", zero-shot {best:.2f} nats/token at best ({best_first[0]}{foretold})"
    headline = f"{fitting}; {len(rows)} on the shortlist{zero_shot}"
    return {"headline": headline, "num_candidates": looked_at, "num_fitting": len(candidates), "entries": entries, "best_first": best_first}


def _within_later_budget(settings: Settings, candidates: Candidates, workload: Workload, budget: Budget) -> Candidates:
    """Where widths are cut later: those candidates whose later, narrower selves fit. Raises ValueError where none does."""
    later = settings.search.later_widths.given()
    if not later:
        return candidates
    totals = np.array([memory_report(replace(candidates.architecture(row), **later), workload).total for row in range(len(candidates))])
    rows = np.flatnonzero(totals <= budget.bytes)
    if not len(rows):
        raise ValueError(f"budget of {format_gib(budget.bytes)} fits no depth; even with the smallest widths one needs {format_gib(int(totals.min()))}")
    return candidates.take(rows)


def _layers_by_depth(context: StageContext, teacher: Architecture, order: list[int], space: SearchSpace) -> dict[int, tuple[int, ...]]:
    """Which layers stay at every depth that the order reaches; the others are named and left out.

    Raises ValueError where it reaches none.
    """
    layers, unreached = {}, {}
    for depth in space.num_layers:
        try:
            layers[depth] = kept_layers(teacher.pattern, order, depth, space.floors)
        except ValueError as error:
            unreached[depth] = str(error)
    if not layers:
        raise ValueError(unreached[max(unreached)])
    if unreached:
        context.console.say(f"   search  left out, as the layer order and the floors do not reach them: {', '.join(map(str, unreached))} layers")
    return layers


def _fixed_candidate(settings: Settings, teacher: Architecture, order: list[int], workload: Workload) -> Candidates:
    """The one candidate of `search.fixed`; where its pattern can be cut in several ways, the layers removed first go."""
    from minitron.pruning.plan import subsequence_layers

    fixed = fixed_sizes(settings, teacher)
    student = fixed_student(settings, teacher)
    if "num_layers" in fixed:
        layers = kept_layers(teacher.pattern, order, fixed["num_layers"], floors(settings))
    else:
        layers = subsequence_layers(teacher.pattern, student.pattern, {layer: rank for rank, layer in enumerate(order)})
    widths = ((student.hidden,), (student.ffn,), (student.mamba_num_heads,), {}, (student.mamba_head_dim,), (student.num_attention_heads,))
    return enumerate_candidates(teacher, SearchSpace((len(layers),), *widths), {len(layers): layers}, workload)


def _shortlist(context: StageContext, candidates: Candidates, damage: list[float]) -> list[int]:
    search = context.settings.search
    if search.shortlist is Shortlist.largest:
        return largest(candidates, search.shortlist_size)
    if "score" not in context.inputs:  # nothing measured: what a candidate keeps of the teacher's parameters
        return diversified(candidates, candidates.parameters / candidates.parameters.max(), search.shortlist_size)
    from minitron.search.distances import retained_importance

    scores = scores_of(context.inputs["score"], context.settings)
    return diversified(candidates, retained_importance(candidates, scores, damage), search.shortlist_size)


def _entry(settings: Settings, candidates: Candidates, row: int, workload: Workload, budget: Budget) -> dict:
    """Everything known of a candidate before it is measured."""
    architecture, serving = candidates.architecture(row), serving_of(settings)
    batch = settings.throughput.batch or largest_batch(architecture, workload, serving, budget.bytes)
    return {
        "id": candidates.identifier(row),
        "architecture": asdict(architecture),
        "parameters": int(candidates.parameters[row]),
        "memory_bytes": memory_report(architecture, workload).as_dict(),
        "kept_layers": list(candidates.kept_layers[int(candidates.num_layers[row])]),
        "serving_batch": batch,
        "modelled_tokens_per_second": float(tokens_per_second(architecture, workload, serving, batch=batch)) if batch else None,
        "zero_shot_loss": None,
        "zero_shot_kl": None,
    }


def _write_csv(path: Path, candidates: Candidates, shortlisted: list[int], most: int) -> None:
    """Sizes and bytes of every candidate, the shortlisted first; the rest by size, largest first, up to `most` rows."""
    rest = np.argsort(-candidates.total_bytes, kind="stable")[: max(0, most - len(shortlisted)) + len(shortlisted)]
    rows = [*shortlisted, *(row for row in rest.tolist() if row not in set(shortlisted))][:most]
    columns = ("num_layers", "hidden", "ffn", "mamba_num_heads", "mamba_head_dim", "num_attention_heads", "parameters", "total_bytes")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", *columns, "total_gib", "pattern"))
        for row in rows:
            values = [int(getattr(candidates, name)[row]) for name in columns]
            writer.writerow((candidates.identifier(row), *values, f"{values[-1] / GIB:.6f}", candidates.pattern(values[0])))
