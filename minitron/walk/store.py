"""The store: one folder per stage and key. done.json is written last, by rename: present means whole.

done.json vouches for the files beside it (integrity.py), which have reached the disk before it. A result that is not what was written is named and made anew.

key = 12 hex of SHA-256 over the store's format, the stage, its version, the settings that change its results and what they follow
from in its inputs. Other settings give another folder, never a warning and never a stale result.
"""

import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.walk.integrity import SMALL_BYTES, are_files, damage, digest_of_text, named, synced, vouch_for

DONE = "done.json"
FORMAT = 2  # rises when keys change for all stages: what they are made of, or how
FORMAT_FILE, EARLIER_FILE = "format.json", "earlier.txt"
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, slots=True)
class Result:
    """A finished stage: its folder and what done.json says."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the stage returned."""
        return self.record["facts"]

    @property
    def key(self) -> str:
        return self.record["key"]

    @property
    def identity(self) -> str:
        """What later keys hold of it: of a checkpoint that was handed over its contents, wherever they lie; of all else its own key."""
        return self.facts.get("identity", self.key)

    @property
    def model_folder(self) -> Path:
        """The checkpoint folder that the stage leaves; a path in its facts is relative to the result's folder."""
        return self.folder / self.facts["path"]


def make_runs_folder(path: str) -> None:
    """Raises ValueError where it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"runs_folder is {path!r}, which cannot be made a folder: {error.strerror}") from None


def check_format(runs_folder: str, say: Callable[[str], None]) -> None:
    """Mark the store as one of this format; results of an earlier one are listed in earlier.txt, and a line says so as long as they are there.

    Raises ValueError for a store of a later format.
    """
    store = Path(runs_folder) / "store"
    listed, found = store / EARLIER_FILE, _format_of(store)
    if found > FORMAT:
        raise ValueError(f"runs_folder is {runs_folder!r}, whose results a later version of minitron has made (format {found}, this one reads {FORMAT}); "
                         "give another runs_folder, or update minitron")  # fmt: skip
    if found < FORMAT:
        with suppress(OSError), locked(store, lambda _text: None):  # one that cannot be written to can be read
            if _format_of(store) < FORMAT:
                store.mkdir(exist_ok=True)
                if earlier := _earlier_results(store):
                    listed.write_text("".join(f"{folder}\n" for folder in earlier))
                write_json(store / FORMAT_FILE, {"format": FORMAT, "digest": digest_of({"format": FORMAT})})
    if listed.exists() and (number := sum((store / folder).exists() for folder in listed.read_text().split())):
        delete = f"(cd {shlex.quote(str(store))} && xargs rm -r < {EARLIER_FILE})"
        say(f"{store}: {number} results are of an earlier version and are not used; to delete them: {delete}")


def _format_of(store: Path) -> int:
    """The format that a store's mark says; 1 for one from before there was a mark, or not there yet, and where the mark is not what was written."""
    mark = _mark(store)
    return mark["format"] if mark else 1


def mark_damage(store: Path) -> str | None:
    """What is wrong with a store's mark, in a clause; None where nothing is, and where there is none."""
    return "it cannot be read as what was written" if (store / FORMAT_FILE).exists() and not _mark(store) else None


def _mark(store: Path) -> dict[str, Any] | None:
    """What a store's mark says; None where there is none, or it is not what was written. Earlier ones have no digest."""
    try:
        found = json.loads((store / FORMAT_FILE).read_text(encoding="utf-8"))
        whole = isinstance(found["format"], int) and (found.keys() == {"format"} or found["digest"] == digest_of(found))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found if whole else None


def _earlier_results(store: Path) -> list[str]:
    """Folders below the store of results whose record says an earlier format or none, and of their measurements."""
    earlier = []
    for path in sorted(store.glob(f"*/*/{DONE}")):
        try:
            record = json.loads(path.read_text())
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(given := record.get("format", 1), int) and given < FORMAT:
            stage, key = path.parts[-3:-1]
            earlier += [f"{stage}/{key}", *([f"measurements/{stage}-{key}"] if (store / "measurements" / f"{stage}-{key}").is_dir() else [])]
    return earlier


def stage_key(stage: str, version: int, settings: Any, inputs: Mapping[str, Any]) -> str:
    """12 hex digits that change whenever anything that determines the stage's results does."""
    parts = {"format": FORMAT, "stage": stage, "version": version, "settings": settings, "inputs": inputs}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def find_result(folder: Path) -> Result | None:
    """The finished result in a stage folder, or None where it is absent, half made, or not what was written, by its record and its files' sizes. Raises OSError
    where something of it is there and cannot be read."""
    record = _record(folder)
    return Result(folder=folder, record=record) if isinstance(record, dict) and not damage(folder, record.get("files", {})) else None


def damaged(folder: Path, most_bytes: float = SMALL_BYTES) -> str | None:
    """What is wrong with a result that was finished, in a clause, as integrity.damage finds it; None where nothing is, and where there is none. Raises OSError
    as integrity.damage does."""
    record = _record(folder)
    if record is None or isinstance(record, str):
        return record
    return damage(folder, record.get("files", {}), most_bytes)


def _record(folder: Path) -> dict[str, Any] | str | None:
    """What done.json says; a clause where it is damaged, None where it is absent. Raises OSError where it cannot be read."""
    path = folder / DONE
    try:
        with named(path):
            record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        return f"{DONE} cannot be read as what was written"
    return record if _is_record(record) else f"{DONE} is not what was written"


def _is_record(record: Any) -> bool:
    """Whether it is what `finish` writes; earlier ones have no digest, nor names of files."""
    if not isinstance(record, dict) or not isinstance(record.get("key"), str) or not isinstance(record.get("facts"), dict):
        return False
    whole = "digest" not in record or record["digest"] == digest_of(record)
    return whole and isinstance(record["facts"].get("identity", ""), str) and are_files(record.get("files", {}))


def measurement_damage(path: Path) -> str | None:
    """What is wrong with the record of a measurement (measures/kept.py), in a clause; None where nothing is."""
    return None if read_measurement(path) else "it cannot be read as what was written"


def read_measurement(path: Path) -> dict[str, Any] | None:
    """The record of a measurement; None where there is none, or it is not what was written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and "measured" in found and found.get("digest", digest_of(found)) == digest_of(found)
    return found if whole else None


def digest_of(record: Mapping[str, Any]) -> str:
    """Of plain values as they are read back from JSON, but for their own "digest"."""
    return digest_of_text(json.dumps({name: value for name, value in record.items() if name != "digest"}, sort_keys=True))


def finish(folder: Path, record: Mapping[str, Any]) -> Result:
    """Declare a stage folder whole: its files are on the disk before done.json, and done.json before anybody hears of it."""
    record = json.loads(json.dumps({**record, "files": vouch_for(folder)}))  # as it will be read
    record["digest"] = digest_of(record)
    write_json(folder / DONE, record)
    return Result(folder=folder, record=record)


def discard(folder: Path) -> None:
    """Takes away a result that is not to be used, done.json last of all: what an interruption leaves of it still says that it is damaged, and is never gone on
    from as if it were half made."""
    for path in folder.iterdir():
        if path.name == DONE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    synced(folder)
    shutil.rmtree(folder)


@contextmanager
def still_there(folder: Path) -> Iterator[None]:
    """Raises FileNotFoundError after its block where the folder is another one by then: one that was moved or removed, and made anew without what was in it."""
    before = folder.stat()
    yield
    if not os.path.samestat(before, folder.stat()):
        raise FileNotFoundError(errno.ENOENT, "it was moved or removed while a stage was at work there", str(folder))


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically: a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old one or the whole new one, after a power loss too."""
    partial = path.with_name(path.name + ".partial")
    with named(partial), open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    synced(path.parent)


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, which may have to be made first: the system's words; None where something can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(_lock_of(folder), "a"):
            return None if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        if error.errno in NOT_WRITABLE:
            return error.strerror
        raise


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a stage folder for this process; a second one waits, and `say` tells so. The lock ends with the process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(_lock_of(folder), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run that is working on {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")
