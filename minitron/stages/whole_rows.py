"""whole_rows: the rows of distill_whole, whose reasoning traces are all whole."""

from dataclasses import replace

from minitron.blends import without_truncation
from minitron.pipeline import StageContext
from minitron.stages import phase_rows


def run(context: StageContext) -> dict:
    return phase_rows.run(replace(context, settings=without_truncation(context.settings)))
