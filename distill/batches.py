"""Batches of token rows in a seeded order; any step's batch can be had directly, so a run resumes exactly.

A row shorter than the others is padded on the right with PADDING. What is causal never looks there, so the
real tokens' results are those of the row alone; only what sums over positions must leave padding out.
A packed row holds several documents one after another: the first id of each but the first is stored as `mark_start` of it.
A position at which nothing is learned, since what follows there is not to be learned, holds `not_counted` of its id; a start mark_start(not_counted(id)).
Models see such tokens as any others; losses leave their positions out. All of it is in the numbers, so that a row is one array whoever stores it.
"""

from collections.abc import Sequence

import numpy as np
import torch

from distill.permutation import WHOLE_UP_TO, Shuffle

PADDING = -1  # no token's id, so never mistaken for one
NOT_COUNTED = 1 << 29  # above every id, and with it the sum of both still an int32
COUNTED_AT_ONCE = 2**22  # numbers of rows that may be a file larger than the memory
ORDERED_AT_ONCE = 2**12  # rows of a blend


def mark_start(ids):
    """An id as the first of a further document in its row: a number below PADDING, and back again. Of ints, arrays and tensors."""
    return -2 - ids


def not_counted(ids):
    """An id as one at whose position nothing is learned. Of ints, arrays and tensors; before mark_start, where both are wanted."""
    return ids + NOT_COUNTED


def split_padding(rows_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that a model takes (0 in place of padding) and the mask of real tokens, bool, both [B, T]."""
    mask_BT = rows_BT != PADDING
    ids_BT = rows_BT.where(rows_BT >= PADDING, mark_start(rows_BT))
    return ids_BT.where(mask_BT, 0) & (NOT_COUNTED - 1), mask_BT


def counted_positions(rows_BT):
    """Where something is learned: real tokens that are not marked otherwise, bool [B, T]. Of arrays and tensors."""
    return (rows_BT != PADDING) & (rows_BT < NOT_COUNTED) & (rows_BT > mark_start(NOT_COUNTED))


def count_counted(rows_BT) -> int:
    """How many positions of rows [B, T] something is learned at: what a loss that is a mean over them weighs. Of arrays and tensors."""
    return int(counted_positions(rows_BT).sum())


def plain_ids(rows_RT: np.ndarray) -> np.ndarray:
    """Rows without any mark, for those who take them as text: ids, and PADDING as it was."""
    ids_RT = np.where(rows_RT < PADDING, mark_start(rows_RT), rows_RT)
    return np.where(ids_RT < NOT_COUNTED, ids_RT, ids_RT - NOT_COUNTED)


def document_numbers(rows_BT: torch.Tensor) -> torch.Tensor | None:
    """Which document of its row each token belongs to, int32 [B, T], padding to the last; None where every row is of one document."""
    starts_BT = rows_BT < PADDING
    return starts_BT.cumsum(1, dtype=torch.int32) if starts_BT.any() else None


def count_tokens(rows_RT: np.ndarray) -> int:
    """Real tokens of rows [R, T] padded on the right, some rows at a time."""
    at_once = max(1, COUNTED_AT_ONCE // max(1, rows_RT.shape[1]))
    return sum(_count_tokens(rows_RT[first : first + at_once]) for first in range(0, len(rows_RT), at_once))


def _count_tokens(rows_RT: np.ndarray) -> int:
    padded = rows_RT[rows_RT[:, -1] == PADDING]
    return int(rows_RT.size - np.count_nonzero(padded == PADDING))


PADDING_TOKENS = 64  # of a row that is nothing but padding: enough for every kernel


def micro_batches(batch_BT: torch.Tensor, micro_batch: int | None, rank: int, world_size: int) -> tuple[torch.Tensor, ...]:
    """One process's rows of a batch, split into what it computes at once. Where they do not fall evenly (see check_sharing, which allows it with a
    micro_batch of 1) the last processes compute a short row of padding last, so that all go through as many rounds."""
    if len(batch_BT) % world_size == 0:
        own = batch_BT.chunk(world_size)[rank]
        return own.split(micro_batch or len(own))
    own = tuple(batch_BT[rank::world_size].split(1))
    if rank < len(batch_BT) % world_size:
        return own
    return *own, batch_BT.new_full((1, min(PADDING_TOKENS, batch_BT.shape[1])), PADDING)


class RowBatches:
    """Rows int32 [R, T] served as batches [B, T], each epoch in a new permutation. Rows may end in padding."""

    def __init__(self, rows_RT: np.ndarray, batch: int, seed: int, *, num_tokens: int | None = None, whole_up_to: int = WHOLE_UP_TO):
        """`num_tokens` is count_tokens of the rows, where it is known; up to `whole_up_to` rows an epoch's order is an array (distill.permutation).

        Raises ValueError where there are fewer rows than one batch.
        """
        if len(rows_RT) < batch:
            raise ValueError(f"train.batch is {batch}, but the data has only {len(rows_RT)} rows of {rows_RT.shape[1]} tokens; lower one of them")
        self.rows_RT, self.batch, self.seed, self.whole_up_to = rows_RT, batch, seed, whole_up_to
        self._num_tokens = count_tokens(rows_RT) if num_tokens is None else num_tokens
        self.steps_per_epoch = len(rows_RT) // batch
        self._epoch, self._order = -1, None

    @property
    def tokens_per_step(self) -> int:
        """Real tokens of a batch; where rows are padded, of the mean one, rounded down."""
        return self._num_tokens * self.batch // len(self.rows_RT)

    @property
    def identity(self) -> dict[str, int]:
        """What the batches of all steps follow from, but for the rows' contents."""
        return {"batch": self.batch, "seed": self.seed, "rows": len(self.rows_RT), "row_tokens": self.rows_RT.shape[1]}

    def indices(self, step: int) -> np.ndarray:
        """Which rows make up the batch of one step, int64 [B]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, Shuffle([self.seed, epoch], len(self.rows_RT), whole_up_to=self.whole_up_to)
        return self._order.at(np.arange(position * self.batch, (position + 1) * self.batch))

    def at(self, step: int) -> torch.Tensor:
        """The batch of one step, int64 [B, T], padding included: see split_padding."""
        return torch.from_numpy(self.rows_RT[self.indices(step)].astype(np.int64))


class RowNumbers(RowBatches):
    """RowBatches whose batches are row numbers [B]: what is learned from a cache is looked up by them."""

    def at(self, step: int) -> torch.Tensor:
        return torch.from_numpy(self.indices(step))


class BlendBatches:
    """Rows of several sources, all of one length, mixed by weight; like RowBatches otherwise.

    After any number of rows each source has given its share to within one row. A source shorter than its share begins anew, in
    another order. Which rows a step has follows from the step alone.
    """

    def __init__(self, sources: Sequence[np.ndarray], weights: Sequence[float], *, tokens: int, batch: int, seed: int,
                 num_tokens: Sequence[int | None] | None = None, whole_up_to: int = WHOLE_UP_TO):  # fmt: skip
        """`sources` are rows int32 [R, T] each, `tokens` what the batches are needed for; `num_tokens` and `whole_up_to` as RowBatches has them,
        the first of every source."""
        shares, known = np.asarray(weights) / sum(weights), num_tokens or [None] * len(sources)
        self.sources, self.batch, self.seed, self.whole_up_to = list(sources), batch, seed, whole_up_to
        counts = [count_tokens(rows) if number is None else number for rows, number in zip(sources, known, strict=True)]
        per_row = sum(share * count / len(rows) for share, count, rows in zip(shares, counts, sources, strict=True))
        self.tokens_per_step = int(per_row * batch)
        self._order = BlendOrder(shares, tokens // self.tokens_per_step * batch)
        self._shuffles: dict[tuple[int, int], Shuffle] = {}

    @property
    def identity(self) -> dict[str, int]:
        """What the batches of all steps follow from, but for the rows' contents."""
        return {"batch": self.batch, "seed": self.seed, "rows": sum(map(len, self.sources)), "row_tokens": self.sources[0].shape[1]}

    def indices(self, step: int) -> np.ndarray:
        """Which rows make up the batch of one step: source and row in it, int64 [B, 2]."""
        drawn = self._order.at(step * self.batch, (step + 1) * self.batch)
        return np.array([(source, self._row(source, nth)) for source, nth in drawn.tolist()])

    def at(self, step: int) -> torch.Tensor:
        """The batch of one step, int64 [B, T], padding included: see split_padding."""
        return torch.from_numpy(np.stack([self.sources[source][row] for source, row in self.indices(step)]).astype(np.int64))

    def _row(self, source: int, nth: int) -> int:
        """The nth row drawn from a source: every row once, in a new order each time through."""
        epoch, place = divmod(nth, len(self.sources[source]))
        if (source, epoch) not in self._shuffles:
            self._shuffles = {key: shuffle for key, shuffle in self._shuffles.items() if key[0] != source or key[1] >= epoch - 1}
            self._shuffles[source, epoch] = Shuffle([self.seed, source, epoch], len(self.sources[source]), whole_up_to=self.whole_up_to)
        return int(self._shuffles[source, epoch].at(np.array([place]))[0])


class BlendOrder:
    """From which source each of `number` rows is drawn, and the how-manieth of that source it is.

    The k-th row of a source is due at (k + ½) / its share: sorted by that, and by source where two are due at once, every beginning has the shares.
    Only some rows are sorted at a time, those due between two times that have as many rows due before them as are asked for.
    """

    def __init__(self, shares: np.ndarray, number: int):
        self.shares_S, self.number = shares, number
        self._most_S = np.ceil(number * shares).astype(np.int64) + 1  # rows that a source has to give
        self._first, self._drawn = 0, np.empty((0, 2), dtype=np.int64)

    def at(self, first: int, end: int) -> np.ndarray:
        """The rows from place `first` up to `end`, as far as there are any, as (source, nth): int64 [≤ end − first, 2]."""
        first, end = min(first, self.number), min(end, self.number)
        if first < self._first or end > self._first + len(self._drawn):
            self._first, self._drawn = first, self._sorted(first, min(max(end, first + ORDERED_AT_ONCE), self.number))
        return self._drawn[first - self._first : end - self._first]

    def _sorted(self, first: int, end: int) -> np.ndarray:
        low_S, high_S = self._due_before(self._time(first)[0]), self._due_before(self._time(end)[1])
        counts_S = high_S - low_S
        source = np.repeat(np.arange(len(counts_S)), counts_S)
        nth = np.concatenate([np.arange(low, high) for low, high in zip(low_S, high_S, strict=True)])
        order = np.argsort((nth + 0.5) / self.shares_S[source], kind="stable")[first - low_S.sum() : end - low_S.sum()]
        return np.stack([source[order], nth[order]], axis=1)

    def _due_before(self, time: float) -> np.ndarray:
        """How many rows of each source are due before a time, [S]: exactly those whose own time, as a float, is less."""
        number_S = np.maximum(np.floor(time * self.shares_S + 0.5), 0)
        number_S -= (number_S > 0) & ((number_S - 0.5) / self.shares_S >= time)
        number_S += (number_S + 0.5) / self.shares_S < time
        return np.minimum(number_S.astype(np.int64), self._most_S)

    def _time(self, place: int) -> tuple[float, float]:
        """Two times near each other: at most `place` rows are due before the one, at least as many before the other."""
        low, high = 0.0, float(np.max((self._most_S + 1) / self.shares_S))
        while high - low > 1 and (middle := (low + high) / 2) not in (low, high):
            if self._due_before(middle).sum() <= place:
                low = middle
            else:
                high = middle
        return low, high
