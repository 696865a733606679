"""whole_rows: the rows of distill_whole, whose reasoning traces are all whole."""

from dataclasses import replace

from minitron.text import phase_rows
from minitron.text.blends import without_truncation
from minitron.walk.pipeline import StageContext


def run(context: StageContext) -> dict:
    return phase_rows.run(replace(context, settings=without_truncation(context.settings)))
