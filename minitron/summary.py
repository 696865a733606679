"""summary.json: what a run did, in the form others rely on. The report shows nothing that is not in it."""

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memory_budget.calculator import memory_report
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from minitron.settings import Settings
from minitron.stages.search import budget_of, workload_of
from minitron.store import Result
from minitron.teachers import teacher_architecture

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "hydra-core", "wandb", "numpy")
MODEL_STAGES = {"teacher": "teacher", "pruned": "prune", "student": "distill"}


def build_summary(settings: Settings, results: Mapping[str, Result], cached: Mapping[str, bool]) -> dict[str, Any]:
    """The summary of the stages that are done; parts whose stage did not run are empty or absent."""
    budget, workload = budget_of(settings), workload_of(settings)
    search, prune, distill = results.get("search"), results.get("prune"), results.get("distill")
    return {
        "run_name": settings.run_name,
        "command": "python -m minitron.run " + " ".join(sys.argv[1:]),
        "versions": _versions(),
        "seed": settings.seed,
        "budget": {
            "name": budget.name,
            "bytes": budget.bytes,
            "device_gib": budget.device_gib,
            "cushion_fraction": budget.cushion_fraction,
            "set_aside_gib": budget.set_aside_gib,
            "workload": {name: value for name, value in asdict(workload).items()},
        },
        "stages": {name: _stage(result, cached[name]) for name, result in results.items()},
        "models": _models(settings, results, budget.bytes),
        "candidates": search.facts["shortlist"] if search else [],
        "search": {name: search.facts[name] for name in ("num_candidates", "num_fitting")} if search else {},
        "removed_layers": prune.facts["removed_layers"] if prune else [],
        "distillation": {name: distill.facts[name] for name in ("tokens", "steps", "seconds", "final_kl_nats_per_token")} if distill else {},
        "recovery": {name: results["evaluate"].facts[name] for name in ("lost_nats_per_token", "recovered_share")} if "evaluate" in results else {},
    }


def _stage(result: Result, cached: bool) -> dict[str, Any]:
    facts = result.record
    return {"key": result.key, "path": str(result.folder), "seconds": facts["seconds"], "cached": cached, "peak_rss_bytes": facts["peak_rss_bytes"],
            "headline": result.facts["headline"]}  # fmt: skip


def _models(settings: Settings, results: Mapping[str, Result], budget_bytes: int) -> dict[str, Any]:
    evaluations = results["evaluate"].facts["models"] if "evaluate" in results else {}
    models = {}
    for name, stage in MODEL_STAGES.items():
        if stage in results:
            folder: Path | None = results[stage].folder / results[stage].facts["path"]
            architecture = architecture_from_config(read_config(folder))
        elif name == "teacher":
            folder, architecture = None, teacher_architecture(settings)
        else:
            continue
        memory = memory_report(architecture, workload_of(settings))
        models[name] = {
            "path": None if folder is None else str(folder),
            "parameters": count_total_parameters(architecture),
            "architecture": asdict(architecture),
            "memory_bytes": memory.as_dict(),
            "fits": memory.total <= budget_bytes,
            "evaluation": evaluations.get(name),
        }
    return models


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
