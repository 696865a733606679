"""search: every architecture that fits the budget, a diversified shortlist, its zero-shot losses, and the choice."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from memory_budget.architecture import Architecture, check_architecture
from memory_budget.budget import PRESETS, Budget
from memory_budget.calculator import memory_report
from memory_budget.units import format_gib
from memory_budget.workload import Workload
from minitron.pipeline import StageContext, axis_of, floors, scores_of
from minitron.settings import Settings, Shortlist
from minitron.stages.layer_order import order_and_damage
from minitron.store import write_json
from minitron.teachers import teacher_architecture
from nas.candidates import Candidates, enumerate_candidates, filter_fitting
from nas.depth import kept_layers
from nas.shortlist import diversified, largest
from nas.space import SearchSpace, check_space

CANDIDATES_CSV, SHORTLIST_JSONL = "candidates.csv", "shortlist.jsonl"


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
    options = {axis: axis_of(settings, axis, teacher) for axis in ("layers", "hidden", "ffn", "mamba_heads")}
    space = SearchSpace(options["layers"], options["hidden"], options["ffn"], options["mamba_heads"], floors(settings))
    check_space(space, teacher)
    return space


def check_search(settings: Settings, teacher: Architecture) -> None:
    """Refuse a space, budget or workload before any work is done. Raises ValueError."""
    space = space_of(settings, teacher)
    workload, budget = workload_of(settings), budget_of(settings)
    if settings.search.fixed.given():
        fixed_student(settings, teacher)
        return
    # Any layers that the floors allow do for a lower bound: the depth's true pattern is not known before scoring.
    cheapest = sorted(range(teacher.num_layers), key=lambda layer: -memory_report(replace(teacher, pattern=teacher.pattern[layer]), workload).total)
    layers = kept_layers(teacher.pattern, cheapest, space.num_layers[0], space.floors)
    smallest = SearchSpace((len(layers),), space.hidden[:1], space.ffn[:1], space.mamba_num_heads[:1], space.floors)
    bound = enumerate_candidates(teacher, smallest, {len(layers): layers}, workload)
    if bound.total_bytes[0] > budget.bytes:
        raise ValueError(
            f"budget of {format_gib(budget.bytes)} fits none of the {space.size:,} candidates; the smallest, {bound.identifier(0)}, "
            f"needs at least {format_gib(int(bound.total_bytes[0]))}"
        )


def fixed_student(settings: Settings, teacher: Architecture) -> Architecture:
    """The architecture of `search.fixed`. Raises ValueError where it is no cut of the teacher."""
    from minitron.pruning.plan import check_is_cut, subsequence_layers

    student = replace(teacher, **settings.search.fixed.given())
    check_architecture(student)
    check_is_cut(teacher, student, subsequence_layers(teacher.pattern, student.pattern))
    return student


def run(context: StageContext) -> dict:
    """Writes candidates.csv (all that fit) and shortlist.jsonl (those measured, the chosen one marked)."""
    settings = context.settings
    teacher, workload, budget = teacher_architecture(settings), workload_of(settings), budget_of(settings)
    order, damage = order_and_damage(context, teacher)
    if settings.search.fixed.given():
        candidates, rows, looked_at = _fixed_candidate(settings, teacher, order, workload), [0], 1
    else:
        space = space_of(settings, teacher)
        layers = _layers_by_depth(context, teacher, order, space)
        everything = enumerate_candidates(teacher, replace(space, num_layers=tuple(layers)), layers, workload)
        candidates, looked_at = filter_fitting(everything, budget.bytes), len(everything)
        rows = _shortlist(context, candidates, damage)
    _write_csv(context.folder / CANDIDATES_CSV, candidates)
    losses = _zero_shot_losses(context, candidates, rows)
    chosen = _choose(candidates, rows, losses)
    entries = [_entry(candidates, row, losses.get(row), row == chosen, workload) for row in rows]
    (context.folder / SHORTLIST_JSONL).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    picked = next(entry for entry in entries if entry["chosen"])
    write_json(context.folder / "chosen.json", picked)
    if settings.search.fixed.given():
        why = "given by search.fixed"
    elif len(rows) == 1:
        why = "the only one on the shortlist"
    else:
        why = f"zero-shot loss {picked['zero_shot_loss']:.2f} nats/token" if losses else "the largest; no weights to measure"
    size = picked["memory_bytes"]["total"]
    headline = (
        f"{len(candidates):,} of {looked_at:,} architectures fit {format_gib(budget.bytes)}; chosen {picked['id']}, "
        f"{picked['parameters']:,} parameters, {format_gib(size)} ({why})"
    )
    return {"headline": headline, "num_candidates": looked_at, "num_fitting": len(candidates), "chosen": picked, "shortlist": entries}


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

    student = fixed_student(settings, teacher)
    layers = subsequence_layers(teacher.pattern, student.pattern, {layer: rank for rank, layer in enumerate(order)})
    space = SearchSpace((len(layers),), (student.hidden,), (student.ffn,), (student.mamba_num_heads,), {})
    return enumerate_candidates(teacher, space, {len(layers): layers}, workload)


def _shortlist(context: StageContext, candidates: Candidates, damage: list[float]) -> list[int]:
    search = context.settings.search
    if search.shortlist is Shortlist.largest:
        return largest(candidates, search.shortlist_size)
    if "score" not in context.inputs:  # nothing measured: what a candidate keeps of the teacher's parameters
        return diversified(candidates, candidates.parameters / candidates.parameters.max(), search.shortlist_size)
    from minitron.screening import retained_importance

    scores = scores_of(context.inputs["score"], context.settings)
    return diversified(candidates, retained_importance(candidates, scores, damage), search.shortlist_size)


def _zero_shot_losses(context: StageContext, candidates: Candidates, rows: list[int]) -> dict[int, float]:
    """Held-out loss of every shortlisted candidate; none without weights, or where there is nothing to choose."""
    if "score" not in context.inputs or len(rows) == 1:
        return {}
    from minitron.stages.screen import open_screen

    screen = open_screen(context)
    with context.console.track("screening", len(rows), "candidates") as advance:
        losses = {}
        for row in rows:
            depth = int(candidates.num_layers[row])
            losses[row] = screen.zero_shot_loss(candidates.architecture(row), candidates.kept_layers[depth])
            advance(1, f"{candidates.identifier(row)} {losses[row]:.2f} nats/token")
    return losses


def _choose(candidates: Candidates, rows: list[int], losses: dict[int, float]) -> int:
    finite = {row: loss for row, loss in losses.items() if np.isfinite(loss)}
    if finite:
        return min(finite, key=finite.get)
    return max(rows, key=lambda row: candidates.parameters[row])


def _entry(candidates: Candidates, row: int, loss: float | None, chosen: bool, workload: Workload) -> dict:
    architecture = candidates.architecture(row)
    return {
        "id": candidates.identifier(row),
        "architecture": asdict(architecture),
        "parameters": int(candidates.parameters[row]),
        "memory_bytes": memory_report(architecture, workload).as_dict(),
        "kept_layers": list(candidates.kept_layers[int(candidates.num_layers[row])]),
        "zero_shot_loss": loss,
        "short_distill_loss": None,
        "tokens_per_second": None,
        "chosen": chosen,
    }


def _write_csv(path: Path, candidates: Candidates) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        columns = ("num_layers", "hidden", "ffn", "mamba_num_heads", "parameters", "total_bytes")
        writer.writerow(("id", *columns, "pattern"))
        patterns = {depth: "".join(candidates.teacher.pattern[layer] for layer in layers) for depth, layers in candidates.kept_layers.items()}
        for row in range(len(candidates)):
            values = [int(getattr(candidates, name)[row]) for name in columns]
            writer.writerow((candidates.identifier(row), *values, patterns[values[0]]))
