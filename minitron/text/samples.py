"""Which rows a measurement takes, and in what batches. R rows of T tokens, padding -1, marks as in distill.batches, B rows of a batch."""

import numpy as np
import torch

from distill.batches import PADDING, plain_ids


def batches_of(rows_RT: np.ndarray, batch: int, device: torch.device | str) -> list[torch.Tensor]:
    """Rows int32 [R, T] as batches int64 [≤ B, T], padding included: see distill.batches.split_padding."""
    ids = torch.from_numpy(rows_RT.astype(np.int64))
    return [part.to(device) for part in ids.split(batch)]


def spread_rows(rows_RT: np.ndarray, number: int) -> np.ndarray:
    """At most `number` rows, evenly spread over all of them, so that every document has its chance."""
    if len(rows_RT) <= number:
        return rows_RT
    return rows_RT[np.linspace(0, len(rows_RT) - 1, number).astype(np.int64)]


def screening_rows(held_out_RT: np.ndarray) -> np.ndarray:
    """The held-out rows that choose a candidate: every other one."""
    return held_out_RT[0::2] if len(held_out_RT) > 1 else held_out_RT


def evaluation_rows(held_out_RT: np.ndarray) -> np.ndarray:
    """The held-out rows that grade it, none of which helped to choose it (where there is more than one)."""
    return held_out_RT[1::2] if len(held_out_RT) > 1 else held_out_RT


def longest_prompt(rows_RT: np.ndarray, number: int) -> torch.Tensor:
    """The first `number` ids, fewer where no row has them, of the first row with the most real tokens; int64 [≤ number]."""
    row = plain_ids(rows_RT[np.argmax((rows_RT != PADDING).sum(axis=1))])
    return torch.from_numpy(row[row != PADDING][:number].astype(np.int64))


def check_predicted(tokens: float, rows: str = "held-out") -> None:
    """Refuses a mean over no tokens. Raises ValueError where the rows measured have none that is predicted and counts."""
    if tokens == 0:
        raise ValueError(f"of the {rows} rows measured none has a token that is predicted and counts (data.answers_only counts an assistant's alone); "
                         "measure more of them, or give documents that have one")  # fmt: skip
