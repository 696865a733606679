"""distill_cache: the teacher's likeliest tokens at every position that the student learns from, so that it can learn without the teacher."""

from minitron.training.teacher_cache import cached_rows, write_cache
from minitron.walk.pipeline import StageContext


def run(context: StageContext) -> dict:
    """Writes cache/ of as many train rows as distill.train.tokens reads once."""
    return write_cache(context, cached_rows(context, context.settings.distill.train.tokens))
