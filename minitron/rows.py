"""Rows of token ids, int32 [rows, T], cut from tokenised documents. No row spans two documents, so no state leaks between them.

Rows stay in the order of their documents. A row shorter than T is padded on the right with PADDING, which is no
token's id: `distill.batches.split_padding` takes it apart again.
"""

import numpy as np

from distill.batches import PADDING, count_tokens
from minitron.settings import DataSettings, Rows


def windows(documents: list[list[int]], sequence_length: int) -> np.ndarray:
    """Every whole row that the documents hold; a document's tail shorter than a row is dropped."""
    rows = [
        tokens[start : start + sequence_length]
        for tokens in documents
        for start in range(0, len(tokens) - sequence_length + 1, sequence_length)
    ]
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


class SplitRows:
    """The rows of one split, gathered document by document up to the split's limit of tokens."""

    def __init__(self, name: str, data: DataSettings):
        """`name` is train or heldout."""
        self.name, self.data = name, data
        self.limit: int | None = getattr(data, f"max_{name}_tokens")
        self.num_documents = self.num_tokens = self.longest = 0  # of the documents; tokens of the longest
        self._parts: list[np.ndarray] = []
        self._row_tokens = 0

    def add(self, documents: list[list[int]]) -> None:
        """Cut further tokenised documents into rows."""
        cut = windows if self.data.rows is Rows.windows else document_rows
        part = cut(documents, self.data.sequence_length)
        self._parts.append(part)
        self._row_tokens += count_tokens(part)
        self.num_documents += len(documents)
        self.num_tokens += sum(map(len, documents))
        self.longest = max([self.longest, *map(len, documents)])

    @property
    def is_full(self) -> bool:
        """Whether further documents would add nothing."""
        return self.limit is not None and self._row_tokens >= self.limit

    def rows(self) -> np.ndarray:
        """int32 [rows, T], as many of the first as the limit allows. Raises ValueError where there is none."""
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
