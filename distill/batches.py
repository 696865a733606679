"""Batches of token rows in a seeded order; any step's batch can be had directly, so a run resumes exactly.

A row shorter than the others is padded on the right with PADDING. What is causal never looks there, so the
real tokens' results are those of the row alone; only what sums over positions must leave padding out.
A packed row holds several documents one after another: the first id of each but the first is stored as `mark_start` of it.
"""

from collections.abc import Sequence

import numpy as np
import torch

PADDING = -1  # no token's id, so never mistaken for one


def mark_start(ids):
    """An id as the first of a further document in its row: a number below PADDING, and back again. Of ints, arrays and tensors."""
    return -2 - ids


def split_padding(rows_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that a model takes (0 in place of padding) and the mask of real tokens, bool, both [B, T]."""
    mask_BT = rows_BT != PADDING
    ids_BT = rows_BT.where(rows_BT >= PADDING, mark_start(rows_BT))
    return ids_BT.where(mask_BT, 0), mask_BT


def document_numbers(rows_BT: torch.Tensor) -> torch.Tensor | None:
    """Which document of its row each token belongs to, int32 [B, T], padding to the last; None where every row is of one document."""
    starts_BT = rows_BT < PADDING
    return starts_BT.cumsum(1, dtype=torch.int32) if starts_BT.any() else None


def count_tokens(rows_RT: np.ndarray) -> int:
    """Real tokens of rows [R, T] padded on the right."""
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

    def __init__(self, rows_RT: np.ndarray, batch: int, seed: int):
        """Raises ValueError where there are fewer rows than one batch."""
        if len(rows_RT) < batch:
            raise ValueError(f"train.batch is {batch}, but the data has only {len(rows_RT)} rows of {rows_RT.shape[1]} tokens; lower one of them")
        self.rows_RT, self.batch, self.seed = rows_RT, batch, seed
        self._num_tokens = count_tokens(rows_RT)
        self.steps_per_epoch = len(rows_RT) // batch
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

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
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows_RT))
        return self._order[position * self.batch : (position + 1) * self.batch]

    def at(self, step: int) -> torch.Tensor:
        """The batch of one step, int64 [B, T], padding included: see split_padding."""
        return torch.from_numpy(self.rows_RT[self.indices(step)].astype(np.int64))


class RowNumbers(RowBatches):
    """RowBatches whose batches are row numbers [B]: what is learned from a cache is looked up by them."""

    def at(self, step: int) -> torch.Tensor:
        return torch.from_numpy(self.indices(step).copy())


class BlendBatches:
    """Rows of several sources, all of one length, mixed by weight; like RowBatches otherwise.

    After any number of rows each source has given its share to within one row. A source shorter than its share begins anew, in
    another order. Which rows a step has follows from the step alone.
    """

    def __init__(self, sources: Sequence[np.ndarray], weights: Sequence[float], *, tokens: int, batch: int, seed: int):
        """`sources` are rows int32 [R, T] each, `tokens` what the batches are needed for."""
        shares = np.asarray(weights) / sum(weights)
        self.sources, self.batch, self.seed = list(sources), batch, seed
        per_row = sum(share * count_tokens(rows) / len(rows) for share, rows in zip(shares, sources, strict=True))
        self.tokens_per_step = int(per_row * batch)
        number = tokens // self.tokens_per_step * batch
        # The k-th row of a source is due at (k + ½) / its share: sorted by that, every beginning has the shares.
        needed = [int(np.ceil(number * share)) + 1 for share in shares]
        due = np.concatenate([(np.arange(count) + 0.5) / share for count, share in zip(needed, shares, strict=True)])
        source = np.repeat(np.arange(len(needed)), needed)
        nth = np.concatenate([np.arange(count) for count in needed])
        order = np.argsort(due, kind="stable")[:number]
        self._source, self._nth = source[order], nth[order]
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    @property
    def identity(self) -> dict[str, int]:
        """What the batches of all steps follow from, but for the rows' contents."""
        return {"batch": self.batch, "seed": self.seed, "rows": sum(map(len, self.sources)), "row_tokens": self.sources[0].shape[1]}

    def indices(self, step: int) -> np.ndarray:
        """Which rows make up the batch of one step: source and row in it, int64 [B, 2]."""
        chosen = slice(step * self.batch, (step + 1) * self.batch)
        return np.array([(source, self._row(source, nth)) for source, nth in zip(self._source[chosen].tolist(), self._nth[chosen].tolist(), strict=True)])

    def at(self, step: int) -> torch.Tensor:
        """The batch of one step, int64 [B, T], padding included: see split_padding."""
        return torch.from_numpy(np.stack([self.sources[source][row] for source, row in self.indices(step)]).astype(np.int64))

    def _row(self, source: int, nth: int) -> int:
        """The nth row drawn from a source: every row once, in a new order each time through."""
        epoch, position = divmod(nth, len(self.sources[source]))
        if (source, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != source or key[1] >= epoch - 1}
            self._orders[source, epoch] = np.random.default_rng([self.seed, source, epoch]).permutation(len(self.sources[source]))
        return int(self._orders[source, epoch][position])
