"""Packed rows: documents that share a row know nothing of each other, in the model, the loss and its gradients."""

from copy import deepcopy

import pytest
import torch

from distill.batches import PADDING, document_numbers, mark_start, split_padding
from distill.losses import next_token_labels
from distill.objectives import distillation_loss, head_of
from minitron.mamba import dispatch

LENGTHS = ((7, 41, 2, 12), (30, 33))  # of the documents of two rows; the second has one place to spare


@pytest.fixture(scope="module", autouse=True)
def own_scan():
    """Ours in transformers' place, for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, function in dispatch.replacements():
            patch.setattr(owner, name, function)
        yield


@pytest.fixture(scope="module")
def documents(token_ids):
    ids = token_ids(rows=6, tokens=64, seed=7)
    numbers = iter(range(6))
    return [[ids[next(numbers), :length] for length in row] for row in LENGTHS]


def packed(documents) -> torch.Tensor:
    rows = torch.full((len(documents), 64), PADDING)
    for row, parts in zip(rows, documents, strict=True):
        joined = torch.cat([part if number == 0 else torch.cat([mark_start(part[:1]), part[1:]]) for number, part in enumerate(parts)])
        row[: len(joined)] = joined
    return rows


def alone(documents) -> torch.Tensor:
    """A document in every row."""
    parts = [part for row in documents for part in row]
    rows = torch.full((len(parts), 64), PADDING)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return rows


def logits_of(model, rows_BT):
    head = head_of(model, rows_BT)
    return head.hidden_BTD @ head.weight_VD.T


def test_ids_mask_and_documents_are_read_back(documents):
    rows = packed(documents)
    ids, mask = split_padding(rows)
    assert torch.equal(ids[0, :62], torch.cat(documents[0])) and mask.sum(1).tolist() == [62, 63]
    assert document_numbers(rows)[0].tolist() == [0] * 7 + [1] * 41 + [2] * 2 + [3] * 14
    assert document_numbers(alone(documents)) is None


@torch.no_grad()
def test_changing_the_last_token_of_one_document_moves_no_logit_of_the_next(teacher, documents):
    rows = packed(documents)
    changed = rows.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 50
    before, after = (logits_of(teacher, one) for one in (rows, changed))
    assert torch.equal(before[0, 7:], after[0, 7:]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 6], after[0, 6])
    as_one = [logits_of(teacher, split_padding(one)[0]) for one in (rows, changed)]  # the control: the same ids as one document
    assert (as_one[0][0, 7:] - as_one[1][0, 7:]).abs().max() > 1e-4


@torch.no_grad()
def test_a_packed_documents_logits_are_those_of_it_alone(teacher, documents):
    together, apart = logits_of(teacher, packed(documents)), logits_of(teacher, alone(documents))
    places = [(row, sum(LENGTHS[row][:number]), length) for row in (0, 1) for number, length in enumerate(LENGTHS[row])]
    for single, (row, first, length) in zip(apart, places, strict=True):
        assert torch.allclose(together[row, first : first + length], single[:length], atol=1e-5 * apart.abs().max().item())


def test_loss_and_gradients_of_packed_rows_are_those_of_their_documents(teacher, documents):
    student = deepcopy(teacher).requires_grad_(True).train()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    loss, measured = distillation_loss(deepcopy(teacher)), []
    for rows in (packed(documents), alone(documents)):
        means = loss(student, rows)
        measured.append((means, torch.autograd.grad(means["loss"], student.parameters())))
    (one, gradients), (other, expected) = measured
    assert {name: value.item() for name, value in one.items()} == pytest.approx({name: value.item() for name, value in other.items()}, rel=1e-5)
    assert all(torch.allclose(a, b, atol=2e-6 + 1e-4 * b.abs().max().item()) for a, b in zip(gradients, expected, strict=True))
    assert one["loss"].item() > 1e-3


def test_no_token_is_asked_for_the_next_documents_first(documents):
    labels = next_token_labels(packed(documents))
    assert labels[0, 6] == labels[0, 47] == labels[0, 61] == PADDING and labels[0, 5] == documents[0][0][6]
