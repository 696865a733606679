"""The plain slice distilled on the same rows and tokens as the student (prune.against_slice)."""

from dataclasses import replace
from typing import Any

from minitron.settings.run import Settings
from minitron.stages import distill
from minitron.stages.prune_slice import sliced
from minitron.walk.stage import StageContext, StoredStage


def needs(settings: Settings) -> tuple[str, ...]:
    return tuple("prune_slice" if name == "prune" else name for name in distill.needs(settings))


def what(settings: Settings) -> Any:
    return distill.what(sliced(settings))


def run(context: StageContext) -> dict:
    return distill.run(replace(context, settings=sliced(context.settings), inputs={**context.inputs, "prune": context.inputs["prune_slice"]}))


STAGE = StoredStage(version=1, needs=needs, what=what, run=run, parallel=True)
