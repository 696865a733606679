"""Rows of distillation's phases that are of another length or from other sources than the data stage's."""

from typing import Any

from minitron.settings.run import Settings
from minitron.text.blends import rows_identity, rows_to_make
from minitron.walk.stage import StageContext, StoredStage


def what(settings: Settings) -> Any:
    return {name: {**rows_identity(data), "vocab": None} for name, data in rows_to_make(settings).items()}


def run(context: StageContext) -> dict:
    from minitron.text.phase_rows import make_phase_rows

    return make_phase_rows(context)


STAGE = StoredStage(version=2, needs=lambda settings: ("data", "teacher"), what=what, run=run)
