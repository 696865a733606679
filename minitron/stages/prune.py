"""The chosen architecture cut out of the teacher, tensor by tensor from disk to disk, compensated or as it is."""

from typing import Any

from minitron.settings.derived import base_stage
from minitron.settings.rules import key_settings
from minitron.settings.run import PruneMethod, Settings
from minitron.walk.stage import StageContext, StoredStage

BALANCED = {"balanced": 1}  # of a compensated cut: its readers are as large as the base's, its norms likewise; a slice is what it was


def needs(settings: Settings) -> tuple[str, ...]:
    return (base_stage(settings), "score", "search", *(("data",) if settings.prune.method is PruneMethod.compensated else ()))


def what(settings: Settings) -> Any:
    if settings.prune.method is PruneMethod.slice:
        return {}  # nothing else to choose
    return {**key_settings(settings.prune), "held_out": settings.search.screen_samples, **BALANCED}


def run(context: StageContext) -> dict:
    from minitron.pruning.disk_to_disk import prune_teacher

    return prune_teacher(context)


STAGE = StoredStage(version=3, needs=needs, what=what, run=run)
