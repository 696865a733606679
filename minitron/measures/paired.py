"""How far two models' losses are apart on the same held-out rows, and how well these rows can tell."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Rows = Mapping[str, Sequence[float]]  # of each row `loss`, summed over its tokens that count, in nats, and how many `tokens` these are


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher one model's loss is than another's, in nats per token, and the standard error of that over rows; None of a single row."""

    nats_per_token: float
    standard_error: float | None


def paired_difference(one: Rows, other: Rows) -> Difference:
    """One model's loss less another's. Rows are paired, since what makes a row hard makes it so for both, and taken as independent: those of one document
    are alike, so the error is at least this large. The error is that of a ratio of two sums over rows (Cochran, Sampling Techniques, section 2.11)."""
    apart_R = np.subtract(one["loss"], other["loss"])
    tokens_R = np.asarray(one["tokens"], dtype=float)
    mean = apart_R.sum() / tokens_R.sum()
    if len(tokens_R) < 2:
        return Difference(float(mean), None)
    left_R = apart_R - mean * tokens_R
    variance = len(tokens_R) / (len(tokens_R) - 1) * (left_R**2).sum()
    return Difference(float(mean), math.sqrt(variance) / float(tokens_R.sum()))
