"""Whether all that is in the store is what was written there, byte by byte."""

import sys
from collections.abc import Sequence
from pathlib import Path

from minitron.settings.run import Settings
from minitron.walk.console import Console
from minitron.walk.stage import Lap, UsingStage


def run(settings: Settings, _laps: Sequence[Lap], console: Console) -> None:
    from minitron.walk.housekeeping import verify

    if not verify(Path(settings.runs_folder) / "store", console):
        sys.exit(1)


STAGE = UsingStage(run=run, looks_ahead=True)
