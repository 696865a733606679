"""What a finished stage wrote, known by the sizes and digests of its files: written to the disk before done.json says so, and looked at before it is used.

A look at sizes costs a call for every file and is had whenever a result is found, with one at the bytes of small files. The digests (xxh3, 64 bits) are of
every byte; all are compared before a stage reads what another one has made, where that costs little beside the reading, and by stage=verify.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from memory_budget.json_files import is_inside

PIECE_BYTES = 2**24
SMALL_BYTES = 2**20  # of a result's files, compared by their bytes whenever it is found: a millisecond
UNVOUCHED = (".partial", ".lock", ".tmp")  # endings of files that nobody will read once the stage is done

_written: dict[Path, tuple[int, int, str]] = {}  # size, time and digest of files that were hashed as they were written


def written_as(path: Path, digest: str) -> None:
    """Remember the digest of a whole file that was just written, so that nobody reads it again to know it."""
    found = path.stat()
    _written[path.resolve()] = (found.st_size, found.st_mtime_ns, digest)


def vouch_for(folder: Path) -> dict[str, list]:
    """Everything in a folder, on the disk by now: [size in bytes, digest] of every file, by its path in the folder."""
    files = {}
    for path in _files(folder):
        digest = _digest_of(path)
        synced(path)
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest]
    for inner in sorted({folder, *(folder / name for name in files), *(path for path in folder.rglob("*") if path.is_dir())}):
        if inner.is_dir():
            synced(inner)
    return files


def synced(path: Path) -> None:
    """A file's bytes, or a folder's names, reach the disk before anything that is written from here on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def are_files(files: Any) -> bool:
    """Whether it is what vouch_for gives: of names within the folder, size and digest."""
    pairs = files.items() if isinstance(files, dict) else [(None, None)]
    return all(is_inside(name) and isinstance(one, list) and len(one) == 2 and type(one[0]) is int and isinstance(one[1], str) for name, one in pairs)


def damage(folder: Path, files: Mapping[str, list], most_bytes: float = SMALL_BYTES) -> str | None:
    """How a folder differs from what was vouched for, in a clause, the first file that does; None where it does not.

    By its files' sizes, and as long as they are together at most `most_bytes`, by their bytes, small files first. Raises OSError where a file is there and
    cannot be read: what it holds is not known then, and nothing that may be whole is given up.
    """
    left = most_bytes
    for name, (size, digest) in sorted(files.items(), key=lambda one: one[1][0]):
        path, left = folder / name, left - size
        try:
            with named(path):
                found = path.stat().st_size
                if found != size:
                    return f"{name} has {found:,} bytes, {size:,} were written"
                if left >= 0 and _hashed(path) != digest:
                    return f"{name} holds other bytes than were written"
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
    return None


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the system say of which file they are: one of a handle does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """A file that a library writes in its block gets the mode of any that is made here, by the user's umask: safetensors makes its own for the user alone."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


def digest_of_text(text: str) -> str:
    """16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink() and not path.name.endswith(UNVOUCHED))


def _digest_of(path: Path) -> str:
    found, known = path.stat(), _written.pop(path.resolve(), None)
    return known[2] if known and known[:2] == (found.st_size, found.st_mtime_ns) else _hashed(path)


def _hashed(path: Path) -> str:
    state = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            state.update(piece)
    return state.hexdigest()
