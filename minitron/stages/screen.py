"""One candidate or every finalist, each cut and distilled briefly, and measured."""

from collections.abc import Mapping
from typing import Any

from distill.engines.sharing import check_sharing
from minitron.machine import processes
from minitron.settings.derived import asked_candidate_samples, base_stage
from minitron.settings.rules import key_settings
from minitron.settings.run import PruneMethod, Settings
from minitron.stages.distill import check_experts
from minitron.stages.prune import compensated, cut_from
from minitron.walk.stage import Lap, PerCandidate, StageContext, StoredStage
from minitron.walk.store import Result
from minitron.walk.tracking import record_finished


def needs(settings: Settings) -> tuple[str, ...]:
    return ("data", base_stage(settings), "teacher_cache" if settings.screen.cached else "teacher", "score", "shortlist")


def what(settings: Settings) -> Any:
    cut = {}
    if settings.prune.method is PruneMethod.compensated:
        cut = {"prune": compensated(settings) | {"samples": asked_candidate_samples(settings)}}
    short = {name: value for name, value in key_settings(settings.screen).items() if name != "cut_samples"}
    return {"held_out": settings.search.screen_samples, "seed": settings.seed, **short, **cut}


def of_inputs(settings: Settings, inputs: Mapping[str, Result]) -> dict[str, Any]:
    """Raises ValueError for a candidate that is not on the shortlist."""
    entries = inputs["shortlist"].facts["entries"]
    if settings.candidate not in entries:
        raise ValueError(f"candidate is {settings.candidate!r}, which is not on the shortlist; there are: {', '.join(entries)}")
    taught = {name: inputs[name].identity for name in ("data", "teacher_cache" if settings.screen.cached else "teacher")}
    return cut_from(settings, inputs, entries[settings.candidate]) | taught


def check(settings: Settings) -> None:
    check_experts("screen.train", settings.screen.train, settings)
    check_sharing(settings.screen.train.batch, settings.screen.train.micro_batch, processes.world_size(), cached=settings.screen.cached)


def check_rows(settings: Settings, rows: int, told: str) -> None:
    settings.data.check_rows("screen.train", settings.screen.train, rows, told)


def finalists(lap: Lap) -> list[str]:
    """The best by zero-shot loss."""
    return lap.results["shortlist"].facts["best_first"][: lap.settings.search.finalists]


def others(lap: Lap) -> list[str]:
    """Shortlisted, but no finalists: a sweep may have screened them."""
    return lap.results["shortlist"].facts["best_first"][lap.settings.search.finalists :]


def tell_tracker(lap: Lap, result: Result) -> None:
    record_finished(lap.settings, lap.results["shortlist"].facts["entries"][lap.settings.candidate], result.facts)


def run(context: StageContext) -> dict:
    from minitron.search.screen import screen_candidate

    return screen_candidate(context)


STAGE = StoredStage(
    version=2, needs=needs, what=what, check=check, check_rows=check_rows, of_inputs=of_inputs, run=run, parallel=True,
    per_candidate=PerCandidate(wanted=finalists, also=others, on_found=tell_tracker),
)  # fmt: skip
