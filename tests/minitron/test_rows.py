"""Rows of tokens: cut from documents, never across two, padded on the right."""

import json

import numpy as np
import pytest

from distill.batches import PADDING, count_tokens, mark_start
from minitron.settings.data import DataSettings
from minitron.settings.training import Rows
from minitron.text.rows import Packer, document_rows, windows
from minitron.text.split_rows import SplitRows


def documents_of(row: np.ndarray) -> set[int]:
    return set((row // 100).tolist())


TOKENISED = [[100 + i for i in range(7)], [200 + i for i in range(9)], [300, 301], [400 + i for i in range(4)]]


def test_a_row_never_spans_two_documents():
    assert all(len(documents_of(row)) == 1 for row in windows(TOKENISED, 4))


def test_rows_of_concatenated_documents_do_span_them():
    together = windows([sum(TOKENISED, [])], 4)
    assert any(len(documents_of(row)) > 1 for row in together)


def test_tails_shorter_than_a_row_are_dropped():
    rows = windows(TOKENISED, 4)
    assert rows.tolist() == [[100, 101, 102, 103], [200, 201, 202, 203], [204, 205, 206, 207], [400, 401, 402, 403]]
    assert rows.dtype == np.int32


def test_documents_that_are_all_too_short_give_no_rows():
    assert windows([[1, 2], [3]], 4).shape == (0, 4)


def test_a_documents_row_is_its_beginning_padded_on_the_right():
    rows = document_rows([*TOKENISED, [500], []], 4)
    assert rows.tolist() == [[100, 101, 102, 103], [200, 201, 202, 203], [300, 301, -1, -1], [400, 401, 402, 403]]
    assert rows.dtype == np.int32


def test_packed_rows_hold_every_document_and_mark_where_the_next_begins():
    rows = Packer(12)
    packed = np.concatenate([rows.add(TOKENISED[:2]), rows.add([*TOKENISED[2:], [500]]), rows.rest()])
    assert packed.tolist() == [[*TOKENISED[1], -302, 301, -1], [*TOKENISED[0], -402, 401, 402, 403, -1]]  # -2 - 300, -2 - 400; [500] predicts nothing
    assert Packer(4).add([list(range(10))]).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]], "a document longer than a row is cut"


def test_packed_rows_of_documents_of_all_lengths_are_nearly_full():
    lengths = np.random.default_rng(0).geometric(1 / 60, 500).clip(2, 256)
    documents = [list(range(1, length + 1)) for length in lengths]
    packer = Packer(256)
    packed, padded = np.concatenate([packer.add(documents), packer.rest()]), document_rows(documents, 256)
    assert count_tokens(packed) == lengths.sum() == count_tokens(padded)
    assert count_tokens(packed) / packed.size > 0.93 > 0.3 > count_tokens(padded) / padded.size


@pytest.mark.parametrize("rows", Rows)
def test_rows_do_not_depend_on_how_the_documents_are_handed_over_nor_on_interruptions(rows, tmp_path):
    data, names = DataSettings(sequence_length=4, rows=rows), ("at_once", "one_by_one", "interrupted")
    splits = {name: SplitRows("train", data, tmp_path / f"{name}.npy") for name in names}
    splits["at_once"].add(TOKENISED)
    state = None
    for document in TOKENISED:
        splits["one_by_one"].add([document])
        killed = SplitRows("train", data, tmp_path / "interrupted.npy", state=state)
        killed.add([document])
        state = json.loads(json.dumps(killed.state()))
        killed.add([[7] * 9])  # after the state was kept: lost with the process
        killed._rows.flush()
        killed.close()
    splits["interrupted"] = SplitRows("train", data, tmp_path / "interrupted.npy", state=state)
    made = {name: finished(split) for name, split in splits.items()}
    assert len(made["at_once"]) == (6 if rows is Rows.packed else 4)
    assert all(np.array_equal(made["at_once"], other) for other in made.values())
    assert all((split.counts.documents, split.counts.tokens, split.counts.longest) == (4, 22, 9) for split in splits.values())


def finished(split: SplitRows) -> np.ndarray:
    split.finish()
    return np.load(split.path, mmap_mode="r")


@pytest.mark.parametrize(
    ("limit", "rows", "kept"),
    [(4, Rows.windows, 1), (11, Rows.windows, 2), (9, Rows.documents, 2), (10, Rows.documents, 3), (99, Rows.documents, 4)],
)
def test_a_splits_limit_counts_real_tokens_in_whole_rows(limit, rows, kept, tmp_path):
    split = SplitRows("heldout", DataSettings(sequence_length=4, rows=rows), tmp_path / "rows.npy", limit=limit)
    split.add(TOKENISED)
    is_full, made = split.is_full, finished(split)
    assert len(made) == kept and is_full == (limit < 14) and split.counts.kept_tokens == count_tokens(made) <= limit


def test_a_split_without_a_row_says_what_it_had_and_what_is_needed(tmp_path):
    split = SplitRows("train", DataSettings(sequence_length=10), tmp_path / "rows.npy")
    split.add(TOKENISED)
    with pytest.raises(ValueError, match=r"the 4 train documents have 22 tokens, the longest 9; a row .*needs a document of at least 10 tokens"):
        split.finish()
    assert document_rows(TOKENISED, 10).shape == (4, 10)


@pytest.mark.parametrize("rows", list(Rows))
def test_every_row_begins_with_what_a_text_begins_with(rows, tmp_path):
    """And every document of a packed row; without it, the control, they begin with the documents' own first ids."""
    documents = [list(range(10, 10 + length)) for length in (9, 4, 23, 6)]
    data = DataSettings(sequence_length=8, rows=rows)
    begun, plain = (SplitRows("train", data, tmp_path / f"{len(beginning)}.npy", beginning) for beginning in ([3], []))
    for split in (begun, plain):
        split.add(documents)
    own, other = finished(begun), finished(plain)
    marked = own < PADDING
    assert set(own[:, 0]) | set(mark_start(own[marked]).tolist()) == {3} and (rows is not Rows.packed or marked.any())
    assert own.shape[1] == other.shape[1] == 8 and 3 not in other[:, 0]
    inside = own[:, 1:][(own[:, 1:] >= 0)]
    assert set(inside.tolist()) <= set(range(10, 33)) and len(inside) > 20
