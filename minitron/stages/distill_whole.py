"""distill_whole: the student once more, from whole reasoning traces alone; it shows what the cut ones are good for."""

from dataclasses import replace

from minitron.text.blends import without_truncation
from minitron.training import distillation as distill
from minitron.walk.pipeline import StageContext


def run(context: StageContext) -> dict:
    inputs = {**context.inputs, "phase_rows": context.inputs["whole_rows"]}
    return distill.run(replace(context, settings=without_truncation(context.settings), inputs=inputs))
