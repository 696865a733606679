"""Which of many choices no other beats in everything."""

import numpy as np


def pareto_front(costs: np.ndarray) -> np.ndarray:
    """Mask [n] of the rows of `costs` [n, k], all to be minimised, that no row is at most as costly as in all and cheaper in one.

    Equal rows stand or fall together. Rows with a NaN or an infinity are never on the front and push none off it.
    Raises ValueError unless costs has two dimensions.
    """
    costs = np.asarray(costs, dtype=np.float64)
    if costs.ndim != 2:
        raise ValueError(f"costs has {costs.ndim} dimensions; it must have two, rows and kinds of cost")
    front = np.isfinite(costs).all(axis=1)
    points, point_of_row = np.unique(costs[front], axis=0, return_inverse=True)  # sorted by the first cost, then the second, …
    front[front] = _front_of_sorted(points)[point_of_row.reshape(-1)]
    return front


def _front_of_sorted(points: np.ndarray) -> np.ndarray:
    """The front's mask of different points in lexicographic order: what beats a point stands before it, so the first left is always on it."""
    mask, left = np.zeros(len(points), dtype=bool), np.arange(len(points))
    while len(left):
        first, left = left[0], left[1:]
        mask[first] = True
        left = left[(points[left] < points[first]).any(axis=1)]
    return mask
