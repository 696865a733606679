"""Rows of token ids, int32 [rows, T], cut from tokenised documents. No state leaks between documents: a row is of one alone, or is packed
and marks where the next one starts.

Rows stay in the order of their documents. A row shorter than T is padded on the right with PADDING, which is no
token's id: `distill.batches.split_padding` takes it apart again. Ids may be marked as places where nothing is learned (`distill.batches.not_counted`);
a row in which nothing at all is learned is left out.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from distill.batches import NOT_COUNTED, PADDING, mark_start, not_counted

Documents = Sequence[np.ndarray]  # int32 [tokens] each


def windows(documents: Documents, sequence_length: int, beginning: Sequence[int] = ()) -> np.ndarray:
    """Every whole row that the documents hold, each with the ids of `beginning` first; a document's tail shorter than a row is dropped."""
    room = sequence_length - len(beginning)
    rows = [_pieces_as_rows(np.asarray(ids, dtype=np.int32), room, beginning) for ids in documents if len(ids) >= room]
    return np.concatenate(rows) if rows else np.empty((0, sequence_length), dtype=np.int32)


def _pieces_as_rows(ids: np.ndarray, room: int, beginning: Sequence[int]) -> np.ndarray:
    number = len(ids) // room
    rows = ids[: number * room].reshape(number, room)
    is_marked = ids.max() >= NOT_COUNTED
    if beginning:
        starts = np.stack([_begin(ids, place * room, beginning, is_marked) for place in range(number)])
        rows = np.concatenate([starts, rows], axis=1)
    return rows[(rows[:, :-1] < NOT_COUNTED).any(axis=1)] if is_marked else rows


def document_rows(documents: Documents, sequence_length: int, beginning: Sequence[int] = ()) -> np.ndarray:
    """One row a document: its first T tokens, those of `beginning` among them, padded where it has fewer.

    Documents of fewer than 2 tokens are dropped: nothing in them is predicted.
    """
    room = sequence_length - len(beginning)
    pieces = (piece for ids in documents if len(ids) > 1 for piece in [_piece(np.asarray(ids, dtype=np.int32), 0, room, beginning)] if _teaches(piece))
    return padded(list(pieces), sequence_length)


def padded(pieces: Documents, sequence_length: int) -> np.ndarray:
    """Pieces of at most T ids as rows."""
    rows = np.full((len(pieces), sequence_length), PADDING, dtype=np.int32)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece)] = piece
    return rows


def _piece(ids: np.ndarray, start: int, room: int, beginning: Sequence[int]) -> np.ndarray:
    piece = ids[start : start + room]
    return np.concatenate([_begin(ids, start, beginning, ids.max() >= NOT_COUNTED), piece]) if beginning else piece


def _begin(ids: np.ndarray, start: int, beginning: Sequence[int], is_marked: bool) -> np.ndarray:
    """`beginning` as it stands before the document's piece that begins at `start`: marked as the document is, what predicts the piece's first id
    as the id before it."""
    first = np.array(beginning, dtype=np.int32)
    if is_marked:
        is_counted = start > 0 and ids[start - 1] < NOT_COUNTED
        first[: len(first) - is_counted] = not_counted(first[: len(first) - is_counted])
    return first


def _teaches(piece: np.ndarray) -> bool:
    return bool((piece[:-1] < NOT_COUNTED).any())


class Packer:
    """Rows of several documents each, distill.batches.mark_start on the first id of each but the first. Documents longer than a row are cut.

    A document goes to the open row that it fills best; where none has room, the fullest one is closed.
    """

    NUM_OPEN = 16

    def __init__(self, sequence_length: int, beginning: Sequence[int] = (), still_open: Sequence[Sequence[int]] = ()):
        """`still_open` are the rows that another packer, interrupted, had not closed."""
        self.sequence_length, self.beginning, self.still_open = sequence_length, list(beginning), [list(row) for row in still_open]

    def add(self, documents: Documents) -> np.ndarray:
        """The rows closed by these documents."""
        closed = [row for document in documents for piece in self._pieces(np.asarray(document, dtype=np.int32)) for row in self._place(piece.tolist())]
        return padded(closed, self.sequence_length)

    def rest(self) -> np.ndarray:
        """The rows still open, which are closed by this."""
        closed, self.still_open = self.still_open, []
        return padded(closed, self.sequence_length)

    def _pieces(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        room = self.sequence_length - len(self.beginning)
        for start in range(0, len(ids), room):
            if len(ids) - start > 1 and _teaches(piece := _piece(ids, start, room, self.beginning)):  # else nothing in it is predicted
                yield piece

    def _place(self, piece: list[int]) -> list[list[int]]:
        with_room = [row for row in self.still_open if len(row) + len(piece) <= self.sequence_length]
        if with_room:
            max(with_room, key=len).extend([mark_start(piece[0]), *piece[1:]])
        else:
            self.still_open.append(piece)
        full = max(self.still_open, key=len)
        if len(full) < self.sequence_length - 1 and len(self.still_open) <= self.NUM_OPEN:
            return []
        self.still_open = [row for row in self.still_open if row is not full]
        return [full]
