"""Batches of token rows in a seeded order; any step's batch can be had directly, so a run resumes exactly."""

import numpy as np
import torch


class RowBatches:
    """Rows int32 [R, T] served as batches [B, T], each epoch in a new permutation."""

    def __init__(self, rows_RT: np.ndarray, batch: int, seed: int):
        """Raises ValueError where there are fewer rows than one batch."""
        if len(rows_RT) < batch:
            raise ValueError(f"train.batch is {batch}, but the data has only {len(rows_RT)} rows of {rows_RT.shape[1]} tokens; lower one of them")
        self.rows_RT, self.batch, self.seed = rows_RT, batch, seed
        self.steps_per_epoch = len(rows_RT) // batch
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.rows_RT.shape[1]

    def at(self, step: int) -> torch.Tensor:
        """The batch of one step, int64 [B, T]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows_RT))
        chosen = self._order[position * self.batch : (position + 1) * self.batch]
        return torch.from_numpy(self.rows_RT[chosen].astype(np.int64))
