"""Your checkpoint held against its config.json, one converted from a GGUF, the tiny one of the package, or one trained anew."""

from pathlib import Path
from typing import Any

from distill.engines.sharing import check_sharing
from minitron.checkpoints.weight_files import check_plain_weights
from minitron.families.known import family_of
from minitron.settings.gguf_teacher import gguf_header, gguf_teacher_digest
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings
from minitron.settings.teachers import (
    is_converted,
    is_stored,
    is_trained,
    stored_digest,
    teacher_architecture,
    teacher_config,
    teacher_folder,
    teacher_name,
)
from minitron.walk.stage import StageContext, StoredStage

CONVERSION_VERSION = 1  # rises when the same GGUF gives another checkpoint


def needs(settings: Settings) -> tuple[str, ...]:
    return ("data",) if is_trained(settings) else ()


def what(settings: Settings) -> Any:
    if is_trained(settings):
        return {"tiny": key_settings(settings.teacher.tiny), "train": key_settings(settings.teacher.train), "seed": settings.seed}
    if is_stored(settings):
        return {"stored": stored_digest()}
    if is_converted(settings):
        return {"gguf": gguf_teacher_digest(settings.teacher), "conversion": CONVERSION_VERSION}
    from minitron.checkpoints.folder import fingerprint

    # The folder too: the result says where the weights lie. Later stages know them by their contents, the result's identity.
    folder = teacher_folder(settings)
    return {"files": fingerprint(folder), "folder": str(folder)}


def check(settings: Settings) -> None:
    if is_trained(settings):
        check_sharing(settings.teacher.train.batch, settings.teacher.train.micro_batch, 1)
        settings.data.check_tokens("teacher.train", settings.teacher.train)
        return
    family_of(teacher_config(settings))
    if settings.teacher.path is not None and Path(settings.teacher.path).is_dir():
        check_plain_weights(teacher_folder(settings), teacher_config(settings), "teacher.path")
    if is_stored(settings):
        teacher_architecture(settings)
        if settings.data.arithmetic.problems:
            raise ValueError(f"data.arithmetic.problems is {settings.data.arithmetic.problems}; the tiny teacher that comes with the package has seen none: "
                             "teacher.train_anew=true trains one on them")  # fmt: skip


def check_rows(settings: Settings, rows: int, told: str) -> None:
    if is_trained(settings):
        settings.data.check_rows("teacher.train", settings.teacher.train, rows, told)


def run(context: StageContext) -> dict:
    """A given checkpoint is held against its config, and read for its identity. The stored one is written out in float32."""
    settings = context.settings
    if is_trained(settings):
        from minitron.training.tiny_teacher import train_tiny_teacher

        return train_tiny_teacher(context)
    if is_stored(settings):
        from minitron.checkpoints.tiny import unpack_tiny_teacher

        return unpack_tiny_teacher(context.folder)
    if is_converted(settings):
        from minitron.checkpoints.from_gguf import convert_gguf
        from minitron.checkpoints.given import identity_of

        facts = convert_gguf(gguf_header(settings.teacher), teacher_config(settings), context.folder, context.console)
        return facts | identity_of(context.folder / facts["path"], context.console)
    from minitron.checkpoints.given import given_checkpoint, identity_of

    folder = teacher_folder(settings)
    return given_checkpoint(folder, teacher_name(settings), "teacher.path", say=context.console.say) | identity_of(folder, context.console)


STAGE = StoredStage(version=1, needs=needs, what=what, check=check, check_rows=check_rows, run=run, ends_first_lap=True)
