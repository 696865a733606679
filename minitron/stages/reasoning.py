"""Accuracy against the thinking budget, of teacher, student and the student of whole traces (reasoning.enabled)."""

from typing import Any

from minitron.settings.rules import key_settings
from minitron.settings.run import Settings
from minitron.sources.arithmetic import held_out_problems
from minitron.walk.stage import StageContext, StoredStage


def needs(settings: Settings) -> tuple[str, ...]:
    return ("data", "teacher", "distill", "distill_whole")


def what(settings: Settings) -> Any:
    return key_settings(settings.reasoning)


def check(settings: Settings) -> None:
    if (there := len(held_out_problems(settings.data.arithmetic))) < settings.reasoning.problems:
        raise ValueError(f"reasoning.problems is {settings.reasoning.problems}, but of data.arithmetic.problems {settings.data.arithmetic.problems} "
                         f"only {there} are held out; lower the one or raise the other")  # fmt: skip


def run(context: StageContext) -> dict:
    from minitron.measures.reasoning import measure_reasoning

    return measure_reasoning(context)


STAGE = StoredStage(version=1, needs=needs, what=what, check=check, run=run, ends_all=lambda settings: settings.reasoning.enabled)
