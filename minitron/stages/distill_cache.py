"""The teacher's likeliest tokens at every position that the student learns from, so that it can learn without the teacher."""

from typing import Any

from minitron.settings.run import Settings
from minitron.walk.stage import StageContext, StoredStage


def what(settings: Settings) -> Any:
    return {"top_k": settings.screen.top_k, "tokens": settings.distill.train.tokens}


def run(context: StageContext) -> dict:
    """Of as many train rows as distill.train.tokens reads once."""
    from minitron.training.teacher_cache import cached_rows, write_cache

    return write_cache(context, cached_rows(context, context.settings.distill.train.tokens))


STAGE = StoredStage(version=1, needs=lambda settings: ("data", "teacher"), what=what, run=run)
