"""What was planned beside what was taken, for summary.json."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from minitron.plan.plan import DEPTH, Plan, StagePlan, plan_of
from minitron.settings.run import Settings
from minitron.walk.stage import Lap
from minitron.walk.store import Result
from minitron.walk.table import stage_of


def planned_and_taken(settings: Settings, laps: Sequence[Lap]) -> dict[str, Any]:
    """Of every stage that was planned, and of the whole. `stages` are those of the last lap, `depth_lap` those of the first where there are two; candidates
    that were screened are one entry. What an earlier run took counts where its results were found done."""
    plan = plan_of(settings)
    return {
        "device": plan.device,
        "processes": plan.processes,
        "seconds": {"planned": plan.seconds, "taken": sum(_taken_seconds(plan, laps))},
        "stages": {stage.stage: _both(stage, laps) for stage in plan.stages if stage.lap != DEPTH},
        "depth_lap": {stage.stage: _both(stage, laps) for stage in plan.stages if stage.lap == DEPTH},
    }


def _both(stage: StagePlan, laps: Sequence[Lap]) -> dict[str, Any]:
    results = _results(stage, laps)
    planned = {"seconds": stage.seconds, "memory_bytes": stage.memory_bytes, "disk_bytes": stage.disk_bytes}
    return {"planned": planned, "taken": _taken(results) if results else None}


def _taken(results: Mapping[str, Result]) -> dict[str, Any]:
    """Memory is the most that a process had at once: of a GPU's nothing is known here."""
    return {
        "seconds": round(sum(result.record["seconds"] for result in results.values()), 3),
        "memory_bytes": max(result.record["peak_rss_bytes"] for result in results.values()),
        "disk_bytes": sum(_bytes_of(result) for result in results.values()),
    }


def _results(stage: StagePlan, laps: Sequence[Lap]) -> Mapping[str, Result]:
    """What a lap has of a stage, by label; of a lap that has not begun nothing."""
    number = 0 if stage.lap in ("", DEPTH) else 1
    return {label: result for label, result in laps[number].results.items() if stage_of(label) == stage.stage} if number < len(laps) else {}


def _taken_seconds(plan: Plan, laps: Sequence[Lap]) -> list[float]:
    return [result.record["seconds"] for stage in plan.stages for result in _results(stage, laps).values()]


def _bytes_of(result: Result) -> int:
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(result.folder) for name in names)
