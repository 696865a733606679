"""The student once more, from whole reasoning traces alone: it shows what the cut ones are good for."""

from dataclasses import replace
from typing import Any

from minitron.settings.run import Settings
from minitron.stages import distill
from minitron.text.blends import without_truncation
from minitron.walk.stage import StageContext, StoredStage


def what(settings: Settings) -> Any:
    return distill.what(without_truncation(settings))


def check(settings: Settings) -> None:
    if settings.distill.cached:
        raise ValueError("distill.cached is true, but a student is to learn from whole traces too (reasoning.enabled), which the cache lacks; it must be false")


def run(context: StageContext) -> dict:
    inputs = {**context.inputs, "phase_rows": context.inputs["whole_rows"]}
    return distill.run(replace(context, settings=without_truncation(context.settings), inputs=inputs))


STAGE = StoredStage(version=1, needs=lambda settings: ("data", "teacher", "prune", "whole_rows"), what=what, check=check, run=run, parallel=True)
