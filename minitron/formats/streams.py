"""A file's bytes in order, packed (.gz, .zst) or not, and what can be wrong with a file said in one line."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

PACKED = (".gz", ".zst")
MOST_UNPACKED, MOST_TIMES = 2**28, 500  # bytes from which on a packed file may not be so many times smaller than what it holds: one of nothing but "a" is 1,000
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHUNK_BYTES = 2**20
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# How files begin that are no text, and what may be done about it; {name} is the file's.
NO_TEXT = (
    (b"\xff\xfe\x00\x00", "it begins like UTF-32: iconv -f UTF-32 -t UTF-8 {name} > utf8-{name}"),
    (b"\xff\xfe", "it begins like UTF-16: iconv -f UTF-16 -t UTF-8 {name} > utf8-{name}"),
    (b"\xfe\xff", "it begins like UTF-16: iconv -f UTF-16 -t UTF-8 {name} > utf8-{name}"),
    (b"\x1f\x8b", "it begins like a file packed by gzip, whose name ends in .gz"),
    (b"\x28\xb5\x2f\xfd", "it begins like a file packed by zstd, whose name ends in .zst"),
)


@dataclass(frozen=True, slots=True)
class Given:
    """A file to be read, what messages call it, and how far a block goes; the rest as in `minitron.formats.files.blocks_of`."""

    path: Path
    name: str
    block_bytes: int
    columns: Callable[[list[str]], list[str]] | None = None
    cut_kib: int = 0


def wrong(name: str, what: str) -> ValueError:
    """The error of a user's file, in one line: `data.files: NAME what`."""
    return ValueError(f"data.files: {name} {' '.join(what.split())}")


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Turns what the disk and the libraries say of a file into `wrong`; a plain ValueError is the project's own and goes on as it is."""
    try:
        yield
    except Exception as error:  # pyarrow's are of many kinds: KeyError, NotImplementedError, its own
        if not isinstance(error, OSError | EOFError | zlib.error | csv.Error | UnicodeError | json.JSONDecodeError) and type(error).__module__ != "pyarrow.lib":
            raise
        said = str(error)
        if isinstance(error, EOFError) or "Truncated" in said:  # gzip's word, pyarrow's for zstd
            raise wrong(name, f"is cut off ({said})") from None
        raise wrong(name, f"cannot be read ({type(error).__name__}: {said[:300]})") from None


def not_text(name: str, data: bytes, offset: int, base: int = 0) -> ValueError:
    """The error of a byte that is no UTF-8, `data[offset]`, where `data` begins `base` bytes into the file."""
    guess = next((words.format(name=name) for begin, words in NO_TEXT if base == 0 and data.startswith(begin)), "its text must be UTF-8, e.g. by iconv")
    return wrong(name, f"is not UTF-8 (byte 0x{data[offset]:02x} at {base + offset:,}); {guess}")


def check_beginning(path: Path, name: str) -> None:
    """Refuse what no reader takes: a file without a byte, and what Git LFS leaves in the place of a file. Raises ValueError."""
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
    if not head:
        raise wrong(name, "is empty")
    if head == LFS_POINTER:
        raise wrong(name, "is the pointer that Git LFS leaves in the place of a file; `git lfs pull` brings the file itself")


class Stream:
    """The text bytes of a file from `start` on, unpacked where its name says so, without a byte order mark.

    `position` counts bytes of text, unpacked. A context manager. Raises ValueError for what begins like no UTF-8, and, in `read`, for a file that is packed
    to fill a memory.
    """

    def __init__(self, path: Path, name: str, start: int = 0) -> None:
        self.position, self.ended, self._name = 0, False, name
        self._raw = path.open("rb")
        self._file = _unpacked(self._raw, path.suffix.lower())
        self._packed = self._file is not self._raw
        self._ahead = b""
        head = self.read(4)
        if any(head.startswith(begin) for begin, _ in NO_TEXT):
            raise not_text(name, head, 0 if head[0] > 0x7F else 1)
        self.position, self._ahead = 0, head
        self._skip(max(start, len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._raw.close()

    def _skip(self, target: int) -> None:
        self.ended = False
        if not self._packed:
            self._raw.seek(target)
            self.position, self._ahead = target, b""
        while self.position < target and not self.ended:
            self.read(min(CHUNK_BYTES, target - self.position))

    def read(self, num_bytes: int) -> bytes:
        """So many bytes; fewer, and `ended`, at the end alone."""
        parts, missing = [self._ahead[:num_bytes]], num_bytes - len(self._ahead[:num_bytes])
        self._ahead = self._ahead[num_bytes:]
        while missing and (part := self._file.read(missing)):
            parts.append(part)
            missing -= len(part)
        self.ended = self.ended or missing > 0
        self.position += num_bytes - missing
        if self._packed and self.position > MOST_UNPACKED and self.position > MOST_TIMES * self._raw.tell():
            raise wrong(self._name, f"unpacks to more than {MOST_TIMES} times its size, as no text does: {self.position:,} bytes so far")
        return b"".join(parts)

    def disk(self, position: int) -> int:
        """Bytes of the file on disk that hold its text up to `position`; of a packed one, those read so far."""
        return self._raw.tell() if self._packed else position


def _unpacked(raw: BinaryIO, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return raw
