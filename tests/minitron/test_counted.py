"""What measures make of rows in which not every position counts, against whole logits and a mask put down by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill.batches import PADDING, not_counted
from minitron.checkpoints.placement import WholeModel
from minitron.families.nemotron_h import FAMILY
from minitron.importance.activations import measure_width
from minitron.importance.layers import Block, SweepLimits, measure_round, run_sublayers
from minitron.measures.held_out import by_position, by_source, held_out_loss, token_sums
from minitron.measures.speed import make_prompts
from minitron.pruning.damage import walked_loss
from minitron.search.distances import Distance, measure_batch
from minitron.text.samples import batches_of, longest_prompt

REAL = (12, 12, 9, 12)  # tokens of each row; at the positions of COUNTED something is learned, and in the third row nowhere
COUNTED = ((0, 4, 5, 11), tuple(range(6, 12)), (), (10,))
PLACES = [(row, place) for row, places in enumerate(COUNTED) for place in places]
PREDICTED = [(row, place) for row, place in PLACES if place + 1 < REAL[row]]


@pytest.fixture(scope="module")
def ids(token_ids) -> torch.Tensor:
    return token_ids(rows=4, tokens=12, seed=9)


@pytest.fixture(scope="module")
def rows(ids) -> np.ndarray:
    rows = not_counted(ids.numpy().astype(np.int32))
    for row, (real, places) in enumerate(zip(REAL, COUNTED, strict=True)):
        rows[row, list(places)] = ids[row, list(places)]
        rows[row, real:] = PADDING
    return rows


@pytest.fixture(scope="module")
def unmarked(rows, ids) -> np.ndarray:
    return np.where(rows == PADDING, PADDING, ids.numpy().astype(np.int32))


@pytest.fixture(scope="module")
def batches(rows) -> list[torch.Tensor]:
    return batches_of(rows, 2, "cpu")


@pytest.fixture(scope="module")
def other(build_model) -> nn.Module:
    return build_model(seed=1)


def at(values_BT: torch.Tensor, places) -> torch.Tensor:
    return torch.stack([values_BT[place] for place in places])


@torch.no_grad()
def by_hand(model, teacher, ids) -> tuple[float, float, float]:
    """Loss, KL and agreement over PREDICTED, from whole logits in float64."""
    own, reference = (one(ids, use_cache=False).logits.double().log_softmax(-1) for one in (model, teacher))
    loss = at(-own[:, :-1].gather(-1, ids[:, 1:, None])[..., 0], PREDICTED)
    kl = at((reference.exp() * (reference - own)).sum(-1), PREDICTED)
    return loss.mean().item(), kl.mean().item(), at((own.argmax(-1) == reference.argmax(-1)).double(), PREDICTED).mean().item()


def test_held_out_measures_are_means_over_what_counts(rows, batches, ids, teacher, other, tiny, unmarked):
    loss, kl, agreement = by_hand(other, teacher, ids)
    sums = token_sums(other, teacher, batches)
    found = sums.means()
    assert (found.loss_nats_per_token, found.kl_to_teacher_nats_per_token) == (pytest.approx(loss, rel=1e-6), pytest.approx(kl, rel=1e-5))
    assert (found.top1_agreement, found.tokens) == (agreement, len(PREDICTED))
    assert held_out_loss(other, batches) == pytest.approx(loss, rel=1e-6)
    assert walked_loss(WholeModel(FAMILY, other, tiny), batches) == pytest.approx(loss, rel=1e-6)
    distance = sum((measure_batch(teacher, {"a": other}, batch)["a"] for batch in batches), Distance())
    assert distance.means() == pytest.approx({"loss": loss, "kl": kl}, rel=1e-5) and distance.tokens == len(PREDICTED)
    assert held_out_loss(other, batches_of(unmarked, 2, "cpu")) != pytest.approx(loss, rel=1e-3)  # the control


def test_parts_without_a_token_that_counts_are_left_out(batches, teacher, other):
    sums = token_sums(other, teacher, batches)
    assert {part["source"]: part["tokens"] for part in by_source(sums, ["a", "b", "c", "a"])} == {"a": 4, "b": 5}
    assert [(part["from"], part["to"], part["tokens"]) for part in by_position(sums)] == [(1, 1, 1), (4, 7, 3), (8, 11, 5)]


def test_rows_of_which_no_token_counts_are_refused(batches, teacher, other, tiny):
    none, placed = [batches[1][:1]], WholeModel(FAMILY, other, tiny)
    for measure in (lambda: token_sums(other, teacher, none).means(), lambda: held_out_loss(other, none), lambda: walked_loss(placed, none),
                    measure_batch(teacher, {"a": other}, none[0])["a"].means, lambda: round_of(placed, none, "kl").scores("kl", normalised=False)):  # fmt: skip
        with pytest.raises(ValueError, match="rows measured none has a token that is predicted and counts"):
            measure()


def round_of(placed: WholeModel, batches, criterion: str):
    return measure_round(placed, Block(list(batches)), range(placed.architecture.num_layers), [2], criterion, SweepLimits())


@torch.no_grad()
@pytest.mark.parametrize("criterion", ["loss", "kl", "mse"])
def test_layers_are_scored_by_what_counts(criterion, batches, unmarked, ids, teacher, tiny):
    placed = WholeModel(FAMILY, teacher, tiny)
    layers, positions = range(tiny.num_sublayers), PREDICTED if criterion == "loss" else PLACES
    with placed.open_head() as head:
        full, without = (head.logits(run_sublayers(placed, placed.embed([ids]), kept)[0]).double() for kept in (layers, [one for one in layers if one != 2]))
    expected = {
        "loss": F.cross_entropy(without[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"),
        "kl": F.kl_div(without.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none").sum(-1),
        "mse": (full - without).square().mean(-1),
    }[criterion]
    assert round_of(placed, batches, criterion).scores(criterion, normalised=False)[2] == pytest.approx(at(expected, positions).mean().item(), rel=1e-5)
    everywhere = round_of(placed, batches_of(unmarked, 2, "cpu"), criterion).scores(criterion, normalised=False)[2]
    assert everywhere != pytest.approx(at(expected, positions).mean().item(), rel=1e-3)  # the control


def test_activations_are_summed_over_all_real_tokens(batches, unmarked, teacher, tiny):
    marked, plain = (measure_width(WholeModel(FAMILY, teacher, tiny), some) for some in (batches, batches_of(unmarked, 2, "cpu")))
    assert marked.num_tokens == plain.num_tokens == sum(REAL) and marked.sums.keys() == plain.sums.keys()
    assert all(np.array_equal(values, plain.sums[site]) for site, values in marked.sums.items())


def test_prompts_are_taken_without_marks(rows, unmarked):
    assert make_prompts(rows, 30, 2).equal(make_prompts(unmarked, 30, 2)) and longest_prompt(rows, 8).equal(longest_prompt(unmarked, 8))
    assert (rows[0, :8] != unmarked[0, :8]).any()
