"""Stores to begin from, and what they are held against: the files of a walk that nothing befell."""

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minitron.walk.store import DONE, damaged

# Files whose bytes hold times, rates or the folder's place; of all others the bytes are held against the reference's, of these the names alone.
VOLATILE = {DONE, "metrics.jsonl", "summary.json", "report.md", "report.html", "settings.yaml", "candidates.csv", "candidates.jsonl", "chosen.json",
            "sweep.yaml", "teacher.json", "pruned.json", "student.json"}  # fmt: skip
ROUNDING = 1e-3  # of weights that one process and several have trained in turns


GUESSED = Counter(r=20, o=4, w=5, s=4, n=2, u=1, m=1, t=1)  # calls of a stage where nobody has counted them


@dataclass(frozen=True, slots=True)
class Reference:
    """A walk that nothing befell: its runs folder, its stages' folders in the order in which they were done, what each took, and the calls on files in it by
    kind. The last is the report, which lies beside the store."""

    runs: Path
    run_name: str
    places: Sequence[str]
    seconds: Sequence[float]
    calls: Sequence[Counter]
    contents: dict[str, str] = field(default_factory=dict)

    @property
    def report(self) -> int:
        """Its number among the places."""
        return len(self.places) - 1

    def number_of(self, stage: str) -> int:
        """The first place of a stage."""
        return next(number for number, place in enumerate(self.places) if place.startswith(f"store/{stage}/"))

    def missing(self, runs: Path) -> list[int]:
        """The numbers of the places that another runs folder does not have, in order; the report always, as it is made anew."""
        return [number for number, place in enumerate(self.places) if number == self.report or not (runs / place / DONE).exists()]


def read_reference(runs: Path, run_name: str, log: str = "") -> Reference:
    """The reference that a finished walk is; `log` is what SOAK_LOG got of it."""
    records = [json.loads(path.read_text()) | {"place": path.parent} for path in runs.glob(f"store/*/*/{DONE}")]
    records.sort(key=lambda record: (record["place"] / DONE).stat().st_mtime_ns)
    places = [*(record["place"].relative_to(runs).as_posix() for record in records), run_name]
    calls = {place: Counter() for place in places}
    for line in log.splitlines():
        _, kind, path = line.split(" ", 2)
        if os.path.isabs(path) and Path(path).is_relative_to(runs):
            parts = Path(path).relative_to(runs).parts
            place = "/".join(parts[:3]) if parts[:1] == ("store",) else parts[0] if parts else ""
            if place in calls:
                calls[place][kind] += 1
    if not log:
        calls = dict.fromkeys(places, GUESSED)
    seconds = [*(record["seconds"] for record in records), 1.0]
    return Reference(runs, run_name, places, seconds, [calls[place] for place in places], contents_of(runs))


def contents_of(runs: Path) -> dict[str, str]:
    """Digests of the files of a runs folder whose bytes do not change from walk to walk, "" of all others, by their paths in it; of links where they go to."""
    found = {}
    for path in _files(runs):
        volatile = path.name in VOLATILE or path.suffix in (".png", ".lock", ".md") or "measurements" in path.parts
        name = path.relative_to(runs).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = "" if volatile else hashlib.blake2b(path.read_bytes()).hexdigest()
    return found


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())


def begin(reference: Reference, runs: Path, first: int, *, alone: bool = False, measured: bool = True) -> None:
    """A copy of the reference without the result of the number `first` and all after it, or without it `alone`; with what was `measured`, or without where
    some stage will ask for it again."""
    shutil.copytree(reference.runs, runs, symlinks=True)
    for number, place in enumerate(reference.places):
        if number == first or (number > first and not alone):
            shutil.rmtree(runs / place)
    if not measured and not (runs / reference.places[reference.number_of("evaluate")]).exists():
        shutil.rmtree(runs / "store" / "measurements", ignore_errors=True)


def something_to_do(reference: Reference, runs: Path, chance: random.Random) -> None:
    """Takes one of the quick results, or the report, away from a store in which all is done."""
    quick = [number for number, seconds in enumerate(reference.seconds) if seconds <= sorted(reference.seconds)[len(reference.seconds) // 2]]
    shutil.rmtree(runs / reference.places[chance.choice([*quick, reference.report])], ignore_errors=True)  # the report may not be there yet


def half_made(reference: Reference, runs: Path, *, rounding: bool = False) -> list[str]:
    """What is wrong with results that say they are done, and with the numbers of files that nobody needs any more."""
    found = []
    for path in sorted(runs.glob(f"store/*/*/{DONE}")):
        place = path.parent.relative_to(runs).as_posix()
        if said := damaged(path.parent, float("inf")):
            found.append(f"{place} says that it is done: {said}")
        found += [f"{name}, of a result that says that it is done, is missing" for name in reference.contents
                  if name.startswith(f"{place}/") and not (runs / name).exists()]  # fmt: skip
        for name, digest in contents_of(path.parent).items():
            if digest and reference.contents.get(f"{place}/{name}", digest) != digest and not (rounding and rounded(reference.runs, runs, f"{place}/{name}")):
                found.append(f"{place}/{name} is not what it is undisturbed")
    partial = [path for path in runs.rglob("*") if ".partial" in path.name or path.name.endswith(".tmp")]
    return found + [f"{len(partial)} half-written files: {partial[:3]}"] * (len(partial) > 8)


def differences(reference: Reference, runs: Path, *, rounding: bool = False) -> list[str]:
    """How a finished walk differs from the reference: files that are missing, left over, or hold other bytes; `rounding`: bytes of other numbers."""
    found, wanted = contents_of(runs), reference.contents
    gone = [f"{name} is missing" for name in wanted if name not in found]
    other = [f"{name} is not what it is undisturbed" for name, digest in wanted.items()
             if found.get(name, digest) != digest and not (rounding and rounded(reference.runs, runs, name))]  # fmt: skip
    return gone + other + [f"{name} is left over" for name in found if name not in wanted]


def rounded(wanted: Path, found: Path, name: str) -> bool:
    """Whether the numbers of two files of tensors differ by rounding alone; of other files, as they hold such numbers too, nothing is asked."""
    if not name.endswith(".safetensors"):
        return name.endswith(".json")
    from safetensors.numpy import load_file

    one, other = load_file(wanted / name), load_file(found / name)
    return one.keys() == other.keys() and all(np.allclose(one[tensor], other[tensor], rtol=ROUNDING, atol=ROUNDING) for tensor in one)


def flip(folder: Path, chance: random.Random) -> tuple[Path, int]:
    """Flips one bit of one file in a folder, any file or any byte as likely as the next; gives the file and the bit."""
    files = [path for path in _files(folder) if not path.is_symlink() and path.stat().st_size]
    weights = [path.stat().st_size for path in files] if chance.random() < 0.5 else None
    (path,) = chance.choices(files, weights=weights)
    bytes_ = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(bytes_))
    bytes_[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes_)
    return path, bit
