"""Faults: what can befall a run, drawn from a seed, and how it is brought about.

Most are calls on files that go wrong, said by SOAK_ variables in the run's environment (soak_preload.c says them all). What hears them is a small library
between the run and the C library, where there is a C compiler and this is Linux; elsewhere soak_standin.py, which reaches what Python itself calls alone.
"""

import errno
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

SOURCE = Path(__file__).with_name("soak_preload.c")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FIRST_SECONDS = 1.0  # of a run before its first stage
CHANGES = "owtnum"  # kinds of calls that change a disk; s syncs it, r reads


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong: by a call in the run (`environment`), by a `signal` so many seconds after it began, or as who reads its output `leaves`.

    `harmless` faults do not end a run; `codes` are the exit codes that a run may end in on any other, beside 0 where the fault came too late. Of several
    `processes` of a run each may say its line.
    """

    kind: str
    environment: Mapping[str, str] = field(default_factory=dict)
    signal: int = 0
    seconds: float = 0.0
    leaves: bool = False
    harmless: bool = False
    codes: tuple[int, ...] = (1, 2)
    processes: int = 1

    def __str__(self) -> str:
        values = [f"{name.removeprefix('SOAK_').lower()}={value}" for name, value in self.environment.items() if name != "SOAK_VANISHES"]
        values += [f"after {self.seconds:.2f} s"] * bool(self.signal)
        return f"{self.kind} ({', '.join(values)})" if values else self.kind


def compiled(folder: Path) -> Path | None:
    """The library, made in a folder; None where it cannot be made or would not be heard."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "soak_preload.so"
    made = subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], capture_output=True)
    return library if made.returncode == 0 else None


def codes_of(number: int) -> tuple[int, ...]:
    """What a run may end in on a signal."""
    return (-number,) if number == signal.SIGKILL else (130,)


def _calls(kind: str, do: str, calls: str, counts: Mapping[str, int], chance: random.Random, **more) -> Fault:
    """At one of the calls that are to come, by how many of each kind there are."""
    number = max(1, sum(counts.get(call, 0) for call in calls))
    environment = {"SOAK_DO": do, "SOAK_CALLS": calls, "SOAK_AT": str(chance.randint(1, number))}
    return Fault(kind, environment | more.pop("environment", {}), **more)


def killed_at_a_moment(seconds: float, _counts: Mapping[str, int], chance: random.Random) -> Fault:
    number = chance.choice(SIGNALS)
    return Fault(f"{number.name} at a random moment", signal=number, seconds=chance.uniform(0, FIRST_SECONDS + seconds), codes=codes_of(number))


def killed_while_imported(seconds: float, chance: random.Random) -> Fault:
    """Of a process that begins as users' do, with the seconds of its imports."""
    number = chance.choice(SIGNALS[1:])
    return Fault(f"{number.name} while libraries are imported", signal=number, seconds=chance.uniform(0, seconds), codes=codes_of(number))


def killed_in_a_rename(_seconds: float, counts: Mapping[str, int], chance: random.Random) -> Fault:
    number, when = chance.choice(SIGNALS), chance.choice(["before", "after"])
    return _calls(f"{number.name} {when} a rename", f"kill {number.value}", "n", counts, chance, environment={"SOAK_WHEN": when}, codes=codes_of(number))


def killed_in_a_change(_seconds: float, counts: Mapping[str, int], chance: random.Random) -> Fault:
    """In the middle of a write, or around making, syncing and removing files."""
    number, when, calls = chance.choice(SIGNALS), *chance.choice([("middle", "w"), ("before", "ou"), ("after", "ou"), ("after", "m"), ("before", "s")])
    return _calls(f"{number.name} in a change of the disk", f"kill {number.value}", calls, counts, chance, environment={"SOAK_WHEN": when},
                  codes=codes_of(number))  # fmt: skip


def full_disk(_seconds: float, counts: Mapping[str, int], chance: random.Random) -> Fault:
    number = chance.choice([errno.ENOSPC, errno.ENOSPC, errno.EDQUOT])
    return _calls("full disk", f"stay {number}", chance.choice(["w", "owtm"]), counts, chance)


def read_only(_seconds: float, counts: Mapping[str, int], chance: random.Random) -> Fault:
    return _calls("disk turned read-only", f"stay {errno.EROFS}", CHANGES, counts, chance)


def input_output_error(_seconds: float, counts: Mapping[str, int], chance: random.Random) -> Fault:
    how, calls = chance.choice(["once", "stay"]), chance.choice(["w", "r", "s", "n", "o", "wrsnout"])
    return _calls("EIO", f"{how} {errno.EIO}", calls, counts, chance)


def short_calls(_seconds: float, counts: Mapping[str, int], chance: random.Random) -> Fault:
    return _calls("short reads and writes", "short 0", "rw", {}, chance, harmless=True)


def clock_jumps(_seconds: float, counts: Mapping[str, int], chance: random.Random) -> Fault:
    return _calls("clock jumps", "clock 0", "", {}, chance, environment={"SOAK_AT": str(chance.randint(1, 10**6))}, harmless=True)


def reader_leaves(_seconds: float, _counts: Mapping[str, int], _chance: random.Random) -> Fault:
    return Fault("its reader has gone, as of `| head -1`", leaves=True, harmless=True)


def vanishing(folders: Sequence[Path], counts: Mapping[str, int], chance: random.Random) -> Fault:
    """A folder that is moved away under the run."""
    return _calls("vanished folder", "vanish 0", "rown", counts, chance, environment={"SOAK_VANISHES": str(chance.choice(folders))}, codes=(1, 2))


# Of a single run, with how often each is drawn.
DRAWN = {killed_at_a_moment: 5, killed_in_a_rename: 4, killed_in_a_change: 4, full_disk: 4, read_only: 2, input_output_error: 5, vanishing: 2, short_calls: 1,
         clock_jumps: 1, reader_leaves: 1}  # fmt: skip
HEARD = "ronum"  # kinds of calls that soak_standin.py hears
KILLS = (killed_at_a_moment, killed_in_a_rename, killed_in_a_change)
STANDS_IN = (*KILLS, full_disk, read_only, input_output_error, vanishing, reader_leaves)  # what goes without the library


def drawn(seconds: float, folders: Sequence[Path], counts: Mapping[str, int], chance: random.Random, *, preloaded: bool) -> Fault:
    """A fault of a run that would take so many seconds and so many calls of each kind, in which `folders` may vanish."""
    table = {draw: weight for draw, weight in DRAWN.items() if preloaded or draw in STANDS_IN}
    (draw,) = chance.choices(list(table), weights=list(table.values()))
    fault = draw(folders if draw is vanishing else seconds, counts, chance)
    if preloaded or "SOAK_CALLS" not in fault.environment:
        return fault
    heard = "".join(call for call in fault.environment["SOAK_CALLS"] if call in HEARD) or "on"
    return replace(fault, environment={**fault.environment, "SOAK_CALLS": heard, "SOAK_AT": str(chance.randint(1, max(1, sum(map(counts.get, heard)))))})
