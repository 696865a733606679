"""Batches of rows: each once an epoch, in an order that any step can be asked for."""

import numpy as np
import pytest
import torch

from distill.batches import (
    NOT_COUNTED,
    PADDING,
    RowBatches,
    count_counted,
    count_tokens,
    counted_positions,
    document_numbers,
    mark_start,
    not_counted,
    plain_ids,
    split_padding,
)


@pytest.fixture
def rows() -> np.ndarray:
    return np.arange(24, dtype=np.int32)[:, None] * 10 + np.arange(4, dtype=np.int32)


def first_ids(batches: RowBatches, steps) -> list[int]:
    return [row for step in steps for row in batches.at(step)[:, 0].tolist()]


def test_every_row_comes_once_an_epoch(rows):
    batches = RowBatches(rows, 4, seed=3)
    for epoch in range(3):
        seen = first_ids(batches, range(epoch * 6, epoch * 6 + 6))
        assert sorted(seen) == rows[:, 0].tolist()


def test_every_epoch_and_every_seed_has_an_order_of_its_own(rows):
    batches = RowBatches(rows, 4, seed=3)
    orders = [first_ids(batches, range(6)), first_ids(batches, range(6, 12)), first_ids(RowBatches(rows, 4, seed=4), range(6)), rows[:, 0].tolist()]
    assert len({tuple(order) for order in orders}) == 4


def test_a_step_asked_for_directly_is_the_one_walked_to(rows):
    walked = RowBatches(rows, 4, seed=3)
    batches = [walked.at(step) for step in range(15)]
    for step in (14, 0, 7, 6, 5):
        assert torch.equal(RowBatches(rows, 4, seed=3).at(step), batches[step])
        assert torch.equal(walked.at(step), batches[step])
    assert not torch.equal(batches[0], batches[6])


def test_rows_come_whole_as_int64(rows):
    batch = RowBatches(rows, 4, seed=3).at(0)
    assert batch.dtype == torch.int64 and batch.shape == (4, 4)
    assert (batch - batch[:, :1]).tolist() == [[0, 1, 2, 3]] * 4


def test_an_incomplete_last_batch_is_left_for_another_epoch(rows):
    batches = RowBatches(rows, 5, seed=3)
    assert (batches.steps_per_epoch, batches.tokens_per_step) == (4, 20)
    assert len(set(first_ids(batches, range(4)))) == 20
    assert len(set(first_ids(batches, range(40)))) == 24


def test_fewer_rows_than_a_batch_are_refused(rows):
    with pytest.raises(ValueError, match="train.batch is 25, but the data has only 24 rows of 4 tokens"):
        RowBatches(rows, 25, seed=3)
    RowBatches(rows, 24, seed=3)


PADDED = np.array([[5, 6, 7, 8], [0, 3, -1, -1], [4, 0, 2, -1]], dtype=np.int32)


def test_padding_is_split_from_ids_and_id_zero_is_a_token():
    ids, mask = split_padding(torch.from_numpy(PADDED).long())
    assert ids.tolist() == [[5, 6, 7, 8], [0, 3, 0, 0], [4, 0, 2, 0]] and ids.dtype == torch.int64
    assert mask.sum(1).tolist() == [4, 2, 3] and mask[1].tolist() == [True, True, False, False]


def test_padding_is_not_counted_as_tokens(rows, monkeypatch):
    assert count_tokens(PADDED) == 9 and count_tokens(rows) == 96 and count_tokens(PADDED[:0]) == 0
    monkeypatch.setattr("distill.batches.COUNTED_AT_ONCE", 9)  # two rows
    assert count_tokens(PADDED) == 9 and count_tokens(rows) == 96


# Two documents of three tokens, the second's first marked as a start; at two positions of each nothing is learned.
MARKED = np.array([[not_counted(0), 7, not_counted(NOT_COUNTED - 1), mark_start(not_counted(0)), not_counted(6), 9, PADDING]], dtype=np.int32)


def test_marked_rows_are_read_back():
    rows = torch.from_numpy(MARKED).long()
    ids, mask = split_padding(rows)
    assert ids.tolist() == [[0, 7, NOT_COUNTED - 1, 0, 6, 9, 0]] and mask.tolist() == [[True] * 6 + [False]]
    assert plain_ids(MARKED).tolist() == [[0, 7, NOT_COUNTED - 1, 0, 6, 9, PADDING]] and plain_ids(MARKED).dtype == np.int32
    assert counted_positions(rows).tolist() == counted_positions(MARKED).tolist() == [[False, True, False, False, False, True, False]]
    assert document_numbers(rows).tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    assert count_counted(rows) == count_counted(MARKED) == 2 and count_tokens(MARKED) == 6


def test_without_marks_what_counts_is_what_is_real():
    rows = torch.from_numpy(PADDED).long()
    rows[0, 2] = mark_start(rows[0, 2])
    assert torch.equal(counted_positions(rows), split_padding(rows)[1]) and count_counted(PADDED) == count_tokens(PADDED)
    assert not torch.equal(counted_positions(not_counted(rows)), split_padding(rows)[1])


def test_a_step_of_padded_rows_has_the_tokens_of_the_mean_batch():
    assert [RowBatches(PADDED, batch, seed=0).tokens_per_step for batch in (1, 2, 3)] == [3, 6, 9]
