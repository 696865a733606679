"""The Pareto front against all pairs of rows."""

import numpy as np
import pytest

from nas.pareto import pareto_front


def all_pairs(costs: np.ndarray) -> list[bool]:
    """The oracle, pair by pair."""
    finite = [np.isfinite(row).all() for row in costs]

    def beaten(row: int) -> bool:
        return any(finite[other] and (costs[other] <= costs[row]).all() and (costs[other] < costs[row]).any() for other in range(len(costs)))

    return [bool(finite[row]) and not beaten(row) for row in range(len(costs))]


@pytest.mark.parametrize("kinds", [1, 2, 3, 4])
@pytest.mark.parametrize("values", [4, 1000])
def test_the_front_is_that_of_all_pairs(kinds, values):
    """Few values make many ties and duplicates."""
    random = np.random.default_rng(kinds * values)
    costs = random.integers(-values, values, (120, kinds)).astype(float)
    costs[random.random(costs.shape) < 0.03] = np.nan
    costs[random.random(costs.shape) < 0.02] = np.inf
    front = pareto_front(costs)
    assert front.tolist() == all_pairs(costs) and 0 < front.sum() < len(costs)


def test_duplicates_are_all_kept():
    assert pareto_front(np.array([[1, 2], [2, 1], [1, 2], [2, 2]])).tolist() == [True, True, True, False]


def test_a_row_with_a_nan_is_never_on_the_front_though_it_is_best_in_the_rest():
    costs = np.array([[np.nan, 0.0], [3.0, 1.0], [np.inf, 0.5]])
    assert pareto_front(costs).tolist() == [False, True, False]
    assert pareto_front(np.nan_to_num(costs, nan=9.0, posinf=9.0)).tolist() == [True, True, False]  # the control


def test_nothing_has_no_front():
    assert pareto_front(np.empty((0, 3))).tolist() == []
    assert pareto_front(np.full((2, 2), np.nan)).tolist() == [False, False]


def test_one_dimension_is_refused():
    with pytest.raises(ValueError, match="costs has 1 dimensions; it must have two"):
        pareto_front(np.array([1.0, 2.0]))
