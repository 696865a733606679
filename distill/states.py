"""Saved states: a folder `step-<steps done>` each, written beside its place and renamed into it, so never half made.

A state holds whole tensors by name (tensors.safetensors) and what it is (state.json), whatever engine and number of processes
made it; the latter vouches for the former's bytes and, by a digest of its own, for itself. Tensors are written one at a time. The safetensors format (header
length, JSON header, raw bytes) is written directly because the library's writer needs all of them in memory at once.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open

from distill.engines.engine import Engine, Entry

STATES_FOLDER, TENSORS_FILE, FACTS_FILE = "states", "tensors.safetensors", "state.json"
BEST = "best"  # the weights with the lowest held-out loss
PIECE_BYTES = 2**24
CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL"}


@dataclass(frozen=True, slots=True)
class State:
    """A saved state on disk; `facts` is its state.json."""

    folder: Path
    facts: Mapping[str, Any]


def newest_state(folder: Path) -> State | None:
    """The state of the most steps in a run's folder, None where there is none."""
    names = sorted((folder / STATES_FOLDER).glob("step-*[0-9]"))
    return _read(names[-1]) if names else None


def best_state(folder: Path) -> State | None:
    """The weights with the lowest held-out loss, None where none was measured."""
    path = folder / STATES_FOLDER / BEST
    return _read(path) if path.exists() else None


def _read(path: Path) -> State:
    try:
        facts = json.loads((path / FACTS_FILE).read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"the state {path} cannot be read: {FACTS_FILE} is not what was written ({type(error).__name__})") from None
    return State(path, facts)


def drop_damaged(folder: Path) -> list[str]:
    """Deletes states that are not what was written, from the newest back to the first that is; gives a sentence on each. Without its best weights a run cannot
    be gone on with, so then all go. Called by one process, before any reads them."""
    states, said = folder / STATES_FOLDER, []
    best = (states / BEST).exists() and _damage(states / BEST)
    for path in sorted(states.glob("step-*[0-9]"), reverse=True):
        if not (problem := best or _damage(path)):
            break
        shutil.rmtree(path)
        said.append(f"{path}: {problem}; it is not used")
    if best:
        shutil.rmtree(states / BEST)
    return said


def _damage(state: Path) -> str | None:
    """How a state differs from what was written, in a clause; None where it does not, as far as is known: earlier versions kept no digest."""
    try:
        facts = json.loads((state / FACTS_FILE).read_text(encoding="utf-8"))
        written = facts.get("tensors")
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        return f"{FACTS_FILE} cannot be read as what was written"
    if facts.get("digest", _digest_of(facts)) != _digest_of(facts):
        return f"{FACTS_FILE} is not what was written"
    path, digest = state / TENSORS_FILE, xxhash.xxh3_64()
    if not path.exists():
        return f"{TENSORS_FILE} is missing"
    if written is None:
        return None
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return None if [path.stat().st_size, digest.hexdigest()] == written else f"{TENSORS_FILE} holds other bytes than were written"


def save_state(folder: Path, engine: Engine, entries: Sequence[Entry], facts: Mapping[str, Any], *, name: str, keep: int | None = None) -> None:
    """Save entries of the engine as `folder`/states/`name`; only the newest `keep` steps' states stay, None deletes none.

    All processes call it, the first one writes. Raises ValueError in all of them where the disk refuses; what was saved before stays.
    """
    place = folder / STATES_FOLDER / name
    partial = place.with_name(f"{name}.partial")
    disk = _Disk(at_work=engine.launch.rank == 0)
    disk.attempt(lambda: shutil.rmtree(partial, ignore_errors=True))
    disk.attempt(lambda: partial.mkdir(parents=True))
    file = disk.attempt(lambda: _HashedFile(partial / TENSORS_FILE))
    disk.attempt(lambda: file.write(_header(entries)))
    for entry in entries:
        whole = entry.whole()
        assert tuple(whole.shape) == entry.shape and whole.dtype == entry.dtype, f"{entry.name} is not as announced"
        disk.attempt(lambda whole=whole: file.write(whole.contiguous().reshape(-1).view(torch.uint8).numpy()))
    disk.attempt(lambda: file.close())
    disk.attempt(lambda: _write_facts(partial / FACTS_FILE, {**facts, "tensors": file.written}))
    disk.attempt(lambda: _sync_folder(partial))
    disk.attempt(lambda: shutil.rmtree(place, ignore_errors=True))  # of an earlier sitting, which this one has overtaken
    disk.attempt(lambda: partial.rename(place))
    disk.attempt(lambda: _sync_folder(place.parent))
    disk.attempt(lambda: _remove_old(folder / STATES_FOLDER, keep))
    if engine.sum([float(disk.error is not None)])[0]:
        shutil.rmtree(partial, ignore_errors=True)
        before = newest_state(folder)
        kept = f"the state {before.folder} is as it was" if before else "none was saved before"
        raise ValueError(f"the state cannot be saved as {place} ({disk.error.strerror if disk.error else 'the first process says why'}); {kept}")


class _Disk:
    """Writes in the first process alone, and nothing more after an error, while all go on gathering: none waits for another for ever."""

    def __init__(self, *, at_work: bool):
        self.at_work, self.error = at_work, None

    def attempt(self, action: Callable[[], Any]) -> Any:
        if not self.at_work or self.error:
            return None
        try:
            return action()
        except OSError as error:
            self.error = error
            return None


class _HashedFile:
    """A file that is written from its beginning to its end; once it is closed it is on the disk, and `written` says its bytes and their digest (xxh3)."""

    def __init__(self, path: Path):
        self.file, self.digest, self.written = path.open("wb"), xxhash.xxh3_64(), []

    def write(self, piece: bytes | np.ndarray) -> None:
        self.digest.update(piece)
        self.file.write(piece)

    def close(self) -> None:
        self.written = [self.file.tell(), self.digest.hexdigest()]
        _close(self.file)


def _close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sync_folder(folder: Path) -> None:
    """The names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(entries: Sequence[Entry]) -> bytes:
    header, offset = {}, 0
    for entry in entries:
        size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    facts = json.loads(json.dumps(facts))  # as they will be read
    file = path.open("wb")
    file.write(json.dumps({**facts, "digest": _digest_of(facts)}, indent=2).encode())
    _close(file)


def _digest_of(facts: Mapping[str, Any]) -> str:
    """Of plain values, but for their own "digest"."""
    return xxhash.xxh3_64_hexdigest(json.dumps({name: value for name, value in facts.items() if name != "digest"}, sort_keys=True).encode())


def _remove_old(states: Path, keep: int | None) -> None:
    for path in states.glob("*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(states.glob("step-*[0-9]"))[:-keep] if keep else []:
        shutil.rmtree(path, ignore_errors=True)


def restore_state(state: State, engine: Engine) -> None:
    """Put a saved state into an engine."""
    with _opened(state) as file:
        engine.restore(_Stored(file))


@contextmanager
def _opened(state: State) -> Iterator[Any]:
    """The tensors of a state. Raises ValueError where they are not those that were written."""
    try:
        with safe_open(state.folder / TENSORS_FILE, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the state {state.folder} cannot be read: {' '.join(str(error).split())[:300]}") from None


class _Stored:
    """An open file of a state, as an engine reads it."""

    def __init__(self, file):
        self.file = file

    def names(self) -> Iterable[str]:
        return self.file.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(name).get_shape())

    def whole(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name)

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        return self.file.get_slice(name)[first:end]


def remove_states(folder: Path) -> None:
    """Delete what a finished run needs no more: all states but the best weights."""
    for path in [*(folder / STATES_FOLDER).glob("step-*"), *(folder / STATES_FOLDER).glob("*.partial")]:
        shutil.rmtree(path, ignore_errors=True)
    if (folder / STATES_FOLDER).exists() and not any((folder / STATES_FOLDER).iterdir()):
        (folder / STATES_FOLDER).rmdir()


@torch.no_grad()
def load_weights(state: State, model: torch.nn.Module) -> None:
    """Copy a saved state's weights into a whole model."""
    stored = {id(parameter): name for name, parameter in model.named_parameters()}  # of tied ones the first name alone
    with _opened(state) as file:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if stored.get(id(tensor), name) == name:
                found = file.get_tensor(f"model.{name}")
                if found.shape != tensor.shape:
                    raise ValueError(f"the state {state.folder} is of another model: {name} has the shape {list(found.shape)}, here {list(tensor.shape)}")
                tensor.copy_(found)
