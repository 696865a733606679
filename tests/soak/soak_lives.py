"""Lives: a store with something left to do, one fault after another, and a last run that nothing befalls; its end is held against the reference."""

import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from soak_faults import KILLS, SIGNALS, Fault, codes_of, drawn, killed_while_imported
from soak_runs import Ended, Run, bring_back, left_behind
from soak_stores import Reference, begin, contents_of, differences, flip, half_made, something_to_do

from minitron.walk.store import DONE

MOST_AHEAD = 2  # stages of which a fault comes in one
IMPORT_SECONDS = 6.0
TOGETHER = ("score", "screen", "distill")  # stages that several processes compute together


@dataclass(slots=True)
class Told:
    """What a life has met: faults by kind, a line on what it was, and what was wrong."""

    title: str
    faults: Counter = field(default_factory=Counter)
    steps: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, ended: Ended, wrong: Sequence[str] = ()) -> None:
        self.steps.append(f"{ended.fault} → {ended.code} in {ended.seconds:.1f} s: {' / '.join(ended.error_lines)[:160]}")
        self.wrong += [f"{ended.fault}: {one}" for one in (*ended.wrong(), *wrong)]
        if ended.was_hit:
            self.faults[ended.fault.kind] += 1


@dataclass(frozen=True, slots=True)
class Soak:
    """What all lives share: how runs are started, with which settings, whether by a process that has loaded the library, and the reference."""

    start: Callable
    settings: tuple[str, ...]
    reference: Reference
    preloaded: bool

    def run(self, folder: Path, *more: str, fault: Fault | None = None, **how) -> Run:
        runs = folder / "runs"
        return Run(self.start, folder, (f"runs_folder={runs}", *self.settings, *more), runs, fault, **how)

    def last(self, told: Told, folder: Path, *, rounding: bool = False) -> None:
        """The run that nothing befalls, and whether all is as in the reference."""
        ended = self.run(folder).end()
        told.wrong += [f"undisturbed: {one}" for one in ended.wrong()] + differences(self.reference, folder / "runs", rounding=rounding)

    def checked(self, told: Told, folder: Path, ended: Ended) -> None:
        """What there is after a fault."""
        told.add(ended, half_made(self.reference, folder / "runs"))

    def ahead(self, runs: Path) -> tuple[float, Counter]:
        """The seconds and the calls of what is to be done next."""
        numbers = self.reference.missing(runs)[:MOST_AHEAD]
        return sum(self.reference.seconds[number] for number in numbers), sum((self.reference.calls[number] for number in numbers), Counter())


def one_run(soak: Soak, folder: Path, chance: random.Random, *, first: int, faults: int, alone: bool = False) -> Told:
    """So many faults, one after another, in the walk from a result of the reference on."""
    told = Told(f"from {soak.reference.places[first]}")
    runs = folder / "runs"
    begin(soak.reference, runs, first, alone=alone, measured=chance.random() < 0.5)
    for _ in range(faults):
        if soak.reference.missing(runs) == [soak.reference.report]:
            something_to_do(soak.reference, runs, chance)
        seconds, calls = soak.ahead(runs)
        folders = [runs, runs / "store", *(runs / soak.reference.places[number] for number in soak.reference.missing(runs)[:1])]
        fault = drawn(seconds, folders, calls, chance, preloaded=soak.preloaded)
        ended = soak.run(folder, fault=fault).end()
        soak.checked(told, folder, ended)
        bring_back(folders)
    told.wrong += left_behind(folder)
    soak.last(told, folder)
    return told


def full_disk(soak: Soak, folder: Path, chance: random.Random, *, first: int, times: int = 3, alone: bool = False) -> Told:
    """A disk of its own, which another program fills while a run is at work, and empties once it has ended. Needs the rights to mount one."""
    told, runs = Told(f"small disk, from {soak.reference.places[first]}"), folder / "runs"
    whole = _blocks(soak.reference.runs)
    with mounted(folder, 4 * whole):
        begin(soak.reference, runs, first, alone=alone, measured=alone)
        for _ in range(times):
            run = soak.run(folder, fault=Fault("full disk of its own"))
            run.first_word.wait()
            time.sleep(chance.uniform(0, soak.ahead(runs)[0]))
            fill(folder / "other")
            ended = run.end()
            (folder / "other").unlink()
            soak.checked(told, folder, ended)
        soak.last(told, folder)
    return told


def fill(file: Path) -> None:
    """Writes until nothing more fits on the disk."""
    with open(file, "wb", buffering=0) as other, suppress(OSError):
        while True:
            other.write(bytes(4096))


def read_only_disk(soak: Soak, folder: Path, chance: random.Random, *, first: int, alone: bool = False) -> Told:
    """A disk that cannot be written to: what is to be done is refused in a line, what is done can be reported. Needs the rights to mount one."""
    told, runs = Told(f"read-only disk, from {soak.reference.places[first]}"), folder / "runs"
    with mounted(folder, 4 * _blocks(soak.reference.runs)):
        begin(soak.reference, runs, first, alone=alone, measured=alone or chance.random() < 0.5)
        _mount("-o", "remount,ro", str(folder))
        ended = soak.run(folder, fault=Fault("read-only disk")).end()
        soak.checked(told, folder, ended)
        told.wrong += ["a read-only disk has not been noticed"] * (ended.code == 0 and first != soak.reference.report)
        _mount("-o", "remount,rw", str(folder))
        soak.last(told, folder)
        _mount("-o", "remount,ro", str(folder))
        for stage in ("all", "report", "verify"):
            ended = soak.run(folder, f"stage={stage}", fault=Fault("finished on a read-only disk", harmless=True)).end()
            soak.checked(told, folder, ended)
        _mount("-o", "remount,rw", str(folder))
    return told


def several_runs(soak: Soak, folder: Path, chance: random.Random, *, first: int, number: int, alone: bool = False) -> Told:
    """So many runs on one store at once, of which some are killed and at least one is not."""
    told, runs = Told(f"{number} runs at once, from {soak.reference.places[first]}"), folder / "runs"
    begin(soak.reference, runs, first, alone=alone, measured=alone or chance.random() < 0.5)
    before, log = {path.parent for path in runs.glob(f"store/*/*/{DONE}")}, folder / "log"
    to_do = [first] if alone else range(first, len(soak.reference.places))
    seconds, calls = sum(soak.reference.seconds[one] for one in to_do), sum((soak.reference.calls[one] for one in to_do), Counter())
    victims = chance.sample(range(number), chance.randint(1, number - 1))
    started = []
    for one in range(number):
        killed = chance.choice(KILLS if soak.preloaded else KILLS[:1])(seconds, calls, chance)
        fault = replace(killed, kind=f"one of {number} runs at once: {killed.kind}") if one in victims else None
        started.append(soak.run(folder, fault=fault, log=log if soak.preloaded else None))
        time.sleep(chance.choice([0, 0, 0.3]))
    for run in started:
        ended = run.end()
        if ended.fault:
            told.add(ended)
        else:
            told.wrong += [f"one of {number} at once: {one}" for one in ended.wrong()]
    told.wrong += half_made(soak.reference, runs) + left_behind(folder)
    if log.exists():
        told.wrong += done_twice(log.read_text(), runs, before)
    soak.last(told, folder)
    return told


def done_twice(log: str, runs: Path, before: set[Path]) -> list[str]:
    """Whether two processes have worked in one stage's folder in turns, or both have finished it; `before`: folders that were done."""
    touched: dict[Path, list[str]] = {}
    finished: Counter = Counter()
    for line in log.splitlines():
        pid, kind, name = line.split(" ", 2)
        path = Path(name)
        if kind in "on" and path.is_relative_to(runs / "store") and len(path.relative_to(runs).parts) > 3 and not path.name.endswith(".lock"):
            folder = path if "measurements" in path.parts else runs.joinpath(*path.relative_to(runs).parts[:3])
            touched.setdefault(folder, []).append(pid)
            finished[folder] += kind == "n" and path.name == DONE
    turns = {folder: [pid for pid, _ in groupby(pids)] for folder, pids in touched.items()}
    found = [f"{folder.relative_to(runs)} was worked on by several at once: {pids}" for folder, pids in turns.items() if len(pids) != len(set(pids))]
    return found + [f"{folder.relative_to(runs)} was finished {times} times" for folder, times in finished.items() if times > 1 or (times and folder in before)]


def other_processes(soak: Soak, folder: Path, chance: random.Random, *, first: int, launch: Callable) -> Told:
    """A result begun by one process and gone on with by two, or the other way round, killed each time, ended by one. `launch` starts two.

    What several processes compute together (scores, training) equals what one computes but for rounding: there the rest is asked for, and that no weight is
    further off than ROUNDING.
    """
    together = soak.reference.places[first].split("/")[1] in TOGETHER
    told, runs = Told(f"one process and two in turns, {soak.reference.places[first]}{', but for rounding' * together}"), folder / "runs"
    begin(soak.reference, runs, first, alone=True)
    turns = [soak.start, launch] if chance.random() < 0.5 else [launch, soak.start]
    for start in turns:
        seconds, _ = soak.ahead(runs)
        number = chance.choice(SIGNALS)
        fault = Fault(f"{number.name}, then another number of processes", signal=number, seconds=chance.uniform(0.2, 1) * seconds, codes=codes_of(number),
                      processes=1 + (start is launch))  # fmt: skip
        ended = replace(soak, start=start).run(folder, fault=fault).end()
        told.add(ended, half_made(soak.reference, runs, rounding=together))
    soak.last(told, folder, rounding=together)
    return told


def beginnings(soak: Soak, folder: Path, chance: random.Random, *, first: int, times: int, launch: Callable) -> Told:
    """Interrupts while a process imports its libraries, which forks do not. `launch` starts one as users do."""
    told, runs = Told(f"real beginnings, {soak.reference.places[first]}"), folder / "runs"
    begin(soak.reference, runs, first, alone=True)
    for _ in range(times):
        soak.checked(told, folder, replace(soak, start=launch).run(folder, fault=killed_while_imported(IMPORT_SECONDS, chance)).end())
    soak.last(told, folder)
    return told


def flipped_state(soak: Soak, folder: Path, chance: random.Random, *, stage: str) -> Told:
    """A training interrupted, and a bit flipped in what it has saved to go on from."""
    told, runs = Told(f"a state of {stage}"), folder / "runs"
    first = soak.reference.number_of(stage)
    begin(soak.reference, runs, first, alone=True)
    at = Fault("SIGTERM while training", {"SOAK_DO": "kill 15", "SOAK_CALLS": "w", "SOAK_AT": str(chance.randint(8, soak.reference.calls[first]["w"] // 3))},
               signal=0 if soak.preloaded else 15, seconds=soak.reference.seconds[first] / 2, codes=(130,))  # fmt: skip
    soak.checked(told, folder, soak.run(folder, fault=at).end())
    if states := sorted((runs / soak.reference.places[first]).glob("states/*")):
        path, bit = flip(states[-1], chance)
        told.steps.append(f"bit {bit} of {path.relative_to(runs)}")
        told.faults["a bit flipped in a saved state"] += 1
    soak.last(told, folder)
    return told


def flips(soak: Soak, folder: Path, chance: random.Random, *, number: int) -> Iterator[Told]:
    """Bits flipped one after another in any file of a finished store: each is named and healed, or harmless."""
    runs = folder / "runs"
    begin(soak.reference, runs, soak.reference.report)
    soak.run(folder).end()
    for _ in range(number):
        before = contents_of(runs)
        path, bit = flip(runs / "store", chance)
        told = Told(f"bit {bit} of {path.relative_to(runs)}")
        fault = Fault("a bit flipped in a finished store", codes=(1,))
        verified = soak.run(folder, "stage=verify", fault=fault).end()
        names = str(path.parent.relative_to(runs)) in verified.stdout or path.name in verified.stdout
        told.faults[fault.kind] += 1
        told.steps.append(f"verify → {verified.code}")
        told.wrong += [f"verify: exit code {verified.code}, {verified.error_lines}"] * (verified.code not in (0, 1))
        told.wrong += ["verify does not name it"] * (verified.code == 1 and not names)
        if "measurements" in path.parts:  # it is looked at when it is asked for, by a stage that is to be done
            shutil.rmtree(runs / soak.reference.places[soak.reference.number_of("evaluate")])
        soak.last(told, folder)
        healed = soak.run(folder, "stage=verify").end()
        told.wrong += [f"verify after the next run: {one}" for one in healed.wrong()]
        told.wrong += [f"{path.name} is as it was flipped" for _ in (1,) if verified.code == 1 and contents_of(runs) != before]
        yield told


def mounted(folder: Path, size: int):
    """A disk of that many bytes in a folder, while in its context."""
    return _Mounted(folder, size)


class _Mounted:
    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size

    def __enter__(self) -> None:
        _mount("-t", "tmpfs", "-o", f"size={self.size}", "none", str(self.folder))

    def __exit__(self, *_raised: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a disk there."""
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _blocks(folder: Path) -> int:
    """Bytes that a folder takes on a disk of pages."""
    return sum(-(-path.lstat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))
