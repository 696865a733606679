"""The rows of one split on their way to the disk: a .npy file that grows, so that no more of it is in memory than was just made."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.batches import PADDING
from minitron.settings.data import DataSettings
from minitron.settings.training import Rows
from minitron.text.rows import Documents, Packer, document_rows, windows

ROW_DTYPE = np.dtype("<i4")
MOST_SOURCES, OTHERS = 1000, "(others)"  # whose documents are counted apart


class GrowingRows:
    """NAME.npy of rows int32 [R, T], written as NAME.partial.npy until it is whole. What `flush` has not seen may be lost; what lies behind
    `num_rows` of an interrupted run is cut off."""

    def __init__(self, path: Path, sequence_length: int, num_rows: int = 0):
        """Raises ValueError where an interrupted run has left fewer rows than it says."""
        self.path, self.partial, self.sequence_length, self.num_rows = path, path.with_suffix(".partial.npy"), sequence_length, num_rows
        if num_rows and not self.partial.exists() and path.exists():  # interrupted between its end and the word that it is done
            path.rename(self.partial)
        self.file = self.partial.open("r+b" if num_rows else "w+b")
        if not num_rows:
            self._write_header()
        self.start = len(_header(self.sequence_length, 0))
        end = self.start + num_rows * sequence_length * ROW_DTYPE.itemsize
        if self.partial.stat().st_size < end and num_rows:
            raise ValueError(f"{self.partial} has fewer rows than were written; delete its folder")
        self.file.seek(end)
        self.file.truncate()

    def append(self, rows_RT: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows_RT, dtype=ROW_DTYPE).data)
        self.num_rows += len(rows_RT)

    def flush(self) -> None:
        """Everything to the disk. Raises OSError where it is full."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def has(self, num_rows: int) -> bool:
        """Whether so many rows are on disk."""
        return self.partial.stat().st_size >= self.start + num_rows * self.sequence_length * ROW_DTYPE.itemsize

    def finish(self) -> None:
        """Say in the header how many rows there are, and take the file's own name."""
        self._write_header()
        self.file.close()
        self.partial.rename(self.path)

    def close(self) -> None:
        """Leave the file as it is, to be gone on with."""
        self.file.close()

    def _write_header(self) -> None:
        self.file.seek(0)
        self.file.write(_header(self.sequence_length, self.num_rows))


def _header(sequence_length: int, num_rows: int) -> bytes:
    """Of one length whatever the number of rows: numpy leaves room for it to grow."""
    from io import BytesIO

    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": ROW_DTYPE.str, "fortran_order": False, "shape": (num_rows, sequence_length)})
    return header.getvalue()


@dataclass(slots=True)
class SplitCounts:
    """What went into a split: documents and their tokens, the longest's, how many documents have up to 2^k tokens, by source, and the rows' tokens and
    sources in their order (of held-out ones alone). Plain values, to be kept beside the rows."""

    documents: int = 0
    tokens: int = 0
    longest: int = 0
    row_tokens: int = 0  # of all rows that were made
    kept_tokens: int = 0  # of those within the split's limit
    lengths: dict[str, int] = field(default_factory=dict)
    by_source: dict[str, list[int]] = field(default_factory=dict)  # documents, tokens
    runs: list[list[Any]] = field(default_factory=list)  # of rows: source, number


class SplitRows:
    """The rows of one split, gathered document by document up to the split's limit of tokens, in <name>.npy of a folder."""

    def __init__(self, name: str, data: DataSettings, path: Path, beginning: Sequence[int] = (), *, limit: int | None = None, state: dict | None = None):
        """`name` is what messages call the split; every row, and every document of a packed one, begins with the ids of `beginning`. `state` is what an
        interrupted run had."""
        self.name, self.data, self.beginning, self.limit = name, data, list(beginning), limit
        self.keeps_sources = name == "heldout" and data.rows is not Rows.packed  # a packed row is of no one source
        self.counts = SplitCounts(**state["counts"]) if state else SplitCounts()
        self.path, self._rows = path, GrowingRows(path, data.sequence_length, state["rows"] if state else 0)
        self._packer = Packer(data.sequence_length, self.beginning, state["still_open"] if state else ())

    def add(self, documents: Documents, source: str = "") -> None:
        """Cut further tokenised documents, all of one source, into rows."""
        if self.data.rows is Rows.packed:
            part = self._packer.add(documents)
        else:
            part = (windows if self.data.rows is Rows.windows else document_rows)(documents, self.data.sequence_length, self.beginning)
        lengths = [len(ids) for ids in documents]
        self._count(lengths, source)
        self._append(part, source)

    def _count(self, lengths: list[int], source: str) -> None:
        counts = self.counts
        counts.documents, counts.tokens, counts.longest = counts.documents + len(lengths), counts.tokens + sum(lengths), max([counts.longest, *lengths])
        for power, number in Counter((length - 1).bit_length() for length in lengths).items():
            counts.lengths[str(power)] = counts.lengths.get(str(power), 0) + number
        name = source if source in counts.by_source or len(counts.by_source) < MOST_SOURCES else OTHERS
        own = counts.by_source.setdefault(name, [0, 0])
        own[0], own[1] = own[0] + len(lengths), own[1] + sum(lengths)

    def _append(self, rows_RT: np.ndarray, source: str) -> None:
        tokens_R = (rows_RT != PADDING).sum(axis=1)
        within_R = self.counts.row_tokens + np.cumsum(tokens_R) <= (np.inf if self.limit is None else self.limit)
        self.counts.row_tokens += int(tokens_R.sum())
        self.counts.kept_tokens += int(tokens_R[within_R].sum())
        self._rows.append(rows_RT[within_R])
        number = int(within_R.sum()) if self.keeps_sources else 0
        if number and self.counts.runs and self.counts.runs[-1][0] == source:
            self.counts.runs[-1][1] += number
        elif number:
            self.counts.runs.append([source, number])

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    @property
    def is_full(self) -> bool:
        """Whether further documents would add nothing."""
        return self.limit is not None and self.counts.row_tokens >= self.limit

    def state(self) -> dict:
        """What a later process goes on from, once the rows counted in it are on disk: plain values."""
        return {"rows": self.num_rows, "counts": asdict(self.counts), "still_open": [list(row) for row in self._packer.still_open]}

    def flush(self) -> None:
        """All rows to the disk. Raises OSError where it is full."""
        self._rows.flush()

    def has(self, state: dict) -> bool:
        """Whether the rows that a state counts are on disk."""
        return self._rows.has(state["rows"])

    def finish(self) -> None:
        """Write the rows still open, and give the file its name. Raises ValueError where there is no row."""
        self._append(self._packer.rest(), "")
        if self.num_rows == 0:
            counts, is_whole = self.counts, self.data.rows is Rows.windows
            least = self.data.sequence_length if is_whole else 2
            shorter = "; lower data.sequence_length, or take shorter ones with data.rows=documents" if is_whole else ""
            answers = ", answers among them," if self.data.answers_only else ""
            raise ValueError(
                f"data: the {counts.documents:,} {self.name} documents have {counts.tokens:,} tokens, the longest {counts.longest:,}; "
                f"a row (data.rows={self.data.rows.name}) needs a document of at least {least:,} tokens{answers}{shorter}"
            )
        self._rows.finish()

    def close(self) -> None:
        """Leave what there is, to be gone on with."""
        self._rows.close()
