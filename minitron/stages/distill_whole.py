"""distill_whole: the student once more, from whole reasoning traces alone; it shows what the cut ones are good for."""

from dataclasses import replace

from minitron.blends import without_truncation
from minitron.pipeline import StageContext
from minitron.stages import distill


def run(context: StageContext) -> dict:
    inputs = {**context.inputs, "phase_rows": context.inputs["whole_rows"]}
    return distill.run(replace(context, settings=without_truncation(context.settings), inputs=inputs))
