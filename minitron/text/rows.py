"""Rows of token ids, int32 [rows, T], cut from tokenised documents. No state leaks between documents: a row is of one alone, or is packed
and marks where the next one starts.

Rows stay in the order of their documents. A row shorter than T is padded on the right with PADDING, which is no
token's id: `distill.batches.split_padding` takes it apart again.
"""

from collections.abc import Sequence
from itertools import groupby, islice

import numpy as np

from distill.batches import PADDING, count_tokens, mark_start
from minitron.settings.run import DataSettings
from minitron.settings.training import Rows


def windows(documents: list[list[int]], sequence_length: int) -> np.ndarray:
    """Every whole row that the documents hold; a document's tail shorter than a row is dropped."""
    rows = [tokens[start : start + sequence_length] for tokens in documents for start in range(0, len(tokens) - sequence_length + 1, sequence_length)]
    return np.array(rows, dtype=np.int32).reshape(-1, sequence_length)


def document_rows(documents: list[list[int]], sequence_length: int) -> np.ndarray:
    """One row a document: its first T tokens, padded where it has fewer.

    Documents of fewer than 2 tokens are dropped: nothing in them is predicted.
    """
    kept = [tokens[:sequence_length] for tokens in documents if len(tokens) > 1]
    rows = np.full((len(kept), sequence_length), PADDING, dtype=np.int32)
    for row, tokens in zip(rows, kept, strict=True):
        row[: len(tokens)] = tokens
    return rows


class Packer:
    """Rows of several documents each, distill.batches.mark_start on the first id of each but the first. Documents longer than a row are cut.

    A document goes to the open row that it fills best; where none has room, the fullest one is closed.
    """

    NUM_OPEN = 16

    def __init__(self, sequence_length: int, beginning: Sequence[int] = ()):
        self.sequence_length, self.beginning, self._open = sequence_length, list(beginning), []

    def add(self, documents: list[list[int]]) -> np.ndarray:
        """The rows closed by these documents."""
        closed = []
        for document in documents:
            room = self.sequence_length - len(self.beginning)
            for start in range(0, len(document), room):
                if len(piece := document[start : start + room]) > 1:  # else nothing in it is predicted
                    closed += self._place(self.beginning + piece)
        return self._padded(closed)

    def rest(self) -> np.ndarray:
        """The rows still open, which are closed by this."""
        closed, self._open = self._open, []
        return self._padded(closed)

    def _place(self, piece: list[int]) -> list[list[int]]:
        with_room = [row for row in self._open if len(row) + len(piece) <= self.sequence_length]
        if with_room:
            max(with_room, key=len).extend([mark_start(piece[0]), *piece[1:]])
        else:
            self._open.append(list(piece))
        full = max(self._open, key=len)
        if len(full) < self.sequence_length - 1 and len(self._open) <= self.NUM_OPEN:
            return []
        self._open = [row for row in self._open if row is not full]
        return [full]

    def _padded(self, closed: list[list[int]]) -> np.ndarray:
        rows = np.full((len(closed), self.sequence_length), PADDING, dtype=np.int32)
        for row, ids in zip(rows, closed, strict=True):
            row[: len(ids)] = ids
        return rows


class SplitRows:
    """The rows of one split, gathered document by document up to the split's limit of tokens."""

    def __init__(self, name: str, data: DataSettings, beginning: Sequence[int] = ()):
        """`name` is train or heldout; every row, and every document of a packed one, begins with the ids of `beginning`."""
        self.name, self.data, self.beginning = name, data, list(beginning)
        self.limit: int | None = getattr(data, f"max_{name}_tokens")
        self.num_documents = self.num_tokens = self.longest = 0  # of the documents; tokens of the longest
        self._parts: list[np.ndarray] = []
        self._sources: list[tuple[str, int]] = []
        self._row_tokens = 0
        self._packer = Packer(data.sequence_length, self.beginning)

    def add(self, documents: list[list[int]], source: str = "") -> None:
        """Cut further tokenised documents, all of one source, into rows."""
        cut = {Rows.windows: windows, Rows.documents: document_rows}.get(self.data.rows)
        part = self._begun(cut(documents, self.data.sequence_length - len(self.beginning))) if cut else self._packer.add(documents)
        self._parts.append(part)
        self._sources.append((source, len(part)))
        self._row_tokens += count_tokens(part)
        self.num_documents += len(documents)
        self.num_tokens += sum(map(len, documents))
        self.longest = max([self.longest, *map(len, documents)])

    def _begun(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([np.tile(np.array(self.beginning, dtype=np.int32), (len(rows), 1)), rows], axis=1) if self.beginning else rows

    @property
    def is_full(self) -> bool:
        """Whether further documents would add nothing."""
        return self.limit is not None and self._row_tokens >= self.limit

    def rows(self) -> np.ndarray:
        """int32 [rows, T], as many of the first as the limit allows. Raises ValueError where there is none."""
        self._parts.append(self._packer.rest())
        rows = np.concatenate([np.empty((0, self.data.sequence_length), dtype=np.int32), *self._parts])
        if len(rows) == 0:
            least = self.data.sequence_length if self.data.rows is Rows.windows else 2
            shorter = "; lower data.sequence_length, or take shorter ones with data.rows=documents" if self.data.rows is Rows.windows else ""
            raise ValueError(
                f"data: the {self.num_documents:,} {self.name} documents have {self.num_tokens:,} tokens, the longest {self.longest:,}; "
                f"a row (data.rows={self.data.rows.name}) needs a document of at least {least:,} tokens{shorter}"
            )
        if self.limit is not None:
            rows = rows[np.cumsum((rows != PADDING).sum(axis=1)) <= self.limit]
        return rows

    def sources(self, number: int) -> list[tuple[str, int]]:
        """Where the first `number` rows come from, in their order: runs of rows, (source, rows of it). Packed rows are of no one source."""
        assert self.data.rows is not Rows.packed
        of_row = islice((source for source, length in self._sources for _ in range(length)), number)
        return [(source, sum(1 for _ in run)) for source, run in groupby(of_row)]
