"""The store: one folder per stage and key. done.json is written last, by rename: present means whole.

key = 12 hex of SHA-256 over the stage, its version, the settings that change its results and the keys of
its inputs. Other settings give another folder, never a warning and never a stale result.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DONE = "done.json"


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
    def model_folder(self) -> Path:
        """The checkpoint folder that the stage leaves; a path in its facts is relative to the result's folder."""
        return self.folder / self.facts["path"]


def make_runs_folder(path: str) -> None:
    """Raises ValueError where it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"runs_folder is {path!r}, which cannot be made a folder: {error.strerror}") from None


def stage_key(stage: str, version: int, settings: Any, input_keys: Mapping[str, str]) -> str:
    """12 hex digits that change whenever anything that determines the stage's results does."""
    text = json.dumps({"stage": stage, "version": version, "settings": settings, "inputs": dict(sorted(input_keys.items()))}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def find_result(folder: Path) -> Result | None:
    """The finished result in a stage folder, or None where it is absent or half made."""
    try:
        return Result(folder=folder, record=json.loads((folder / DONE).read_text()))
    except FileNotFoundError:
        return None


def finish(folder: Path, record: Mapping[str, Any]) -> Result:
    """Declare a stage folder whole."""
    write_json(folder / DONE, record)
    return Result(folder=folder, record=record)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically: a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old one or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


@contextmanager
def locked(folder: Path, say: Any) -> Iterator[None]:
    """Hold a stage folder for this process; a second one waits, and `say` tells so. The lock ends with the process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run that is working on {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
