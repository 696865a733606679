"""What a person opens: summary.json and the report, from what is done; cheap, so made anew after every walk."""

from collections.abc import Sequence

from minitron.settings.run import Settings
from minitron.walk.console import Console
from minitron.walk.stage import Lap, UsingStage


def run(settings: Settings, laps: Sequence[Lap], console: Console) -> None:
    from minitron.report.files import write_report

    write_report(settings, laps, console)


STAGE = UsingStage(run=run)
