"""Everything of the student to hand over in one folder; says whether vLLM and llama.cpp would take it."""

from collections.abc import Sequence

from minitron.settings.run import Settings
from minitron.walk.console import Console
from minitron.walk.stage import Lap, UsingStage


def run(settings: Settings, laps: Sequence[Lap], console: Console) -> None:
    from minitron.hand_over.export import export_student

    export_student(settings, laps, console)


STAGE = UsingStage(run=run)
