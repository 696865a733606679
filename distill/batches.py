"""Batches of token rows in a seeded order; any step's batch can be had directly, so a run resumes exactly.

A row shorter than the others is padded on the right with PADDING. What is causal never looks there, so the
real tokens' results are those of the row alone; only what sums over positions must leave padding out.
"""

import numpy as np
import torch

PADDING = -1  # no token's id, so never mistaken for one


def split_padding(rows_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that a model takes (0 in place of padding) and the mask of real tokens, bool, both [B, T]."""
    mask_BT = rows_BT != PADDING
    return rows_BT.where(mask_BT, 0), mask_BT


def count_tokens(rows_RT: np.ndarray) -> int:
    """Real tokens of rows [R, T] padded on the right."""
    padded = rows_RT[rows_RT[:, -1] == PADDING]
    return int(rows_RT.size - np.count_nonzero(padded == PADDING))


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
