"""Measurements of speed that other work would spoil: one at a time on this machine, and marked where something else kept its cores busy."""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

STAT = Path("/proc/stat")
OTHERS_SHARE = 0.1  # of the cores' time, in which others may be at work without being said to
TICKS = 2  # of the kernel's clock for every core, by which its figures may be off
BUSY_COLUMNS = (1, 2, 3, 6, 7, 8)  # of a core's line: user, nice, system, irq, softirq, steal
TRIES, LONGEST_SECONDS = 2, 60.0  # what took longer is not measured once more
T = TypeVar("T")


def measured_alone(measure: Callable[[], T]) -> tuple[T, bool | None]:
    """What `measure` gives, and whether this process had the cores for itself meanwhile: None where the system does not say.

    Where it had not, it measures once more. Other processes that measure wait, whatever runs folder they have.
    """
    with _turn():
        for _ in range(TRIES):
            before, own, started = _busy_seconds(), time.process_time(), time.monotonic()
            found, after = measure(), _busy_seconds()
            elapsed = time.monotonic() - started
            alone = None if before is None or after is None else had_cores(after - before, time.process_time() - own, elapsed, cores=len(_cores()))
            if alone is not False or elapsed > LONGEST_SECONDS:
                break
    return found, alone


def had_cores(busy: float, own: float, elapsed: float, *, cores: int) -> bool:
    """Whether of so many busy seconds of these cores all but a little were this process's own."""
    return busy - own <= cores * (OTHERS_SHARE * elapsed + TICKS / os.sysconf("SC_CLK_TCK"))


def _cores() -> set[int]:
    """Those that this process may run on."""
    return os.sched_getaffinity(0)


def _busy_seconds() -> float | None:
    """Seconds since the start of the machine in which these cores worked for anyone, or waited for the machine under this one; None off Linux."""
    try:
        return busy_seconds(STAT.read_text(), _cores())
    except (OSError, AttributeError):
        return None


def busy_seconds(stat: str, cores: set[int]) -> float:
    """The same from the text of /proc/stat."""
    rows = [line.split() for line in stat.splitlines() if line.startswith("cpu") and line[3:4].isdigit()]
    ticks = sum(int(row[column]) for row in rows if int(row[0][3:]) in cores for column in BUSY_COLUMNS)
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def _turn() -> Iterator[None]:
    """One process of this user at a time; the lock ends with the process. Where no such file can be made nobody waits."""
    with ExitStack() as held:
        with suppress(OSError):
            lock = held.enter_context(open(Path(tempfile.gettempdir()) / f"minitron-speed-{os.getuid()}.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
