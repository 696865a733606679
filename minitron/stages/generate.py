"""Text from a prompt (prompt=…), of the student or any checkpoint, under a thinking budget."""

from collections.abc import Sequence

from minitron.settings.run import Settings
from minitron.walk.console import Console
from minitron.walk.stage import Lap, UsingStage


def check(settings: Settings) -> None:
    if settings.prompt is None:
        raise ValueError("prompt has no value; stage=generate needs one, e.g. prompt='What is a list?'")


def run(settings: Settings, laps: Sequence[Lap], console: Console) -> None:
    from minitron.generation.answer import print_answer

    print_answer(settings, laps, console)


STAGE = UsingStage(run=run, check=check)
