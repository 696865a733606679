"""Rows of distill_whole, whose reasoning traces are all whole."""

from dataclasses import replace

from minitron.stages.phase_rows import what
from minitron.text.blends import without_truncation
from minitron.walk.stage import StageContext, StoredStage


def run(context: StageContext) -> dict:
    from minitron.text.phase_rows import make_phase_rows

    return make_phase_rows(replace(context, settings=without_truncation(context.settings)))


STAGE = StoredStage(version=2, needs=lambda settings: ("data", "teacher"), what=lambda settings: what(without_truncation(settings)), run=run)
