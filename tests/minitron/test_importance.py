"""Importance scores against slow float64 loops written from the papers' formulas, and planted units that must score lowest."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memory_budget.architecture import Architecture
from memory_budget.hf_config import read_config
from minitron.checkpoints.placement import StreamedModel, WholeModel
from minitron.families.base import ATTENTION_HEAD, FFN, HIDDEN, MAMBA_HEAD
from minitron.families.nemotron_h import FAMILY
from minitron.importance.activations import measure_width
from minitron.importance.layers import Block, SweepLimits, measure_round, run_sublayers
from minitron.importance.removal import LayerRules, Removal, check_rules, rank_iteratively, rank_once, removable_layers
from minitron.importance.scores import ImportanceScores, aggregate, load_scores, load_sums

FLOORS = {"M": 1, "*": 1, "-": 1}
NO_LIMITS = SweepLimits()
TINY_SIZES = Architecture(
    model_type="nemotron_h", pattern="M-M*-M-*-", hidden=32, vocab=97, ffn=48, num_attention_heads=6, num_key_value_heads=2, attention_head_dim=8,
    mamba_num_heads=8, mamba_head_dim=4, mamba_num_groups=2, mamba_state_size=6, mamba_conv_kernel=4,
)  # fmt: skip


def whole(model: nn.Module, pattern: str = "M-M*-M-*-") -> WholeModel:
    return WholeModel(FAMILY, model, replace(TINY_SIZES, pattern=pattern))


def score_width(model: nn.Module, batches) -> ImportanceScores:
    return aggregate(measure_width(whole(model), list(batches)))


def score_round(model, kept, removable, batches, *, normalised=True, criterion="mse", limits=NO_LIMITS) -> dict[int, float]:
    placed = model if hasattr(model, "visit") else whole(model)
    return measure_round(placed, Block(list(batches)), kept, removable, criterion, limits).scores(criterion, normalised=normalised)


def rank_by_removal(model, pattern, batches, *, num_layers, floors, normalised=True, on_round=lambda _: None, limits=NO_LIMITS) -> list[Removal]:
    """As the score stage does it, with one block that remembers states from round to round."""
    block, placed = Block(list(batches)), whole(model)

    def ask(kept, removable):
        return measure_round(placed, block, kept, removable, "mse", limits).scores("mse", normalised=normalised)

    return rank_iteratively(pattern, num_layers, LayerRules(floors, {}), ask, on_round)


@pytest.fixture(scope="module")
def rows(token_ids) -> torch.Tensor:
    return token_ids(rows=5, tokens=12, seed=3)


@pytest.fixture(scope="module")
def scores(teacher, tiny, rows) -> ImportanceScores:
    return score_width(teacher, rows.split(2))


# Width: a float64 loop from each layer's input to the activation that counts.


def layer_inputs(model: nn.Module, row: torch.Tensor) -> list[torch.Tensor]:
    """What enters each layer, and last what enters the final norm, [T, D] in float64, for one row of ids."""
    seen = []
    handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double())) for module in (*model.model.layers, model.model.norm_f)]
    with torch.no_grad():
        model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def normed(norm: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    return norm.weight.double() * hidden_TD / torch.sqrt((hidden_TD**2).mean(-1, keepdim=True) + 1e-5)


def attention_output(mixer: nn.Module, normed_TD: torch.Tensor, tiny) -> torch.Tensor:
    """Input of o_proj, [T, Q·H]: causal grouped-query attention, a query and a head at a time."""
    H, per_group = tiny.attention_head_dim, tiny.num_attention_heads // tiny.num_key_value_heads
    q, k, v = (normed_TD @ projection.weight.double().T for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    result = torch.zeros_like(q)
    for head in range(tiny.num_attention_heads):
        own, shared = slice(head * H, (head + 1) * H), slice(head // per_group * H, (head // per_group + 1) * H)
        for token in range(len(q)):
            weights = torch.softmax(k[: token + 1, shared] @ q[token, own] / math.sqrt(H), dim=0)
            result[token, own] = weights @ v[: token + 1, shared]
    return result


def activation(axis: str, layer: int, model: nn.Module, inputs: list[torch.Tensor], tiny) -> torch.Tensor:
    norm = model.model.layers[layer].norm if layer < tiny.num_layers else model.model.norm_f
    hidden = normed(norm, inputs[layer])
    if axis == HIDDEN:
        return hidden
    mixer = model.model.layers[layer].mixer
    if axis == FFN:
        return torch.relu(hidden @ mixer.up_proj.weight.double().T) ** 2
    if axis == ATTENTION_HEAD:
        return attention_output(mixer, hidden, tiny)
    return hidden @ mixer.in_proj.weight.double()[tiny.mamba_inner : 2 * tiny.mamba_inner].T  # rows z, x, …


def score_by_loop(axis: str, layer: int, model: nn.Module, rows: torch.Tensor, tiny) -> np.ndarray:
    squares = 0.0
    for row in rows:
        values = activation(axis, layer, model, layer_inputs(model, row), tiny)
        total = torch.zeros(values.shape[1], dtype=torch.float64)
        for token in range(len(values)):
            total += values[token].abs()
        squares = squares + (total / len(values)) ** 2
    return squares.sqrt().detach().numpy()


@pytest.mark.parametrize(
    ("axis", "layer"),
    [(HIDDEN, 0), (HIDDEN, 3), (HIDDEN, 8), (HIDDEN, 9), (FFN, 1), (FFN, 8), (MAMBA_HEAD, 0), (MAMBA_HEAD, 5), (ATTENTION_HEAD, 3), (ATTENTION_HEAD, 7)],
)
def test_width_scores_are_those_of_a_float64_loop(axis, layer, scores, teacher, tiny, rows):
    expected = score_by_loop(axis, layer, teacher, rows, tiny)
    np.testing.assert_allclose(scores.sites[axis, layer].reshape(-1), expected, rtol=1e-5)


def test_the_float64_loop_notices_another_slice(scores, teacher, tiny, rows):
    shifted = replace(tiny, mamba_num_heads=0)  # reads z in place of x
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(scores.sites[MAMBA_HEAD, 0].reshape(-1), score_by_loop(MAMBA_HEAD, 0, teacher, rows, shifted), rtol=1e-5)


def test_width_scores_have_the_documented_shapes(scores):
    shapes = {axis: scores.sites[axis, layer].shape for axis, layer in ((HIDDEN, 9), (FFN, 1), (MAMBA_HEAD, 0), (ATTENTION_HEAD, 3))}
    assert shapes == {HIDDEN: (32,), FFN: (48,), MAMBA_HEAD: (8, 4), ATTENTION_HEAD: (6, 8)}


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_width_scores_do_not_depend_on_the_batch(batch, scores, teacher, tiny, rows):
    others = score_width(teacher, rows.split(batch))
    for site, values in scores.sites.items():
        np.testing.assert_allclose(others.sites[site], values, rtol=1e-5, atol=1e-7, err_msg=str(site))


def test_width_scores_depend_on_which_tokens_form_a_sample(scores, teacher, tiny, rows):
    others = score_width(teacher, [rows.reshape(10, 6)])
    assert not np.allclose(others.sites[FFN, 1], scores.sites[FFN, 1], rtol=1e-2)


def test_scoring_works_on_a_model_in_training_mode_and_leaves_no_hook(scores, build_model, tiny, rows):
    model = build_model().train()
    others = score_width(model, rows.split(2))
    assert all(np.array_equal(others.sites[site], values) for site, values in scores.sites.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_rankings_are_formed_from_the_sites_as_documented(scores):
    hidden = [sum(scores.sites[HIDDEN, layer][channel] for layer in range(10)) for channel in range(32)]
    np.testing.assert_allclose(scores.hidden(), hidden, rtol=1e-12)
    site = scores.sites[MAMBA_HEAD, 2]
    np.testing.assert_allclose(scores.mamba_channels(2), [math.sqrt(sum(site[head, p] ** 2 for head in range(8))) for p in range(4)], rtol=1e-12)
    np.testing.assert_allclose(scores.mamba_heads(2), [math.sqrt(sum(site[head, p] ** 2 for p in range(4))) for head in range(8)], rtol=1e-12)
    np.testing.assert_allclose(scores.mamba_heads(2, (1, 3)), [math.hypot(site[head, 1], site[head, 3]) for head in range(8)], rtol=1e-12)
    np.testing.assert_allclose(scores.attention_heads(3), [math.sqrt(sum(v**2 for v in head)) for head in scores.sites[ATTENTION_HEAD, 3]], rtol=1e-12)


def test_scores_are_read_back_as_they_were_saved(scores, teacher, rows, tmp_path):
    measure_width(whole(teacher), list(rows.split(2))).save(tmp_path / "scores.safetensors")
    loaded = load_scores(tmp_path / "scores.safetensors")
    assert loaded.sites.keys() == scores.sites.keys()
    assert all(np.array_equal(loaded.sites[site], values) and loaded.sites[site].dtype == values.dtype for site, values in scores.sites.items())


# Width: planted units.


def _kill_neuron(model):
    model.model.layers[4].mixer.up_proj.weight[17] = 0


def _kill_mamba_head(model):
    model.model.layers[2].mixer.in_proj.weight[32 + 4 * 5 : 32 + 4 * 6] = 0  # x rows of head 5


def _kill_mamba_channel(model):
    model.model.layers[2].mixer.in_proj.weight[32 + 1 : 64 : 4] = 0  # channel 1 of every head


def _kill_attention_head(model):
    model.model.layers[7].mixer.v_proj.weight[:8] = 0  # the values that heads 0, 1 and 2 share


def _kill_hidden_channel(model):
    for norm in (*(block.norm for block in model.model.layers), model.model.norm_f):
        norm.weight[9] = 0


PLANTED = [
    (_kill_neuron, lambda scores: scores.ffn(4), {17}),
    (_kill_mamba_head, lambda scores: scores.mamba_heads(2), {5}),
    (_kill_mamba_channel, lambda scores: scores.mamba_channels(2), {1}),
    (_kill_attention_head, lambda scores: scores.attention_heads(7), {0, 1, 2}),
    (_kill_hidden_channel, lambda scores: scores.hidden(), {9}),
]


@pytest.mark.parametrize(("kill", "ranking", "dead"), PLANTED, ids=[kill.__name__.removeprefix("_kill_") for kill, _, _ in PLANTED])
def test_a_dead_unit_scores_zero_and_no_other_does(kill, ranking, dead, build_model, tiny, rows, scores):
    model = build_model()
    with torch.no_grad():
        kill(model)
    values = ranking(score_width(model, [rows]))
    assert {unit for unit, value in enumerate(values) if value == 0} == dead
    assert np.all(ranking(scores) > 0)  # the same model without the planting


# Values that are not finite.


@pytest.mark.parametrize(
    ("layer", "name", "axis"),
    [(3, "norm.weight", HIDDEN), (1, "mixer.up_proj.weight", FFN), (2, "mixer.in_proj.weight", MAMBA_HEAD), (7, "mixer.v_proj.weight", ATTENTION_HEAD)],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_layer_whose_activations_are_not_finite_is_named(value, layer, name, axis, build_model, tiny, rows):
    model = build_model()
    with torch.no_grad():
        tensor = model.get_parameter(f"model.layers.{layer}.{name}")
        tensor[(tiny.mamba_inner, 0) if axis == MAMBA_HEAD else (0,) * tensor.ndim] = value
    with pytest.raises(ValueError, match=rf"the {axis} activations of layer {layer} are not finite"):
        score_width(model, [rows])
    assert not any(module._forward_hooks for module in model.modules())


def test_ranking_layers_refuses_logits_that_are_not_finite(build_model, tiny, rows):
    model = build_model()
    with torch.no_grad():
        model.model.layers[3].norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        rank_by_removal(model, tiny.pattern, [rows], num_layers=8, floors=FLOORS)


# Depth: a full forward for every layer that could go.


@torch.no_grad()
def naive_logits(model: nn.Module, layers: list[int], row: torch.Tensor) -> torch.Tensor:
    hidden = model.model.embeddings(row[None])
    for layer in layers:
        hidden = model.model.layers[layer](hidden)
    return model.lm_head(model.model.norm_f(hidden))[0].double()


def naive_round(model: nn.Module, kept: list[int], removable: list[int], rows: torch.Tensor, normalised: bool) -> dict[int, float]:
    result = {}
    for layer in removable:
        difference = scale = 0.0
        for row in rows:
            full = naive_logits(model, list(range(9)), row)
            ablated = naive_logits(model, [other for other in kept if other != layer], row)
            difference += float(((full - ablated) ** 2).sum())
            scale += float((full**2).sum()) if normalised else full.numel()
        result[layer] = difference / scale
    return result


@pytest.mark.parametrize("normalised", [True, False], ids=["normalised", "mean square"])
@pytest.mark.parametrize(("kept", "removable"), [(list(range(9)), list(range(9))), ([0, 2, 3, 5, 6, 8], [0, 3, 8]), ([8], [8])], ids=["all", "some", "last"])
def test_a_round_is_that_of_a_naive_loop(kept, removable, normalised, teacher, rows):
    rows = rows[:3]
    scores = score_round(teacher, kept, removable, list(rows.split(2)), normalised=normalised)
    assert scores == pytest.approx(naive_round(teacher, kept, removable, rows, normalised), rel=1e-5)
    assert list(scores) == removable


def test_the_naive_loop_notices_another_reference(teacher, rows):
    kept = [0, 2, 3, 5, 6, 8]
    scores = score_round(teacher, kept, [0], list(rows.split(2)), normalised=True)
    assert scores != pytest.approx(naive_round(teacher, kept, [0], rows, False), rel=1e-2)


@pytest.mark.parametrize("normalised", [True, False], ids=["normalised", "mean square"])
def test_the_whole_order_of_removal_is_that_of_a_naive_loop(normalised, teacher, tiny, rows):
    rows = rows[:2]
    removals = rank_by_removal(teacher, tiny.pattern, [rows], num_layers=5, floors=FLOORS, normalised=normalised)
    kept = list(range(9))
    for removal in removals:
        removable = [layer for layer in kept if sum(tiny.pattern[other] == tiny.pattern[layer] for other in kept) > 1]
        expected = naive_round(teacher, kept, removable, rows, normalised)
        assert removal.scores == pytest.approx(expected, rel=1e-5)
        assert removal.layer == min(expected, key=expected.get) and removal.score == removal.scores[removal.layer]
        kept.remove(removal.layer)
    assert len(kept) == 5


def test_a_round_does_not_depend_on_the_batch(teacher, rows):
    layers = list(range(9))
    one, other = (score_round(teacher, layers, layers, list(rows.split(batch)), normalised=True) for batch in (1, 5))
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(("layer", "projection"), [(2, "out_proj"), (6, "down_proj"), (7, "o_proj")])
def test_a_layer_without_effect_goes_first(layer, projection, build_model, tiny, rows):
    model = build_model()
    with torch.no_grad():
        getattr(model.model.layers[layer].mixer, projection).weight.zero_()
    first = rank_by_removal(model, tiny.pattern, [rows], num_layers=8, floors=FLOORS)[0]
    assert first.layer == layer and first.score <= 1e-12
    assert min(score for other, score in first.scores.items() if other != layer) > 1e-4


def test_a_layer_without_effect_stays_where_its_kind_is_at_the_floor(build_model, tiny, rows):
    model = build_model()
    with torch.no_grad():
        model.model.layers[7].mixer.o_proj.weight.zero_()
    removals = rank_by_removal(model, tiny.pattern, [rows], num_layers=4, floors={"*": 2, "M": 1, "-": 1})
    assert not {3, 7} & {removal.layer for removal in removals}
    assert all(not {3, 7} & set(removal.scores) for removal in removals)


@pytest.mark.parametrize("floors", [{"M": 3, "*": 1, "-": 1}, {"M": 1, "*": 2, "-": 2}, {"M": 2, "*": 1, "-": 2}])
def test_floors_are_kept(floors, teacher, tiny, rows):
    removals = rank_by_removal(teacher, tiny.pattern, [rows[:1]], num_layers=5, floors=floors)
    left = [kind for layer, kind in enumerate(tiny.pattern) if layer not in {removal.layer for removal in removals}]
    assert len(left) == 5 and all(left.count(kind) >= floor for kind, floor in floors.items())


def test_a_depth_that_the_floors_forbid_is_refused(teacher, tiny, rows):
    rules = LayerRules({"M": 2, "*": 2, "-": 2}, {})
    with pytest.raises(ValueError, match=r"4 removals were asked for; search\.floors and scoring\.protect keep 6 of 9 layers"):
        check_rules(tiny.pattern, 5, rules)
    check_rules(tiny.pattern, 6, rules)


def test_the_teachers_depth_removes_nothing(teacher, tiny, rows):
    assert rank_by_removal(teacher, tiny.pattern, [rows], num_layers=9, floors=FLOORS) == []


def test_every_round_is_announced_when_it_is_done(teacher, tiny, rows):
    heard = []
    removals = rank_by_removal(teacher, tiny.pattern, [rows[:1]], num_layers=7, floors=FLOORS, on_round=heard.append)
    assert heard == removals and len(heard) == 2


# Other criteria, and the sums they are made of.


def naive_distance(criterion: str, full: torch.Tensor, ablated: torch.Tensor, row: torch.Tensor) -> tuple[float, int]:
    """Sum over tokens in float64, and the number of tokens, of one row."""
    if criterion == "kl":
        return float((F.softmax(full, -1) * (F.log_softmax(full, -1) - F.log_softmax(ablated, -1))).sum()), len(row)
    return float(F.cross_entropy(ablated[:-1], row[1:], reduction="sum")), len(row) - 1


@pytest.mark.parametrize("criterion", ["kl", "loss"])
def test_kl_and_loss_are_those_of_a_naive_loop(criterion, teacher, rows):
    kept, removable = [0, 2, 3, 5, 6, 8], [0, 3, 8]
    expected = {}
    for layer in removable:
        parts = [naive_distance(criterion, naive_logits(teacher, list(range(9)), row), naive_logits(teacher, [k for k in kept if k != layer], row), row)
                 for row in rows]  # fmt: skip
        expected[layer] = sum(value for value, _ in parts) / sum(number for _, number in parts)
    assert score_round(teacher, kept, removable, rows.split(2), criterion=criterion) == pytest.approx(expected, rel=1e-5)
    assert score_round(teacher, kept, removable, rows.split(2), criterion="mse") != pytest.approx(expected, rel=1e-2)


@torch.no_grad()
def test_block_influence_is_one_minus_cosine_by_a_float64_loop(teacher, tiny, rows):
    measured = measure_width(whole(teacher), list(rows.split(2)))
    expected = np.zeros(9)
    for row in rows:
        hidden = layer_inputs(teacher, row)
        for layer in range(9):
            expected[layer] += sum(float(1 - F.cosine_similarity(hidden[layer][t], hidden[layer + 1][t], dim=0)) for t in range(len(row)))
    np.testing.assert_allclose(measured.block_influence, expected, rtol=1e-5)
    assert measured.num_tokens == rows.numel()


@pytest.mark.parametrize("tokens", ["mean", "l2"])
@pytest.mark.parametrize("samples", ["mean", "l2"])
def test_every_aggregation_is_formed_from_the_same_sums(tokens, samples, teacher, tiny, rows):
    values = [activation(FFN, 1, teacher, layer_inputs(teacher, row), tiny) for row in rows]
    over_tokens = torch.stack([value.abs().mean(0) if tokens == "mean" else value.square().sum(0).sqrt() for value in values])
    expected = over_tokens.mean(0) if samples == "mean" else over_tokens.square().sum(0).sqrt()
    found = aggregate(measure_width(whole(teacher), list(rows.split(3))), tokens=tokens, samples=samples).sites[FFN, 1]
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5)


def test_sums_of_parts_add_up_to_the_sums_of_the_whole(teacher, rows, tmp_path):
    measure_width(whole(teacher), [rows[:2]]).save(tmp_path / "part")
    added = load_sums(tmp_path / "part") + measure_width(whole(teacher), [rows[2:]])
    together = measure_width(whole(teacher), [rows])
    assert (added.num_samples, added.num_tokens) == (together.num_samples, together.num_tokens)
    for site, value in together.sums.items():
        np.testing.assert_allclose(added.sums[site], value, rtol=1e-5, atol=1e-7)


# Padding.


def padded(rows: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rows cut to several lengths and padded on the right with -1, and the same rows alone."""
    lengths = [12, 5, 9, 12, 2]
    batch = rows.clone()
    for row, length in enumerate(lengths):
        batch[row, length:] = -1
    return batch, [rows[row : row + 1, :length] for row, length in enumerate(lengths)]


def test_padding_never_counts_in_width_scores(teacher, rows):
    batch, alone = padded(rows)
    found, expected = measure_width(whole(teacher), [batch]), measure_width(whole(teacher), alone)
    assert found.num_tokens == expected.num_tokens == 40
    np.testing.assert_allclose(found.block_influence, expected.block_influence, rtol=1e-5)
    for site, value in expected.sums.items():
        np.testing.assert_allclose(found.sums[site], value, rtol=1e-5, atol=1e-7, err_msg=str(site))
    counted = measure_width(whole(teacher), [batch.clamp(min=0)])
    assert not np.allclose(counted.sums[FFN, 1], found.sums[FFN, 1], rtol=1e-2)


@pytest.mark.parametrize("criterion", ["mse", "kl", "loss"])
def test_padding_never_counts_in_layer_scores(criterion, teacher, rows):
    batch, alone = padded(rows)
    layers = list(range(9))
    expected = score_round(teacher, layers, layers, alone, criterion=criterion)
    assert score_round(teacher, layers, layers, [batch], criterion=criterion) == pytest.approx(expected, rel=1e-5)
    assert score_round(teacher, layers, layers, [batch.clamp(min=0)], criterion=criterion) != pytest.approx(expected, rel=1e-3)


# Bounds on memory, and what is remembered between rounds, change nothing.


@pytest.mark.parametrize("limits", [SweepLimits(branch_tokens=1), SweepLimits(branch_tokens=120, logits_tokens=7), SweepLimits(reuse_bytes=0)])
def test_bounds_on_memory_do_not_change_the_order_of_removal(limits, teacher, tiny, rows):
    expected = rank_by_removal(teacher, tiny.pattern, list(rows.split(2)), num_layers=4, floors=FLOORS)
    found = rank_by_removal(teacher, tiny.pattern, list(rows.split(2)), num_layers=4, floors=FLOORS, limits=limits)
    assert [removal.layer for removal in found] == [removal.layer for removal in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-5)


def test_states_kept_between_rounds_save_layers_and_none_are_saved_without(teacher, tiny, rows):
    def layer_calls(reuse_bytes: int) -> int:
        calls = []
        handles = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in teacher.model.layers]
        rank_by_removal(teacher, tiny.pattern, [rows], num_layers=4, floors=FLOORS, limits=SweepLimits(reuse_bytes=reuse_bytes))
        for handle in handles:
            handle.remove()
        return len(calls)

    assert layer_calls(2**30) < layer_calls(0) == 9 + 9 + 8 + 7 + 6 + 5


# Streamed from disk.


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_teacher_scores_bit_for_bit_as_a_whole_one(dtype, max_shard_bytes, teacher, tiny, config_of, write_checkpoint, rows, tmp_path):
    folder = write_checkpoint(tmp_path / "teacher", teacher, config_of(tiny), dtype=dtype, max_shard_bytes=max_shard_bytes)
    config = read_config(folder)
    streamed, loaded = StreamedModel(FAMILY, folder, config, tiny, torch.device("cpu")), whole(FAMILY.load(folder))
    one, other = (measure_width(placed, list(rows.split(2))) for placed in (streamed, loaded))
    assert all(np.array_equal(one.sums[site], value) for site, value in other.sums.items())
    assert np.array_equal(one.block_influence, other.block_influence)
    layers = list(range(9))
    assert score_round(streamed, layers, layers, rows.split(2)) == score_round(loaded, layers, layers, rows.split(2))
    whole_scores = measure_width(whole(teacher), list(rows.split(2)))
    assert (dtype is torch.float32) == np.array_equal(one.sums[FFN, 1], whole_scores.sums[FFN, 1])


@pytest.mark.parametrize("kept", [False, True], ids=["streamed", "control: somebody keeps them"])
def test_a_walk_for_width_lets_streamed_layers_go(kept, tiny, config_of, teacher, write_checkpoint, rows, tmp_path):
    folder = write_checkpoint(tmp_path / "teacher", teacher, config_of(tiny))
    streamed, alive, held, most = StreamedModel(FAMILY, folder, read_config(folder), tiny, torch.device("cpu")), [], [], []

    def visited(layers, visit=streamed.visit):
        for layer, block in visit(layers):
            alive.append([weakref.ref(parameter) for parameter in block.parameters()])
            held.extend([block] if kept else [])
            yield layer, block
            del block

    streamed.visit = visited
    measure_width(streamed, [rows], lambda: most.append(sum(any(one() is not None for one in layer) for layer in alive)))
    assert max(most) == (tiny.num_layers if kept else 1)


def test_a_streamed_teacher_gives_the_models_logits(teacher, tiny, config_of, write_checkpoint, rows, logits_of, tmp_path):
    folder = write_checkpoint(tmp_path / "teacher", teacher, config_of(tiny))
    streamed = StreamedModel(FAMILY, folder, read_config(folder), tiny, torch.device("cpu"))
    with torch.no_grad(), streamed.open_head() as head:
        hidden = run_sublayers(streamed, streamed.embed([rows]), range(9))
        assert torch.equal(head.logits(hidden[0]), logits_of(teacher, rows))
        assert not torch.equal(head.logits(run_sublayers(streamed, streamed.embed([rows]), range(8))[0]), logits_of(teacher, rows))


# Rules of removal.


def test_protected_layers_never_go(tiny):
    rules = LayerRules({}, {}, protected=(0, 1))
    removals = rank_once(tiny.pattern, 3, rules, {layer: float(layer) for layer in range(9)})
    assert [removal.layer for removal in removals] == [2, 3, 4, 5, 6, 7]
    assert rank_once(tiny.pattern, 3, LayerRules({}, {}), {layer: float(layer) for layer in range(9)})[0].layer == 0


def test_a_ceiling_takes_layers_of_its_kind_when_no_removal_is_left_for_others(tiny):
    scores = {layer: float(layer) for layer in range(9)}  # attention is layers 3 and 7
    left = set(range(9)) - {removal.layer for removal in rank_once(tiny.pattern, 8, LayerRules({}, {"*": 1}), scores)}
    assert [tiny.pattern[layer] for layer in left].count("*") == 1
    assert removable_layers(tiny.pattern, range(9), 8, LayerRules({}, {"*": 1})) == [3, 7]
    assert removable_layers(tiny.pattern, range(9), 7, LayerRules({}, {"*": 1})) == list(range(9))


@pytest.mark.parametrize(
    ("num_layers", "rules", "says"),
    [
        (8, LayerRules({}, {}, (9,)), r"scoring\.protect names layer 9; the teacher has layers 0 to 8"),
        (3, LayerRules({}, {}, (0, 1, 2, 3)), r"6 removals were asked for; .* keep 4 of 9"),
        (8, LayerRules({}, {"M": 1}), r"scoring\.ceilings asks for 2 removals; down to 8 layers there are only 1"),
        (4, LayerRules({"*": 2}, {"*": 1}), r"scoring\.ceilings keeps at most 1 layers of kind '\*', below its floor"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(num_layers, rules, says, tiny):
    with pytest.raises(ValueError, match=says):
        check_rules(tiny.pattern, num_layers, rules)


def test_an_interrupted_ranking_goes_on_to_the_same_end(teacher, tiny, rows):
    whole_order = rank_by_removal(teacher, tiny.pattern, [rows], num_layers=5, floors=FLOORS)
    block, placed = Block([rows]), whole(teacher)

    def ask(kept, removable):
        return measure_round(placed, block, kept, removable, "mse", SweepLimits()).scores("mse", normalised=True)

    assert rank_iteratively(tiny.pattern, 5, LayerRules(FLOORS, {}), ask, done=whole_order[:2]) == whole_order
