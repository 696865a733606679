"""The teacher's top k at every position of rows of tokens, on disk: written once, read by any number of runs.

A cache is a folder: `codes.bin` uint8 [R, T, bytes a token] (distill.top_k.TopKCode), `written.bin` uint8 [R] (1: the row
is there) and `meta.json`, which comes last: present means whole. Until then `meta.partial.json` says what is being made.
R rows, B batch, T tokens, K kept tokens.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from distill.top_k import TopK, TopKCode

CODES, WRITTEN, META, PARTIAL_META = "codes.bin", "written.bin", "meta.json", "meta.partial.json"
FORMAT = 1  # of the codes; raise it when TopKCode changes


@dataclass(frozen=True, slots=True)
class CacheMeta:
    """What a cache holds: of which teacher and rows, how many of each, and how it is coded.

    `teacher` is whatever text tells teachers apart, `rows` is fingerprint_rows of the rows.
    """

    teacher: str
    rows: str
    vocabulary: int
    k: int
    num_rows: int
    row_tokens: int
    format: int = FORMAT

    @property
    def code(self) -> TopKCode:
        return TopKCode(self.vocabulary, self.k)

    @property
    def codes_bytes(self) -> int:
        """Size of codes.bin."""
        return self.num_rows * self.row_tokens * self.code.bytes_per_token


def fingerprint_rows(rows_RT: np.ndarray) -> str:
    """12 hex digits that change with any token of the rows or with their shape."""
    digest = hashlib.sha256(str(rows_RT.shape).encode())
    for start in range(0, len(rows_RT), 4096):
        digest.update(np.ascontiguousarray(rows_RT[start : start + 4096], dtype="<i4").data)
    return digest.hexdigest()[:12]


def write_teacher_cache(
    folder: Path,
    rows_RT: np.ndarray,
    *,
    teacher: str,
    vocabulary: int,
    k: int,
    top_k_of_rows: Callable[[torch.Tensor], TopK],
    block_rows: int = 16,
    share: tuple[int, int] = (0, 1),
    on_block: Callable[[int, int], None] | None = None,
) -> None:
    """Write a cache, or what is missing of it: rows that an earlier call finished stay, whatever its blocks were.

    `top_k_of_rows` takes rows int64 [B ≤ block_rows, T], padding included, and gives their TopK, at padding anything finite.
    With `share` (r, n) this process does every n-th block from the r-th on; whoever finishes the last row makes the cache
    whole. `on_block` hears (rows written, rows) after each block. Raises ValueError where the folder holds a cache, whole
    or begun, of something else, and names what differs; OSError at the start where the disk has no room for all of it.
    """
    meta = CacheMeta(teacher, fingerprint_rows(rows_RT), vocabulary, k, *rows_RT.shape)
    if (folder / META).exists():
        _check_same(folder, _read_meta(folder / META), asdict(meta))
        return
    _begin(folder, meta)
    written_R = np.memmap(folder / WRITTEN, dtype=np.uint8, mode="r+")
    with open(folder / CODES, "r+b") as codes:
        for first in range(share[0] * block_rows, meta.num_rows, share[1] * block_rows):
            missing_B = first + np.flatnonzero(written_R[first : first + block_rows] == 0)
            if len(missing_B) == 0:
                continue
            block_BTC = meta.code.encode(top_k_of_rows(torch.from_numpy(rows_RT[missing_B].astype(np.int64)))).reshape(len(missing_B), -1)
            for row, row_codes in zip(missing_B, block_BTC, strict=True):
                codes.seek(int(row) * row_codes.nbytes)
                codes.write(row_codes.data)
            codes.flush()
            os.fsync(codes.fileno())  # the mark must not reach the disk before what it stands for
            written_R[missing_B] = 1
            if on_block:
                on_block(int(np.count_nonzero(written_R)), meta.num_rows)
    if written_R.all():
        _write_json(folder / META, asdict(meta))
        for path in (folder / PARTIAL_META, *folder.glob(f"{PARTIAL_META}.*")):  # those of processes that were killed too
            path.unlink(missing_ok=True)


def rows_written(folder: Path) -> int:
    """How many rows an earlier call has finished."""
    path = folder / WRITTEN
    return int(np.count_nonzero(np.fromfile(path, dtype=np.uint8))) if path.exists() else 0


class TeacherCache:
    """A whole cache, opened for reading; nothing is loaded but the rows asked for."""

    def __init__(self, folder: Path, *, teacher: str | None = None, vocabulary: int | None = None, rows_RT: np.ndarray | None = None):
        """Raises ValueError where there is no whole cache, or one of another teacher, vocabulary or rows than those given."""
        if not (folder / META).exists():
            begun = "; its writing was cut off: run it again" if (folder / PARTIAL_META).exists() else ""
            raise ValueError(f"teacher cache: {folder} holds no whole cache{begun}")
        wanted = {"teacher": teacher, "vocabulary": vocabulary, "rows": None if rows_RT is None else fingerprint_rows(rows_RT), "format": FORMAT}
        self.meta = _read_meta(folder / META)
        _check_same(folder, self.meta, {name: value for name, value in wanted.items() if value is not None})
        if (size := (folder / CODES).stat().st_size) != self.meta.codes_bytes:
            raise ValueError(f"teacher cache: {folder / CODES} has {size:,} bytes; its {META} says {self.meta.codes_bytes:,}")
        shape = (self.meta.num_rows, self.meta.row_tokens, self.meta.code.bytes_per_token)
        self._codes_RTC = np.memmap(folder / CODES, dtype=np.uint8, mode="r", shape=shape)

    def rows(self, indices: Sequence[int] | np.ndarray | slice) -> TopK:
        """The TopK of rows by their index, in the order given: ids int64 [B, T, K], log-probabilities float32 [B, T, K], log mass of the tail [B, T]."""
        return self.meta.code.decode(np.asarray(self._codes_RTC[indices]))


def _begin(folder: Path, meta: CacheMeta) -> None:
    """Make the empty files, or check that a begun cache is the same one."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / PARTIAL_META).exists():
        _check_same(folder, _read_meta(folder / PARTIAL_META), asdict(meta))
        return
    for name, size in ((CODES, meta.codes_bytes), (WRITTEN, meta.num_rows)):
        with open(folder / name, "ab") as file:  # what another process wrote meanwhile stays; a full disk is found before any work
            os.posix_fallocate(file.fileno(), 0, size)
    _write_json(folder / PARTIAL_META, asdict(meta))


def _check_same(folder: Path, found: CacheMeta, wanted: dict) -> None:
    for name, value in wanted.items():
        if getattr(found, name) != value:
            raise ValueError(f"teacher cache: {folder} was made with {name} {getattr(found, name)}, but {value} is asked for; give another folder")


def _read_meta(path: Path) -> CacheMeta:
    try:
        return CacheMeta(**json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"teacher cache: {path} is not a cache's: {error}") from error


def _write_json(path: Path, value: dict) -> None:
    partial = path.with_name(f"{PARTIAL_META}.{os.getpid()}")  # two processes may finish at once
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
