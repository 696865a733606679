"""A store as a whole: is all of it what was written, who uses what, and what nobody does."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from memory_budget.units import GIB
from minitron.walk.console import Console
from minitron.walk.store import DONE, FORMAT_FILE, damaged, discard, find_result, locked, mark_damage, measurement_damage

MEASUREMENTS = "measurements"


@dataclass(frozen=True, slots=True)
class Stored:
    """A stage's folder in the store: its place there (stage/key), its bytes, whether it is finished."""

    place: str
    bytes: int
    finished: bool


def verify(store: Path, console: Console) -> bool:
    """Holds every byte of every finished result against what was written; says what is not, and whether all is."""
    results = [folder for folder in _folders(store) if (folder / DONE).exists()]
    files = sorted(store.glob(f"{MEASUREMENTS}/*/*.json"))
    total = sum(_bytes(folder) for folder in results) + sum(path.stat().st_size for path in files)
    unknown = bad = 0
    with console.track("reading", total / GIB, "GiB") as advance:
        for folder in results:
            if said := _said_of(folder):
                console.headline("verify", f"{folder}: {said}; the next run that needs it makes it again")
                bad += 1
            elif (result := find_result(folder)) is not None and "files" not in result.record:
                unknown += 1
            advance(_bytes(folder) / GIB)
        for path in files:
            if said := measurement_damage(path):
                console.headline("verify", f"{path}: {said}; it is measured again when it is asked for")
                bad += 1
        if said := mark_damage(store):
            console.headline("verify", f"{store / FORMAT_FILE}: {said}; the next run writes it again")
            bad += 1
    of_before = f", {unknown} of an earlier version, of which no digests are known" if unknown else ""
    found = f"{bad} not as written" if bad else "all as written"
    console.headline("verify", f"{len(results)} results and {len(files)} measurements, {total / GIB:,.2f} GiB read: {found}{of_before}")
    return not bad


def _said_of(result: Path) -> str | None:
    """What is wrong with a finished result, what cannot be read among it; None where nothing is."""
    try:
        return damaged(result, float("inf"))
    except OSError as error:
        return f"{Path(error.filename or result).name} cannot be read ({error.strerror})"


def tidy(store: Path, used: Mapping[str, set[str]], console: Console, *, remove: bool) -> None:
    """Says what is stored, by run (`used`: places in the store by the name of the run that uses them), and what no run uses; `remove` has that removed.

    What is not finished is left: an interrupted run goes on from it. So is what another process is working on.
    """
    stored = {one.place: one for one in _stored(store)}
    for name, places in sorted(used.items()):
        found = [stored[place] for place in places if place in stored]
        shared = sum(one.bytes for one in found if sum(one.place in others for others in used.values()) > 1)
        console.headline("tidy", f"{name}: {len(found)} results, {_size(sum(one.bytes for one in found))}, of which {_size(shared)} are other runs' too")
    everything = set().union(*used.values()) if used else set()
    unused = [one for one in stored.values() if one.finished and one.place not in everything]
    unfinished = [one for one in stored.values() if not one.finished]
    if unfinished:
        console.headline("tidy", f"not finished, left for the runs that go on from them: {len(unfinished)}, {_size(sum(one.bytes for one in unfinished))}")
    for one in unused:
        console.headline("tidy", f"{'removed' if remove else 'used by no run'}: {one.place}, {_size(one.bytes)}")
        if remove:
            with locked(store / one.place, console.say):
                discard(store / one.place)
    total = _size(sum(one.bytes for one in unused))
    after = "" if remove or not unused else "; tidy.remove=true removes them"
    console.headline("tidy", f"{len(stored)} results, {_size(sum(one.bytes for one in stored.values()))}; {len(unused)} used by no run, {total}{after}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:,.1f} MiB"


def _stored(store: Path) -> Iterator[Stored]:
    return (Stored(folder.relative_to(store).as_posix(), _bytes(folder), (folder / DONE).exists()) for folder in _folders(store))


def _folders(store: Path) -> list[Path]:
    """Raises ValueError where there is no store."""
    if not store.is_dir():
        raise ValueError(f"runs_folder is {str(store.parent)!r}, where no run has stored anything yet")
    return [folder for folder in sorted(store.glob("*/*")) if folder.is_dir() and folder.parent.name != MEASUREMENTS]


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
