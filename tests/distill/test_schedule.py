"""Learning rate over a run."""

import math

import pytest

from distill.schedule import learning_rate_share


def shares(total: int, warmup: float, final: float) -> list[float]:
    return [learning_rate_share(step, total, warmup_share=warmup, final_share=final) for step in range(total + 1)]


def test_the_rate_rises_in_equal_steps_to_the_peak():
    assert shares(100, 0.1, 0.05)[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


def test_the_rate_falls_along_half_a_cosine_to_its_final_share():
    values = shares(100, 0.1, 0.05)
    assert values[55] == pytest.approx(0.05 + 0.95 * 0.5) and values[100] == pytest.approx(0.05)
    assert values[28] == pytest.approx(0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * 0.2)))
    assert all(later < earlier for earlier, later in zip(values[10:], values[11:], strict=False))


def test_the_rate_is_never_zero_nor_above_the_peak():
    assert all(0 < value <= 1 for total in (1, 2, 7, 100) for value in shares(total, 0.05, 0.0)[:-1])


def test_a_final_share_of_one_keeps_the_peak():
    assert shares(20, 0.0, 1.0) == [1.0] * 21
    assert shares(20, 0.0, 0.5) != [1.0] * 21
