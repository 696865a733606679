"""Rules that choose one candidate from plain numbers, each with its reason in words.

Columns [n]: losses in nats/token, memory in bytes, throughput in tokens/s. A row whose loss is NaN or infinite is never
chosen. Every rule raises ValueError where no row is left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Choice:
    """The row chosen and why, in one sentence."""

    row: int
    reason: str


def lowest_loss(losses: np.ndarray, memory: np.ndarray, names: Sequence[str], *, noise: float) -> Choice:
    """The row of the lowest loss; of those at most `noise` nats/token above it the smallest, then the first by name, in whatever order they come."""
    if not 0 <= noise < math.inf:
        raise ValueError(f"search.noise ({noise}) must be a number of nats/token of at least 0")
    losses, memory = (np.asarray(column, dtype=np.float64) for column in (losses, memory))
    rows = _usable(losses)
    lowest = losses[rows].min()
    near = rows[losses[rows] <= lowest + noise].tolist()
    row = min(near, key=lambda one: (memory[one], names[one]))
    if len(near) == 1:
        return Choice(row, f"lowest loss, {losses[row]:.3f} nats/token")
    return Choice(row, f"smallest of the {len(near)} within {noise:g} nats/token, the noise of a measurement, of the lowest loss, {lowest:.3f}")


def loss_within(losses: np.ndarray, memory: np.ndarray, throughput: np.ndarray, *, within: float) -> Choice:
    """The fastest row whose loss is at most `within` nats/token above the lowest; of equally fast ones the smallest, then the first."""
    if not 0 <= within < math.inf:
        raise ValueError(f"search.loss_within ({within}) must be a number of nats/token of at least 0")
    losses, memory, throughput = (np.asarray(column, dtype=np.float64) for column in (losses, memory, throughput))
    rows = _usable(losses, memory, throughput)
    near = rows[losses[rows] <= losses[rows].min() + within]
    row = int(near[np.lexsort((memory[near], -throughput[near]))[0]])
    return Choice(row, f"fastest of the {len(near)} within {within:g} nats/token of the lowest loss")


def weighted(losses: np.ndarray, memory: np.ndarray, throughput: np.ndarray, *, weights: tuple[float, float, float]) -> Choice:
    """The lowest sum of loss, memory and minus throughput, each from 0 (best row) to 1 (worst) and times its weight; ties to the first.

    A column that is the same in every row counts 0. Raises ValueError for weights below 0 or all 0.
    """
    if len(weights) != 3 or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"search.weights {list(weights)} must be three numbers of at least 0, of loss, memory and throughput, not all 0")
    costs = [np.asarray(column, dtype=np.float64) for column in (losses, memory, throughput)]
    rows = _usable(*costs)
    costs[2] = -costs[2]
    sums = sum(weight * _from_zero_to_one(cost[rows]) for weight, cost in zip(weights, costs, strict=True))
    best = int(np.argmin(sums))
    said = ", ".join(f"{weight:g} × {what}" for weight, what in zip(weights, ("loss", "memory", "slowness"), strict=True))
    return Choice(int(rows[best]), f"lowest weighted sum of {len(rows)}, {sums[best]:.3f} ({said}, each from 0 best to 1 worst)")


def _usable(*columns: np.ndarray) -> np.ndarray:
    """Rows in which every column is finite."""
    rows = np.flatnonzero(np.isfinite(np.stack([np.asarray(column, dtype=np.float64) for column in columns])).all(axis=0))
    if not len(rows):
        what = "loss, memory and throughput" if len(columns) > 1 else "loss"
        raise ValueError(f"none of the {len(columns[0])} candidates has a finite {what}; none can be chosen")
    return rows


def _from_zero_to_one(column: np.ndarray) -> np.ndarray:
    spread = column.max() - column.min()
    return (column - column.min()) / spread if spread > 0 else np.zeros_like(column)
