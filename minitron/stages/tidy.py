"""What is stored, by run, and what no run uses; tidy.remove=true removes that."""

from collections.abc import Sequence
from pathlib import Path

from minitron.settings.run import Settings
from minitron.walk.console import Console
from minitron.walk.stage import Lap, UsingStage


def run(settings: Settings, _laps: Sequence[Lap], console: Console) -> None:
    from minitron.door.runs_own import places_used
    from minitron.walk.housekeeping import tidy

    used, all_known = places_used(Path(settings.runs_folder), console.say)
    tidy(Path(settings.runs_folder) / "store", used, console, remove=settings.tidy.remove and all_known)


STAGE = UsingStage(run=run, looks_ahead=True)
