"""From everything that fits to the few worth a forward pass."""

import numpy as np

from nas.candidates import Candidates

STRATUM = ("num_layers", "hidden", "mamba_num_heads", "mamba_head_dim", "num_attention_heads", "num_key_value_heads", "moe_num_experts")


def diversified(candidates: Candidates, retained: np.ndarray, size: int) -> list[int]:
    """Rows of at most `size` candidates: the best of every stratum, then every second best and so on; depths taking turns, the best row's first.

    A stratum is one depth × hidden × Mamba heads, × channels, attention heads and experts where the space cuts them. `retained` [rows] is the
    importance a candidate keeps. "Largest first" would return near twins: thousands of points lie between a good candidate and the budget.
    """
    best_first = np.argsort(-retained, kind="stable")
    places = _place_in_group(_strata(candidates)[best_first])
    num_strata = max(1, np.count_nonzero(places == 0))
    few = np.flatnonzero(places < -(-size // num_strata))
    rows, places = best_first[few], places[few]
    _, depths_met, depth_of_row = np.unique(candidates.num_layers[rows], return_index=True, return_inverse=True)
    turns = _place_in_group(places * len(depths_met) + depth_of_row)
    return rows[np.lexsort((depths_met[depth_of_row], turns, places))[:size]].tolist()


def _place_in_group(groups: np.ndarray) -> np.ndarray:
    """How many of the same group stand before each entry."""
    by_group = np.argsort(groups, kind="stable")
    places = np.empty(len(groups), dtype=np.int64)
    places[by_group] = np.arange(len(groups)) - np.searchsorted(groups[by_group], groups[by_group])
    return places


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
