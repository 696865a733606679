"""From everything that fits to the few worth a forward pass."""

import numpy as np

from nas.candidates import Candidates

STRATUM = ("num_layers", "hidden", "mamba_num_heads", "mamba_head_dim", "num_attention_heads")


def diversified(candidates: Candidates, retained: np.ndarray, size: int) -> list[int]:
    """Rows of at most `size` candidates: the best of every stratum, depths taking turns, the depth of the best row first.

    A stratum is one depth × hidden × Mamba heads, × channels and attention heads where the space cuts them. `retained` [rows] is the
    importance a candidate keeps. "Largest first" would return near twins: thousands of points lie between a good candidate and the budget.
    """
    best_first = np.argsort(-retained, kind="stable")
    _, firsts = np.unique(_strata(candidates)[best_first], return_index=True)
    best_of_stratum = best_first[np.sort(firsts)]  # best first again
    _, depths_met, depth_of_row = np.unique(candidates.num_layers[best_of_stratum], return_index=True, return_inverse=True)
    by_depth = np.argsort(depth_of_row, kind="stable")
    turns = np.empty(len(by_depth), dtype=np.int64)  # each row's place among its own depth's
    turns[by_depth] = np.arange(len(by_depth)) - np.searchsorted(depth_of_row[by_depth], depth_of_row[by_depth])
    return best_of_stratum[np.lexsort((depths_met[depth_of_row], turns))[:size]].tolist()


def largest(candidates: Candidates, size: int) -> list[int]:
    """Rows of the candidates that use most memory, for comparison."""
    return np.argsort(-candidates.total_bytes, kind="stable")[:size].tolist()


def _strata(candidates: Candidates) -> np.ndarray:
    """A number per stratum, [rows]: the places of the row's values among each column's, as digits."""
    number = np.zeros(len(candidates), dtype=np.int64)
    for name in STRATUM:
        values, places = np.unique(getattr(candidates, name), return_inverse=True)
        number = number * len(values) + places
    return number
