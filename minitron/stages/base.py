"""The checkpoint of base.path, which is cut in the teacher's stead, held against its config.json."""

from pathlib import Path
from typing import Any

from memory_budget.hf_config import read_config
from minitron.checkpoints.weight_files import check_plain_weights
from minitron.settings.run import Settings
from minitron.settings.teachers import base_architecture
from minitron.walk.stage import StageContext, StoredStage


def what(settings: Settings) -> Any:
    from minitron.checkpoints.folder import fingerprint

    folder = Path(settings.base.path)
    return {"files": fingerprint(folder), "folder": str(folder.resolve())}


def check(settings: Settings) -> None:
    if settings.base.path is None and settings.depth_lap.enabled:
        return  # the second lap's is the first one's student
    if settings.base.path is None:
        raise ValueError("base.path is null; stage=base needs the folder of a checkpoint there")
    if Path(settings.base.path).is_dir():
        check_plain_weights(Path(settings.base.path), read_config(settings.base.path), "base.path")
    base_architecture(settings)


def run(context: StageContext) -> dict:
    from minitron.checkpoints.given import given_checkpoint, identity_of

    folder = Path(context.settings.base.path).resolve()
    return given_checkpoint(folder, folder.name, "base.path", say=context.console.say) | identity_of(folder, context.console)


STAGE = StoredStage(version=1, needs=lambda settings: ("teacher",), what=what, check=check, run=run)
