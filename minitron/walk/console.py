"""What the terminal shows: one headline per stage, progress bars with rate and time left.

On a terminal the bars are live; elsewhere (a log file, CI) a line is printed every few seconds instead.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from minitron.walk.shown import shown

LOG_EVERY_SECONDS = 15.0


class Advance(Protocol):
    def __call__(self, amount: float, note: str = "") -> None: ...


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.finished_speed or task.speed or 0.0, task.fields["unit"]), style="cyan")


def _rate(speed: float, unit: str) -> str:
    digits = 0 if speed >= 100 else 1
    return f"{speed:,.{digits}f} {unit}/s"


class Console:
    """The one place that prints. Everything goes to standard output; errors are the door's business."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.rich = RichConsole(highlight=False, soft_wrap=True, quiet=quiet)

    def say(self, text: str) -> None:
        self.rich.print(shown(text), markup=False)

    def headline(self, stage: str, text: str) -> None:
        self.rich.print(shown(f"{stage:>9}  {text}"), markup=False)

    @contextmanager
    def track(self, description: str, total: float | None, unit: str, done: float = 0.0) -> Iterator[Advance]:
        """A progress bar over `total` units of work, None where nobody knows; yields advance(amount, note)."""
        if self.rich.is_terminal:
            columns = (TextColumn("{task.description:>20}"), BarColumn(), TaskProgressColumn("{task.percentage:>3.0f} %"), _Rate(),
                       TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.fields[note]}"))  # fmt: skip
            with Progress(*columns, console=self.rich, transient=True) as progress:
                task = progress.add_task(description, total=total, completed=done, unit=unit, note="")
                yield lambda amount, note="": progress.update(task, advance=amount, note=note)
        else:
            yield _LogLines(self, description, total, unit, done)


class _LogLines:
    """Progress as lines, for where there is no terminal."""

    def __init__(self, console: Console, description: str, total: float | None, unit: str, done: float):
        self.console, self.description, self.total, self.unit = console, description, total, unit
        self.done = self.before = done
        self.started = self.last = time.monotonic()

    def __call__(self, amount: float, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last < LOG_EVERY_SECONDS:
            return
        self.last = now
        speed = (self.done - self.before) / (now - self.started)
        if self.total is None:
            self.console.say(f"{self.description:>20}  {self.done:,.0f} {self.unit}  {_rate(speed, self.unit)}  {note}".rstrip())
            return
        left = (self.total - self.done) / speed if speed else 0.0
        share = 100 * self.done / self.total if self.total else 100.0
        self.console.say(f"{self.description:>20}  {share:3.0f} %  {_rate(speed, self.unit)}  {left:,.0f} s left  {note}".rstrip())
