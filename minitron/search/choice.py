"""Everything that was measured of the candidates in one table, the Pareto front, and the choice with its reason."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memory_budget.architecture import Architecture
from memory_budget.units import format_gib
from minitron.families.known import FAMILIES
from minitron.families.row_lengths import row_notes
from minitron.settings.search import Select
from minitron.walk.stage import StageContext
from minitron.walk.store import FORMAT, find_result, write_json
from minitron.walk.tracking import record_search
from nas.exchange import write_export_config
from nas.pareto import pareto_front
from nas.select import Choice, loss_within, lowest_loss, weighted

CANDIDATES_JSONL, CANDIDATES_CSV, EXPORT_CONFIG = "candidates.jsonl", "candidates.csv", "export_config.json"
MEASUREMENTS = ("zero_shot_loss", "zero_shot_kl", "short_distill_loss", "tokens_per_second", "speed_alone", "modelled_tokens_per_second", "serving_batch")


def choose_candidate(context: StageContext, rule: Mapping[str, Any]) -> dict:
    """Writes candidates.jsonl and candidates.csv with every measurement, and chosen.json and export_config.json of the choice.

    `rule` is the settings that choose, as the key has them. A choice that further screens have changed is said on the console.
    """
    shortlist = context.inputs["shortlist"]
    screens = {result.facts["id"]: result.facts for label, result in context.inputs.items() if label.startswith("screen ")}
    blank = {"short_distill_loss": None, "tokens_per_second": None, "speed_alone": None}
    entries = [{**entry, **blank, **screens.get(name, {})} for name, entry in shortlist.facts["entries"].items()]
    choice = choose(context, entries, distilled=bool(screens))
    front = _front(entries)
    entries = [{**entry, "on_pareto_front": on_front, "chosen": row == choice.row} for row, (entry, on_front) in enumerate(zip(entries, front, strict=True))]
    if not context.settings.search.later_widths.given():  # else the widths are not the student's yet
        entries = [{**entry, "row_notes": _row_notes(entry)} for entry in entries]
    chosen = entries[choice.row]
    if chosen.get("row_notes"):
        context.console.say(f"           to note of {chosen['id']}: {'; '.join(chosen['row_notes'].values())}")
    (context.folder / CANDIDATES_JSONL).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    _write_csv(context.folder / CANDIDATES_CSV, shortlist.folder / CANDIDATES_CSV, entries)
    write_json(context.folder / "chosen.json", chosen)
    write_export_config(context.folder / EXPORT_CONFIG, Architecture(**chosen["architecture"]))
    record_search(context.settings, entries)
    before, since = chosen_before(context, rule) or (chosen["id"], [])
    if before != chosen["id"]:
        context.console.say(f"   search  chosen anew: {chosen['id']} in place of {before}, since {', '.join(since)} {'was' if len(since) == 1 else 'were'} "
                            "screened too; the cut and what follows from it are its own")  # fmt: skip
    size = format_gib(chosen["memory_bytes"]["total"])
    headline = f"chosen of {len(entries)}: {chosen['id']}, {chosen['parameters']:,} parameters, {size} ({choice.reason})"
    return {"headline": headline, "num_candidates": shortlist.facts["num_candidates"], "num_fitting": shortlist.facts["num_fitting"],
            "chosen": chosen, "reason": choice.reason, "shortlist": entries}  # fmt: skip


def chosen_before(context: StageContext, rule: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """What was chosen last by this rule of this shortlist, when there were fewer screens, and the candidates screened since; None for the first time."""
    shortlist, screens = context.inputs["shortlist"].identity, {label for label in context.inputs if label.startswith("screen ")}
    found = [find_result(folder) for folder in context.folder.parent.iterdir() if folder.is_dir() and folder != context.folder]
    earlier = [one for one in found if one and one.record.get("format") == FORMAT and one.record["settings"] == rule
               and one.record["inputs"]["shortlist"] == shortlist and set(one.record["inputs"]) - {"shortlist"} < screens]  # fmt: skip
    if not earlier:
        return None
    last = max(earlier, key=lambda one: one.record["finished"])
    return last.facts["chosen"]["id"], sorted(label.removeprefix("screen ") for label in screens - set(last.record["inputs"]))


def _row_notes(entry: dict) -> dict[str, str]:
    architecture = Architecture(**entry["architecture"])
    return row_notes(FAMILIES[architecture.model_type], architecture)


def choose(context: StageContext, entries: list[dict], *, distilled: bool) -> Choice:
    """By the rule of the settings among those measured furthest; without measurements the largest."""
    search = context.settings.search
    if len(entries) == 1:
        return Choice(0, "given by search.fixed" if search.fixed.given() else "the only one on the shortlist")
    if all(entry["zero_shot_loss"] is None for entry in entries):
        return Choice(max(range(len(entries)), key=lambda row: entries[row]["parameters"]), "the largest; no weights to measure")
    rung = "short_distill_loss" if distilled else "zero_shot_loss"
    losses = np.array([math.nan if entry[rung] is None else entry[rung] for entry in entries])
    memory = np.array([entry["memory_bytes"]["total"] for entry in entries], dtype=float)
    speed = np.array([entry["modelled_tokens_per_second"] or 0.0 for entry in entries])
    if search.select is Select.lowest_loss:
        choice = lowest_loss(losses, memory, [entry["id"] for entry in entries], noise=search.noise)
    elif search.select is Select.loss_within:
        choice = loss_within(losses, memory, speed, within=search.loss_within)
    else:
        weights = {"loss": 0.0, "memory": 0.0, "throughput": 0.0, **search.weights}
        choice = weighted(losses, memory, speed, weights=tuple(weights.values()))
    return Choice(choice.row, f"{choice.reason}, {'after a short distillation' if distilled else 'zero-shot'}")


def _front(entries: list[dict]) -> list[bool]:
    """Who is on the Pareto front of loss, memory and modelled throughput, among those of the highest rung."""
    distilled = any(entry["short_distill_loss"] is not None for entry in entries)

    def costs(entry: dict) -> tuple[float, float, float]:
        loss = entry["short_distill_loss"] if distilled else entry["zero_shot_loss"]
        return (math.nan if loss is None else loss, entry["memory_bytes"]["total"], -(entry["modelled_tokens_per_second"] or 0.0))

    return pareto_front(np.array([costs(entry) for entry in entries])).tolist()


def _write_csv(path: Path, fitting: Path, entries: list[dict]) -> None:
    """The shortlist stage's table of all that fit, with the measurements of those that have them."""
    measured = {entry["id"]: entry for entry in entries}
    with fitting.open(newline="") as source, path.open("w", newline="") as target:
        reader, writer = csv.reader(source), csv.writer(target)
        writer.writerow((*next(reader), *MEASUREMENTS, "on_pareto_front", "chosen"))
        for row in reader:
            entry = measured.get(row[0], {})
            writer.writerow((*row, *("" if entry.get(name) is None else entry[name] for name in (*MEASUREMENTS, "on_pareto_front", "chosen"))))
