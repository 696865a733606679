"""A compensated student's norms are as large as the base's, so that training goes on from what the cut kept."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from distill.optimizers import build_optimizers
from distill.plan import TrainPlan
from minitron.checkpoints.placement import WholeModel
from minitron.families.nemotron_h import FAMILY
from minitron.importance.activations import measure_width
from minitron.importance.scores import aggregate
from minitron.pruning.compensate import Recipe, build_compensated
from minitron.pruning.plan import make_plan

SMALL_NORM = 0.1  # SmolLM2's are 0.04 to 0.42
STEPS, RATE = 8, 1e-3


@pytest.fixture(scope="module")
def base(build_model, tiny):
    """A model whose norms are small: what reads behind them is as large as usual, and what writes makes up for it."""
    model = build_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.norm.weight.mul_(SMALL_NORM)
            for name in ("out_proj", "down_proj", "o_proj"):
                if hasattr(layer.mixer, name):
                    getattr(layer.mixer, name).weight.div_(SMALL_NORM)
    return model


@pytest.fixture(scope="module")
def students(base, tiny, padded_batches, config_of):
    """The same cut, balanced and not."""
    rows, placed = padded_batches(seed=11), WholeModel(FAMILY, base, tiny)
    plan = make_plan(tiny, replace(tiny, hidden=28, ffn=40), tuple(range(9)), aggregate(measure_width(placed, rows)))
    return {balanced: build_compensated(placed, plan, rows, Recipe(balanced=balanced), config=config_of(tiny)) for balanced in (True, False)}


def distance(model, base, ids) -> torch.Tensor:
    """KL from the base, nats per token."""
    with torch.no_grad():
        wanted = torch.log_softmax(base(ids, use_cache=False).logits, -1).flatten(0, 1)
    return F.kl_div(torch.log_softmax(model(ids, use_cache=False).logits, -1).flatten(0, 1), wanted, reduction="batchmean", log_target=True)


def _plan(optimizer: str) -> TrainPlan:
    return TrainPlan(tokens=1000, optimizer=optimizer, learning_rate=RATE, final_learning_rate_share=1.0, warmup_share=0.0, weight_decay=0.0, clip_norm=1.0)


def after_training(student, base, token_ids, optimizer: str) -> float:
    model, plan = deepcopy(student).train(), _plan(optimizer)
    optimizers = build_optimizers(model, plan)
    for step in range(STEPS):
        distance(model, base, token_ids(rows=8, tokens=60, seed=100 + step)).backward()
        for one in optimizers:
            one.param_groups[0]["lr"] = RATE
            one.step()
            one.zero_grad()
    with torch.no_grad():
        return distance(model.eval(), base, token_ids(rows=8, tokens=60, seed=50)).item()


def test_both_are_one_function(students, logits_of):
    own, other = logits_of(students[True]), logits_of(students[False])
    assert torch.allclose(own, other, atol=1e-4 * other.abs().max().item())


def test_norms_are_as_large_as_the_bases_and_so_are_readers(students, base):
    for balanced, ratio in ((True, 1.0), (False, 1 / SMALL_NORM)):
        norms = [(one.norm.weight.square().mean() / other.norm.weight.square().mean()).sqrt().item()
                 for one, other in zip(students[balanced].model.layers, base.model.layers, strict=True)]  # fmt: skip
        assert norms == pytest.approx([ratio] * len(norms), rel=0.4)
    sizes = {balanced: students[balanced].model.layers[1].mixer.up_proj.weight.square().mean().sqrt().item() for balanced in (True, False)}
    own = base.model.layers[1].mixer.up_proj.weight.square().mean().sqrt().item()
    assert sizes[True] == pytest.approx(own, rel=0.3) and sizes[False] < own / 5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_few_steps_leave_a_balanced_start_where_it_was_or_better(optimizer, students, base, token_ids):
    """The control is the same function with small readers: steps that know no size throw it away."""
    with torch.no_grad():
        start = distance(students[True], base, token_ids(rows=8, tokens=60, seed=50)).item()
    balanced, small = (after_training(students[balanced], base, token_ids, optimizer) for balanced in (True, False))
    assert balanced < start < small
