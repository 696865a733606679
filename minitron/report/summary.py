"""summary.json: what a run did, in the form others rely on. The report shows nothing that is not in it."""

import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from memory_budget.architecture import BLOCK, MAMBA_BLOCK, MAMBA_MOE_BLOCK, MOE_BLOCK, WINDOWED_BLOCK, WINDOWED_MOE_BLOCK, Architecture, as_dict
from memory_budget.calculator import memory_report
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_active_parameters, count_total_parameters
from minitron.settings.derived import budget_of, workload_of
from minitron.settings.run import Settings
from minitron.settings.teachers import base_architecture, teacher_architecture
from minitron.walk.stage import Lap
from minitron.walk.store import Result

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "hydra-core", "wandb", "numpy")
MODEL_STAGES = {"teacher": "teacher", "pruned": "prune", "student": "distill"}
# Named again here: the stages that write these files import torch, which a summary does without.
LAYERS_FILE, METRICS_FILE = "layers.json", "metrics.jsonl"
SEARCH_FILES = ("candidates.csv", "candidates.jsonl", "export_config.json")
MOST_CURVE_POINTS = 200
DATA_FACTS = ("source", "vocab", *(f"{split}_{what}" for split in ("train", "heldout") for what in ("documents", "tokens", "rows")))
MORE_ROWS = ("phase_rows", "whole_rows")  # stages that make rows beside the data stage's
DISTILL_FACTS = ("tokens", "steps", "seconds", "final_kl_nats_per_token", "expert_load")  # the last of a mixture of experts
# Of summary["recovery"] and ["against_slice"] (the plain slice as cut and as distilled); those of earlier versions do not have differences.
RECOVERY_FACTS, SLICE_FACTS = ("lost_nats_per_token", "recovered_share", "differences"), ("models", "difference", "tokens", "learning_rate")
REASONERS = {"teacher": "teacher", "student": "student", "student_whole": "student of whole traces alone"}  # of summary["reasoning"]
OF_WIDTHS = ("width_curves", "experts")  # of summary["importance"], what the last of two laps says
RUNGS = ("short_distill_loss", "zero_shot_loss")  # the highest first
KIND_NAMES = {"M": "Mamba-2", "*": "attention", "-": "FFN", "E": "experts", BLOCK: "attention + FFN", WINDOWED_BLOCK: "attention within a window + FFN",
              MOE_BLOCK: "attention + experts", WINDOWED_MOE_BLOCK: "attention within a window + experts", MAMBA_BLOCK: "Mamba-2 + FFN",
              MAMBA_MOE_BLOCK: "Mamba-2 + experts"}  # of layers, by their letters  # fmt: skip


def build_summary(laps: Sequence[Lap]) -> dict[str, Any]:
    """The summary of the stages that are done; parts whose stage did not run are empty or absent.

    Of two laps the last is the run's; what the first one did is under "depth_lap". removed_layers are the teacher's, or those
    of "base" where a checkpoint was given (base.path) that is cut in its stead.
    """
    settings, results = laps[-1].settings, laps[-1].results
    budget, workload = budget_of(settings), workload_of(settings)
    summary = {
        "run_name": settings.run_name,
        "command": shlex.join(["python", "-m", "minitron.run", *sys.argv[1:]]),
        "versions": _versions(),
        "seed": settings.seed,
        "budget": {
            "name": budget.name,
            "bytes": budget.bytes,
            "device_gib": budget.device_gib,
            "cushion_fraction": budget.cushion_fraction,
            "set_aside_gib": budget.set_aside_gib,
            "workload": asdict(workload),
        },
        "throughput": asdict(settings.throughput),
        "base": _given_base(laps[0].settings),
        "data": _data(laps),
        "models": _models(settings, results, budget.bytes),
        "recovery": {name: results["evaluate"].facts[name] for name in RECOVERY_FACTS if name in results["evaluate"].facts} if "evaluate" in results else {},
        "reasoning": {name: results["reasoning"].facts[name] for name in ("problems", "curves")} if "reasoning" in results else {},
        "against_slice": _slice(results["against_slice"]) if "against_slice" in results else {},
        **_lap(laps[-1]),
        "depth_lap": _lap(laps[0]) if len(laps) > 1 else {},
    }
    if len(laps) > 1:  # which layers went, and what scoring said of layers, is the first lap's
        first = summary["depth_lap"]
        summary["removed_layers"] = first["removed_layers"]
        summary["importance"] = first["importance"] | {name: value for name, value in summary["importance"].items() if name in OF_WIDTHS}
    return summary


def _slice(result: Result) -> dict[str, Any]:
    return {name: result.facts[name] for name in SLICE_FACTS if name in result.facts}


def _lap(lap: Lap) -> dict[str, Any]:
    """What one walk through the stages did."""
    results, later = lap.results, lap.settings.search.later_widths.given()
    search, prune, distill = results.get("search"), results.get("prune"), results.get("distill")
    return {
        "stages": {name: _stage(result, lap.cached[name]) for name, result in results.items()},
        "candidates": search.facts["shortlist"] if search else _unchosen(results),
        "search": {name: search.facts[name] for name in ("num_candidates", "num_fitting", "reason")} | {"later_widths": later} if search else {},
        "removed_layers": prune.facts["removed_layers"] if prune else [],
        "distillation": {name: distill.facts[name] for name in DISTILL_FACTS if name in distill.facts} if distill else {},
        "importance": _importance(results["score"], _teacher(lap.settings, results)[1]) if "score" in results else {},
        "curves": _curves(results),
        "more_rows": {name: list(results[name].facts.get("rows", {}).values()) for name in MORE_ROWS if name in results},
    }


def _data(laps: Sequence[Lap]) -> dict[str, Any]:
    """The data stage's headline numbers and its card, which both laps share; without a card where an earlier version has made the rows."""
    facts = next((lap.results["data"].facts for lap in reversed(laps) if "data" in lap.results), {})
    return {name: facts[name] for name in DATA_FACTS if name in facts} | facts.get("card", {})


def _unchosen(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """The shortlist before the search has chosen of it, with what was measured so far."""
    if "shortlist" not in results:
        return []
    screens = {result.facts["id"]: result.facts for label, result in results.items() if label.startswith("screen ")}
    blank = {"short_distill_loss": None, "tokens_per_second": None, "on_pareto_front": False, "chosen": False}
    return [{**entry, **blank, **screens.get(name, {})} for name, entry in results["shortlist"].facts["entries"].items()]


def _given_base(settings: Settings) -> dict[str, Any]:
    """The checkpoint of base.path that a person has given; empty where the teacher itself is cut."""
    if settings.base.path is None:
        return {}
    architecture = base_architecture(settings)
    return {"path": settings.base.path, "parameters": count_total_parameters(architecture), "architecture": as_dict(architecture)}


def _stage(result: Result, cached: bool) -> dict[str, Any]:
    facts = result.record
    return {"key": result.key, "path": str(result.folder), "seconds": facts["seconds"], "cached": cached, "peak_rss_bytes": facts["peak_rss_bytes"],
            "headline": result.facts["headline"]}  # fmt: skip


def _models(settings: Settings, results: Mapping[str, Result], budget_bytes: int) -> dict[str, Any]:
    evaluations = results["evaluate"].facts["models"] if "evaluate" in results else {}
    models = {}
    for name, stage in MODEL_STAGES.items():
        if name == "teacher":
            folder, architecture = _teacher(settings, results)
        elif stage in results:
            folder, architecture = _model_of(results[stage])
        else:
            continue
        memory = memory_report(architecture, workload_of(settings))
        models[name] = {
            "path": None if folder is None else str(folder),
            "parameters": count_total_parameters(architecture),
            **({"active_parameters": count_active_parameters(architecture)} if "E" in architecture.pattern else {}),
            "architecture": as_dict(architecture),
            "memory_bytes": memory.as_dict(),
            "fits": memory.total <= budget_bytes,
            "evaluation": evaluations.get(name),
        }
    return models


def _teacher(settings: Settings, results: Mapping[str, Result]) -> tuple[Path | None, Architecture]:
    """The teacher's folder, None before there is one, and its architecture."""
    return _model_of(results["teacher"]) if "teacher" in results else (None, teacher_architecture(settings))


def _model_of(result: Result) -> tuple[Path, Architecture]:
    folder = result.folder / result.facts["path"]
    return folder, architecture_from_config(read_config(folder))


def _importance(score: Result, teacher: Architecture) -> dict[str, Any]:
    """Order of removal, and what the first round, with every layer still there, said of each; null for kinds at their floor.

    Layers are numbered as everywhere; of width_curves alone the numbers are those of sublayers, the pattern's letters. `experts`, of a model that has any:
    by layer, of every expert the tokens sent to it and its scores.
    """
    layers = json.loads((score.folder / LAYERS_FILE).read_text())
    first = layers["rounds"][0]["scores"] if layers["rounds"] else {}
    return {
        "pattern": layers["pattern"],
        "criterion": score.record["settings"]["criterion"],
        "normalised": score.record["settings"]["normalised"],
        "removal_order": layers["removal_order"],
        "removal_scores": [entry["score"] for entry in layers["rounds"]],
        "width_curves": layers["width_curves"],
        **({"experts": layers["experts"]} if "experts" in layers else {}),
        "first_round_scores": [first.get(str(layer)) for layer in range(replace(teacher, pattern=layers["pattern"]).num_layers)],
    }


def _curves(results: Mapping[str, Result]) -> dict[str, Any]:
    """Training loss of a teacher trained here and KL of the distillation, in nats per token, by tokens seen; no curve of a loss that is no KL."""
    curves = {}
    for name, stage, value in (("teacher", "teacher", "loss_nats_per_token"), ("distillation", "distill", "kl_nats_per_token")):
        path = results[stage].folder / METRICS_FILE if stage in results else None
        if path is not None and path.exists() and results[stage].facts.get("final_kl_nats_per_token", 0.0) is not None:
            steps = [json.loads(line) for line in path.read_text().splitlines()]
            curves[name] = thinned_curve([(step["tokens"], step["loss"]) for step in steps], value)
    return curves


def thinned_curve(points: list[tuple[int, float]], value: str) -> dict[str, list]:
    """At most 200 points {"tokens": [...], value: [...]}: runs of equal length, each as its mean and its last token count."""
    run = -(-len(points) // MOST_CURVE_POINTS)
    runs = [points[start : start + run] for start in range(0, len(points), run)] if points else []
    return {"tokens": [part[-1][0] for part in runs], value: [sum(y for _, y in part) / len(part) for part in runs]}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def chosen_candidate(lap: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The candidate that the search of a lap (the summary itself is the last one) chose; None before the search."""
    return next((candidate for candidate in lap["candidates"] if candidate["chosen"]), None)


def best_first(candidates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Candidates by the highest rung they reached: by loss after a short distillation, then by zero-shot loss, then the unmeasured."""

    def place(candidate: Mapping[str, Any]) -> tuple[int, float]:
        losses = [candidate[rung] for rung in RUNGS]
        rung = next((number for number, loss in enumerate(losses) if loss is not None), len(RUNGS))
        return (rung, losses[rung] if rung < len(RUNGS) else 0.0)

    return sorted(candidates, key=place)


def highest_rung(candidates: Sequence[Mapping[str, Any]]) -> str | None:
    """The measure that the choice was made by: losses of different rungs do not compare. None where nothing was measured."""
    return next((rung for rung in RUNGS if any(candidate[rung] is not None for candidate in candidates)), None)


def cut_kinds(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of the layers that `removed_layers` counts: the given base's, else the teacher's."""
    return kinds_of(summary, (summary["base"] or summary["models"]["teacher"])["architecture"]["pattern"])


def kinds_of(summary: Mapping[str, Any], pattern: str) -> tuple[str, ...]:
    """The letters of every layer of a model of the run, by its pattern: one each, or those of a block."""
    return replace(Architecture(**summary["models"]["teacher"]["architecture"]), pattern=pattern).layer_kinds


def removed_layers(summary: Mapping[str, Any]) -> list[int]:
    """Layers that were cut, or that the chosen candidate will do without; empty before the search.

    In the second of two laps a candidate's kept_layers are the first lap's student's: only the first lap removes layers.
    """
    chosen = chosen_candidate(summary)
    if summary["depth_lap"] or "pruned" in summary["models"] or chosen is None:
        return summary["removed_layers"]
    return sorted(set(range(len(cut_kinds(summary)))) - set(chosen["kept_layers"]))


def sequences_text(workload: Mapping[str, Any]) -> str:
    """What is served at once, e.g. 1 sequence of 4,096 tokens."""
    sequences = "1 sequence" if workload["batch"] == 1 else f"{workload['batch']:,} sequences"
    return f"{sequences} of {workload['context_tokens']:,} tokens"
