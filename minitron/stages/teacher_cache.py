"""The teacher's likeliest tokens at every position of some train rows, once for every finalist of the search."""

from typing import Any

from minitron.settings.run import Settings
from minitron.walk.stage import StageContext, StoredStage


def what(settings: Settings) -> Any:
    return {"top_k": settings.screen.top_k, "tokens": settings.screen.train.tokens}


def run(context: StageContext) -> dict:
    from minitron.training.teacher_cache import cached_rows, write_cache

    return write_cache(context, cached_rows(context, context.settings.screen.train.tokens))


STAGE = StoredStage(version=2, needs=lambda settings: ("data", "teacher"), what=what, run=run)
