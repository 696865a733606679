"""Every architecture that passes the filters, a diversified few of them, and their zero-shot losses."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np

from memory_budget.architecture import Architecture, as_dict
from memory_budget.budget import Budget
from memory_budget.calculator import memory_report
from memory_budget.parameters import count_active_parameters
from memory_budget.units import GIB, format_gib
from memory_budget.workload import Workload
from minitron.importance.scores import scores_of
from minitron.search.layer_order import order_and_damage
from minitron.search.space import filters_of, fixed_student, serving_of, space_of
from minitron.settings.derived import budget_of, fixed_sizes, floors, ranks_refitted, ranks_rotated, workload_of
from minitron.settings.run import Settings
from minitron.settings.search import Shortlist
from minitron.settings.teachers import base_architecture
from minitron.walk.stage import StageContext
from nas.axes import AXES, WIDTHS
from nas.candidates import Candidates, enumerate_candidates, enumerate_fitting
from nas.depth import kept_layers, subsequence_layers
from nas.shortlist import diversified, largest
from nas.space import SearchSpace
from nas.throughput import largest_batch, tokens_per_second

CANDIDATES_CSV = "candidates.csv"


def make_shortlist(context: StageContext) -> dict:
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
    num_fitting = len(candidates)
    if settings.search.fixed.given() and not settings.search.later_widths.given():
        fitting, num_fitting = _of_fixed(next(iter(entries.values())), budget)
    elif settings.search.later_widths.given():
        fitting = f"{len(candidates):,} of {looked_at:,} depths leave room for widths that fit {format_gib(budget.bytes)}"
    best = entries[best_first[0]]["zero_shot_loss"]
    foretold = ", in the rotated basis" * ranks_rotated(settings) + ", refitted to its widths" * ranks_refitted(settings)
    zero_shot = "" if best is None else f", zero-shot {best:.2f} nats/token at best ({best_first[0]}{foretold})"
    listed = "" if settings.search.fixed.given() else f"; {len(rows)} on the shortlist"
    headline = f"{fitting}{listed}{zero_shot}"
    return {"headline": headline, "num_candidates": looked_at, "num_fitting": num_fitting, "entries": entries, "best_first": best_first}


def _of_fixed(entry: dict, budget: Budget) -> tuple[str, int]:
    """What to say of the one architecture that was asked for, fitting or not, and how many fit."""
    needed = entry["memory_bytes"]["total"]
    spare = budget.bytes - needed
    verdict = f"fits with {format_gib(spare)} to spare" if spare >= 0 else f"does not fit: {format_gib(-spare)} too much"
    return f"{entry['id']}, given by search.fixed, takes {format_gib(needed)} of {format_gib(budget.bytes)} and {verdict}", int(needed <= budget.bytes)


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
            layers[depth] = kept_layers(teacher.layer_kinds, order, depth, space.floors)
        except ValueError as error:
            unreached[depth] = str(error)
    if not layers:
        raise ValueError(unreached[max(unreached)])
    if unreached:
        context.console.say(f"   search  left out, as the layer order and the floors do not reach them: {', '.join(map(str, unreached))} layers")
    return layers


def _fixed_candidate(settings: Settings, teacher: Architecture, order: list[int], workload: Workload) -> Candidates:
    """The one candidate of `search.fixed`; where its pattern can be cut in several ways, the layers removed first go."""
    fixed = fixed_sizes(settings, teacher)
    student = fixed_student(settings, teacher)
    if "num_layers" in fixed:
        layers = kept_layers(teacher.layer_kinds, order, fixed["num_layers"], floors(settings, teacher))
    else:
        layers = subsequence_layers(teacher.layer_kinds, student.layer_kinds, {layer: rank for rank, layer in enumerate(order)})
    widths = {name: (getattr(student, name),) for name in WIDTHS}
    return enumerate_candidates(teacher, SearchSpace((len(layers),), floors={}, **widths), {len(layers): layers}, workload)


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
    batch = settings.throughput.batch or largest_batch(architecture, workload, serving, budget.bytes) if serving else None
    return {
        "id": candidates.identifier(row),
        "architecture": as_dict(architecture),
        "parameters": int(candidates.parameters[row]),
        **({"active_parameters": count_active_parameters(architecture)} if "E" in candidates.teacher.pattern else {}),
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
    has_experts = "E" in candidates.teacher.pattern
    columns = ("num_layers", *(field for field, axis in WIDTHS.items() if has_experts or AXES[axis].kind != "E"), "parameters", "total_bytes")
    active = candidates.active_parameters() if has_experts else ()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", *columns, "total_gib", "pattern", *(["active_parameters"] if has_experts else [])))
        for row in rows:
            values = [int(getattr(candidates, name)[row]) for name in columns]
            writer.writerow((candidates.identifier(row), *values, f"{values[-1] / GIB:.6f}", candidates.pattern(values[0]), *active[row : row + 1]))
