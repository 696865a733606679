"""Your checkpoint, held against its config.json; or the tiny one, trained on the data."""

from typing import Any

from distill.engines.sharing import check_sharing
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings
from minitron.settings.teachers import teacher_config, teacher_folder
from minitron.walk.stage import StageContext, StoredStage


def needs(settings: Settings) -> tuple[str, ...]:
    return ("data",) if settings.teacher.path is None else ()


def what(settings: Settings) -> Any:
    if settings.teacher.path is None:
        return {"tiny": key_settings(settings.teacher.tiny), "train": key_settings(settings.teacher.train), "seed": settings.seed}
    from minitron.checkpoints.files import Checkpoint

    # The folder too: the result says where the weights lie, and a card names them.
    folder = teacher_folder(settings)
    return {"weights": Checkpoint(folder).fingerprint, "folder": str(folder)}


def check(settings: Settings) -> None:
    if settings.teacher.path is None:
        check_sharing(settings.teacher.train.batch, settings.teacher.train.micro_batch, 1)
        settings.data.check_tokens("teacher.train", settings.teacher.train)
    else:
        from minitron.families.known import family_of  # brings torch, which a run that finds everything done goes without

        family_of(teacher_config(settings))


def run(context: StageContext) -> dict:
    """A given checkpoint is only held against its config: no weights are read."""
    teacher = context.settings.teacher.path
    if teacher is None:
        from minitron.training.tiny_teacher import train_tiny_teacher

        return train_tiny_teacher(context)
    from minitron.checkpoints.given import given_checkpoint

    return given_checkpoint(teacher_folder(context.settings), teacher)


STAGE = StoredStage(version=1, needs=needs, what=what, check=check, run=run, ends_first_lap=True)
