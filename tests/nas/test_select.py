"""Rules of choice, on numbers small enough to choose by eye."""

import numpy as np
import pytest

from nas.select import loss_within, lowest_loss, weighted

#                   0    1      2      3       4       5
LOSSES = np.array([4.0, 3.912, np.nan, 3.925, 3.9315, np.inf])
MEMORY = np.array([5, 9, 1, 8, 7, 1]) * 2**30
SPEEDS = np.array([90.0, 50.0, 900.0, 70.0, 70.0, 900.0])
NAMES = list("fedcba")


def test_the_lowest_loss_is_chosen_and_said():
    choice = lowest_loss(LOSSES, MEMORY, NAMES, noise=0.005)
    assert (choice.row, choice.reason) == (1, "lowest loss, 3.912 nats/token")


@pytest.mark.parametrize(("noise", "row"), [(0, 1), (0.0129, 1), (0.013001, 3), (0.02, 4), (1, 0)])
def test_within_the_noise_the_smallest_is_chosen_and_the_reason_says_so(noise, row):
    choice = lowest_loss(LOSSES, MEMORY, NAMES, noise=noise)
    assert choice.row == row and ("the noise of a measurement" in choice.reason) == (row != 1)


def test_of_equals_the_first_by_name_is_chosen_in_whatever_order_they_come():
    """The control: without names to go by the order would decide."""
    losses, memory = np.array([2.0, 1.0, 1.001, 1.002]), np.full(4, 7)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        names = [NAMES[one] for one in order]
        assert names[lowest_loss(losses[order], memory, names, noise=0.005).row] == "c"


def test_a_further_row_within_the_noise_changes_nothing_unless_it_is_smaller():
    losses, memory = np.array([1.0, 1.003, 1.5]), np.array([9, 8, 1])
    assert lowest_loss(losses, memory, NAMES, noise=0.005).row == 1
    for loss, size, row in ((1.001, 9, 1), (1.004, 8, 1), (1.004, 7, 3)):
        assert lowest_loss(np.append(losses, loss), np.append(memory, size), ["a", "b", "c", "z"], noise=0.005).row == row


@pytest.mark.parametrize(("within", "row", "number"), [(0, 1, 1), (0.013001, 3, 2), (0.02, 4, 3), (1, 0, 4)])
def test_the_fastest_within_so_many_nats_is_chosen_the_smaller_of_equals(within, row, number):
    choice = loss_within(LOSSES, MEMORY, SPEEDS, within=within)
    assert (choice.row, choice.reason) == (row, f"fastest of the {number} within {within:g} nats/token of the lowest loss")


def test_a_loss_exactly_so_far_away_is_within():
    assert loss_within(np.array([3.0, 3.5]), MEMORY[:2], np.array([1.0, 2.0]), within=0.5).row == 1


@pytest.mark.parametrize(("weights", "row"), [((1, 0, 0), 1), ((0, 1, 0), 0), ((0, 0, 1), 0), ((1, 1, 0), 4), ((1, 0, 0.3), 3)])
def test_weights_move_the_choice(weights, row):
    assert weighted(LOSSES, MEMORY, SPEEDS, weights=weights).row == row


def test_the_weighted_sum_is_of_columns_from_zero_to_one():
    """Row 4 by hand: loss (3.9315 − 3.912) / 0.088, memory (7 − 5) / 4, slowness (90 − 70) / 40."""
    choice = weighted(LOSSES, MEMORY, SPEEDS, weights=(2, 1, 0.5))
    assert choice.row == 4
    expected = 2 * 0.0195 / 0.088 + 2 / 4 + 0.5 * 20 / 40
    assert choice.reason == f"lowest weighted sum of 4, {expected:.3f} (2 × loss, 1 × memory, 0.5 × slowness, each from 0 best to 1 worst)"


def test_units_do_not_move_the_weighted_choice():
    assert weighted(LOSSES * 1000, MEMORY / 2**30, SPEEDS / 7, weights=(2, 1, 0.5)).row == 4


def test_a_column_that_is_the_same_everywhere_does_not_count():
    assert weighted(np.array([2.0, 1.0]), np.array([5, 5]), np.array([3.0, 3.0]), weights=(1, 1, 1)).row == 1


RULES = {
    "lowest_loss": lambda losses: lowest_loss(losses, MEMORY, NAMES, noise=0.005),
    "loss_within": lambda losses: loss_within(losses, MEMORY, SPEEDS, within=10),
    "weighted": lambda losses: weighted(losses, MEMORY, SPEEDS, weights=(1, 1, 1)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_without_a_finite_loss_is_never_chosen(rule, bad):
    losses = np.array([4.0, 3.912, bad, 3.925, 3.9315, bad])
    assert RULES[rule](losses).row not in (2, 5)


def test_with_a_finite_loss_the_same_row_is_chosen():
    """The control: row 2 is the fastest and the smallest."""
    losses = np.array([4.0, 3.912, 3.9, 3.925, 3.9315, np.inf])
    assert [rule(losses).row for rule in RULES.values()] == [2, 2, 2]


@pytest.mark.parametrize("rule", RULES)
def test_no_finite_loss_at_all_is_refused(rule):
    with pytest.raises(ValueError, match="none of the 6 candidates has a finite loss"):
        RULES[rule](np.full(6, np.nan))


@pytest.mark.parametrize("within", [-0.1, np.nan, np.inf])
def test_a_distance_that_cannot_be_is_refused(within):
    with pytest.raises(ValueError, match=r"search.noise \(.*\) must be a number of nats/token of at least 0"):
        lowest_loss(LOSSES, MEMORY, NAMES, noise=within)
    with pytest.raises(ValueError, match=r"search.loss_within \(.*\) must be a number of nats/token of at least 0"):
        loss_within(LOSSES, MEMORY, SPEEDS, within=within)


@pytest.mark.parametrize("weights", [(0, 0, 0), (1, -1, 0), (1, np.nan, 0), (1, 1)])
def test_weights_that_cannot_be_are_refused(weights):
    with pytest.raises(ValueError, match="search.weights .* must be three numbers"):
        weighted(LOSSES, MEMORY, SPEEDS, weights=weights)
