"""Measurements of checkpoints, each kept by itself: store/measurements/<stage>-<identity of the checkpoint>/<measure>-<key>.json.

A file's key hashes all that the measurement follows from but for the checkpoint, so that another run, or another setting of
something else, finds it again; the teacher's are shared by all runs of that teacher.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minitron.walk.store import Result, digest_of, locked, read_measurement, stage_key, write_json

VERSION = 1  # rises when measurements change for the same settings


def measurements_folder(store: Path, checkpoint: Result) -> Path:
    """Where the measurements of a finished stage's checkpoint lie."""
    return store / "measurements" / f"{checkpoint.record['stage']}-{checkpoint.identity}"


def kept(folder: Path, measure: str, *, of: Mapping[str, Any], make: Callable[[], Any], say: Callable[[str], None]) -> Any:
    """The measurement that was kept, else the one that `make` gives, which is kept from now on. `of` is what it follows from, as plain values. One that is not
    what was written is made again."""
    path = folder / f"{measure}-{stage_key(measure, VERSION, of, {})}.json"
    if (found := read_measurement(path)) is not None:
        return found["measured"]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(path, say):
        if (found := read_measurement(path)) is None:  # and no other run has made it meanwhile
            found = json.loads(json.dumps({"of": of, "measured": make()}))
            write_json(path, found | {"digest": digest_of(found)})
    return found["measured"]
