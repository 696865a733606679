"""What a run will cut, and what it will take: time, memory and disk of every stage, from settings and config.json alone."""

from collections.abc import Sequence

from minitron.settings.run import Settings
from minitron.walk.console import Console
from minitron.walk.stage import Lap, UsingStage


def run(settings: Settings, _laps: Sequence[Lap], console: Console) -> None:
    """The whole plan, and what would be refused; it refuses nothing itself."""
    from minitron.plan.console import print_plan

    print_plan(settings, console)


def before(settings: Settings, console: Console) -> None:
    """The first lines of a run; raises ValueError for what cannot end well."""
    from minitron.plan.console import begin

    begin(settings, console)


STAGE = UsingStage(run=run, looks_ahead=True, before=before)
