"""Orders of rows: permutations that follow from their numbers, and a blend's order for some places alone."""

import numpy as np
import pytest

from distill.batches import BlendBatches, BlendOrder, RowBatches
from distill.permutation import Shuffle


def order(seed, length: int, whole_up_to: int = 0) -> np.ndarray:
    return Shuffle(seed, length, whole_up_to=whole_up_to).at(np.arange(length))


def test_every_place_is_taken_once_whatever_the_length():
    for length in [*range(1, 70), 255, 256, 257, 1000, 65_537]:
        assert np.array_equal(np.sort(order([3, 0], length)), np.arange(length))


def test_up_to_the_threshold_the_order_is_numpys_and_beyond_it_another():
    numpys = np.random.default_rng([3, 5]).permutation(1000)
    assert np.array_equal(order([3, 5], 1000, whole_up_to=1000), numpys) and not np.array_equal(order([3, 5], 1000, whole_up_to=999), numpys)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [order(seed, 1000) for seed in ([3, 0], [3, 1], [4, 0], [4, 1])]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert (one == other).sum() < 12  # about one place of two random orders is the same


def looks_shuffled(orders: list[np.ndarray]) -> bool:
    """Of orders of 1,000: places say nothing of what stands there nor of what comes next, about one thing stays where it was, every thing comes first
    as often as last."""
    places = np.arange(1000)
    correlations = [abs(np.corrcoef(places, one)[0, 1]) for one in orders] + [abs(np.corrcoef(one[:-1], one[1:])[0, 1]) for one in orders]
    steps = [len(np.unique(np.diff(one))) for one in orders]
    stay, firsts = np.mean([(one == places).sum() for one in orders]), np.mean([one[0] for one in orders])
    return max(correlations) < 0.15 and 0.5 < stay < 1.6 and min(steps) > 500 and abs(firsts - 499.5) < 100


def test_a_computed_order_looks_like_numpys():
    assert looks_shuffled([order([seed, 0], 1000) for seed in range(60)]) and looks_shuffled([order([seed, 0], 1000, 1000) for seed in range(60)])
    assert not looks_shuffled([(np.arange(1000) * 7 + seed * 13) % 1000 for seed in range(60)])  # the control


def test_any_places_of_more_rows_than_memory_holds_are_asked_for_alone():
    found = Shuffle([1, 2], 2**40 + 7).at(np.array([0, 2**40 + 6, 5, 5]))
    assert found.dtype == np.int64 and ((found >= 0) & (found < 2**40 + 7)).all() and found[2] == found[3] and len(set(found.tolist())) == 3


def test_batches_beyond_the_threshold_have_every_row_once_an_epoch():
    rows = np.arange(24, dtype=np.int32)[:, None] * np.ones((1, 4), dtype=np.int32)
    seen = [RowBatches(rows, 4, seed=3, whole_up_to=limit).at(step)[:, 0].tolist() for limit in (24, 23) for step in range(6)]
    whole, computed = (sum(part, []) for part in (seen[:6], seen[6:]))
    assert sorted(whole) == sorted(computed) == list(range(24)) and whole != computed
    assert whole == np.random.default_rng([3, 0]).permutation(24).tolist()


# A blend.


def sorted_order(shares: np.ndarray, number: int) -> np.ndarray:
    """The order as one sorted array of all rows."""
    needed = [int(np.ceil(number * share)) + 1 for share in shares]
    due = np.concatenate([(np.arange(count) + 0.5) / share for count, share in zip(needed, shares, strict=True)])
    chosen = np.argsort(due, kind="stable")[:number]
    nth = np.concatenate([np.arange(count) for count in needed])
    return np.stack([np.repeat(np.arange(len(needed)), needed)[chosen], nth[chosen]], axis=1)


WEIGHTS = [[1], [1, 1], [70, 30], [1, 2, 3], [0.5, 0.25, 0.25], [0.9] + [0.005] * 20, [1e-6, 1, 1e-3], [3, 3, 1, 1], *np.random.default_rng(1).random((3, 7))]


def test_places_of_a_blend_asked_for_alone_are_those_of_one_sorted_array(monkeypatch):
    monkeypatch.setattr("distill.batches.ORDERED_AT_ONCE", 13)
    for weights in WEIGHTS:
        shares = np.asarray(weights) / sum(weights)
        for number in (1, 24, 1000):
            expected, whole = sorted_order(shares, number), BlendOrder(shares, number)
            assert np.array_equal(np.concatenate([whole.at(first, first + 7) for first in range(0, number + 14, 7)]), expected)
            for first in (number - 1, number // 2, 0):
                assert np.array_equal(BlendOrder(shares, number).at(first, first + 5), expected[first : first + 5])
    assert not np.array_equal(sorted_order(np.array([0.7, 0.3]), 24), sorted_order(np.array([0.3, 0.7]), 24))  # the control


def test_batches_that_are_told_their_tokens_read_no_row(monkeypatch):
    rows = np.ones((24, 4), dtype=np.int32)
    counted = RowBatches(rows, 4, seed=3), BlendBatches([rows, rows], [1, 3], tokens=96, batch=4, seed=3)
    monkeypatch.setattr("distill.batches.count_tokens", lambda _: pytest.fail("rows were read"))
    told = RowBatches(rows, 4, seed=3, num_tokens=96), BlendBatches([rows, rows], [1, 3], tokens=96, batch=4, seed=3, num_tokens=[96, 96])
    assert [one.tokens_per_step for one in told] == [one.tokens_per_step for one in counted] == [16, 16]
    with pytest.raises(pytest.fail.Exception):
        RowBatches(rows, 4, seed=3)
