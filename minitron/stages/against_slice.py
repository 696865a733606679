"""The student held against the plain slice of its architecture after the same tokens (prune.against_slice)."""

from typing import Any

from minitron.settings.run import PruneMethod, Settings
from minitron.walk.stage import StageContext, StoredStage


def is_wanted(settings: Settings) -> bool:
    return settings.prune.against_slice and settings.prune.method is not PruneMethod.slice


def what(settings: Settings) -> Any:
    return {"samples": settings.evaluate.samples}


def run(context: StageContext) -> dict:
    from minitron.measures.evaluation import evaluate_slice

    return evaluate_slice(context)


STAGE = StoredStage(version=1, needs=lambda settings: ("data", "teacher", "evaluate", "prune_slice", "distill_slice"), what=what, run=run, ends_all=is_wanted)
