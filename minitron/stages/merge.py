"""A weighted mean of checkpoints of one architecture; its weights given, or the best of a sweep."""

from pathlib import Path
from typing import Any

from memory_budget.hf_config import read_config
from minitron.checkpoints.weight_files import check_plain_weights
from minitron.settings.hand_over import MERGEABLE
from minitron.settings.run import Settings
from minitron.walk.stage import StageContext, StoredStage


def needs(settings: Settings) -> tuple[str, ...]:
    # Of given folders and weights it needs no stage.
    return (*(("data",) if settings.merge.candidates() else ()), *settings.merge.stages())


def what(settings: Settings) -> Any:
    from minitron.checkpoints.folder import fingerprint

    def identity(name: str) -> Any:  # a stage's own key is among the inputs; a folder's name stands on the card
        return name if name in MERGEABLE else {"files": fingerprint(Path(name)), "name": Path(name).resolve().name}

    merge = settings.merge
    chosen = {"sweep": merge.candidates(), "samples": merge.samples} if merge.candidates() else {"weights": merge.shares()}
    return {"checkpoints": [identity(name) for name in merge.checkpoints], **chosen}


def check(settings: Settings) -> None:
    """Refuse checkpoints to merge that are too few or not there."""
    names = settings.merge.checkpoints
    if len(names) < 2:
        raise ValueError(f"merge.checkpoints is {names}; stage=merge needs at least two: folders, or finished stages ({', '.join(MERGEABLE)})")
    if "base" in names and settings.base.path is None and not settings.depth_lap.enabled:
        raise ValueError("merge.checkpoints names 'base', but there is none: base.path is null and depth_lap.enabled is false")
    for number, name in enumerate(names):
        if name not in MERGEABLE and not Path(name).is_dir():
            raise ValueError(f"merge.checkpoints names {name!r}, which is neither the folder of a checkpoint nor one of {', '.join(MERGEABLE)}")
        if name not in MERGEABLE:
            check_plain_weights(Path(name), read_config(name), f"merge.checkpoints[{number}]")


def run(context: StageContext) -> dict:
    from minitron.hand_over.merge import merge_checkpoints

    return merge_checkpoints(context)


STAGE = StoredStage(version=1, needs=needs, what=what, check=check, run=run, in_one_lap=lambda settings: set(settings.merge.stages()) <= {"teacher"})
