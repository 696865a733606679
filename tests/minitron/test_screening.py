"""Candidates cut in memory and measured on held-out ids."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memory_budget.workload import Workload
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.placement import WholeModel
from minitron.checkpoints.shards import write_weights
from minitron.families.nemotron_h import FAMILY
from minitron.importance.activations import measure_width
from minitron.importance.scores import aggregate
from minitron.measures.held_out import evaluate, held_out_loss
from minitron.measures.speed import decode_tokens_per_second
from minitron.pruning.cut import build_pruned
from minitron.pruning.disk_to_disk import planned_tensors
from minitron.pruning.plan import make_plan
from minitron.search.distances import retained_importance
from minitron.text.samples import batches_of, spread_rows
from minitron.walk.store import write_json
from nas.candidates import enumerate_candidates
from nas.space import SearchSpace

KEPT_LAYERS = (0, 1, 2, 3, 5, 7, 8)


@pytest.fixture(scope="module")
def student(tiny):
    return replace(tiny, pattern="M-M*M*-", hidden=24, ffn=20, mamba_num_heads=6)


@pytest.fixture(scope="module")
def batches(token_ids):
    return list(token_ids(rows=5, tokens=16, seed=9).split(2))


@pytest.fixture(scope="module")
def scores(teacher, tiny, batches):
    return aggregate(measure_width(WholeModel(FAMILY, teacher, tiny), list(batches)))


@pytest.fixture(scope="module")
def pruned(teacher, tiny, student, scores, config_of):
    return build_pruned(FAMILY, teacher, make_plan(tiny, student, KEPT_LAYERS, scores), config_of(tiny))


# Cutting in memory.


def test_a_model_cut_in_memory_has_the_logits_of_the_written_checkpoint(
    tmp_path, pruned, teacher, tiny, student, scores, config_of, write_checkpoint, logits_of
):
    source = Checkpoint(write_checkpoint(tmp_path / "teacher", teacher, config_of(tiny)))
    folder = tmp_path / "student"
    folder.mkdir()
    write_weights(folder, planned_tensors(FAMILY, make_plan(tiny, student, KEPT_LAYERS, scores), source), max_shard_bytes=20_000)
    write_json(folder / "config.json", config_of(student))
    loaded = FAMILY.load(folder)
    assert all(torch.equal(tensor, pruned.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert torch.allclose(logits_of(loaded), logits_of(pruned), rtol=0, atol=1e-6)
    assert not torch.allclose(logits_of(pruned), logits_of(teacher), atol=0.1)  # it is another model


def test_cutting_in_memory_leaves_the_teacher_as_it_was(teacher, build_model, pruned):
    assert all(torch.equal(tensor, teacher.state_dict()[name]) for name, tensor in build_model().state_dict().items())


def test_a_model_cut_in_memory_is_ready_to_be_measured(pruned):
    assert not pruned.training and not any(parameter.is_meta for parameter in (*pruned.parameters(), *pruned.buffers()))
    assert all(block.mixer.time_step_limit == (0.0, float("inf")) for block in pruned.model.layers if hasattr(block.mixer, "A_log"))


# Evaluation.


@torch.no_grad()
def float64_log_probabilities(model, ids_BT) -> torch.Tensor:
    return F.log_softmax(model(ids_BT, use_cache=False).logits.double(), dim=-1)[:, :-1]


def test_the_teacher_is_at_no_distance_from_itself(teacher, batches):
    result = evaluate(teacher, teacher, batches)
    assert (result.kl_to_teacher_nats_per_token, result.top1_agreement) == (0.0, 1.0)


def test_a_copy_of_the_teacher_is_at_no_distance_from_it(teacher, batches):
    result = evaluate(deepcopy(teacher), teacher, batches)
    assert (result.kl_to_teacher_nats_per_token, result.top1_agreement) == (0.0, 1.0)


def test_another_model_is_at_a_distance(pruned, teacher, batches):
    result = evaluate(pruned, teacher, batches)
    assert result.kl_to_teacher_nats_per_token > 0.1 and result.top1_agreement < 0.9


def test_loss_is_the_cross_entropy_of_float64(teacher, pruned, batches):
    for model in (teacher, pruned):
        losses = [F.cross_entropy(model(ids, use_cache=False).logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten(), reduction="none") for ids in batches]
        expected = torch.cat(losses).mean().item()
        assert evaluate(model, teacher, batches).loss_nats_per_token == pytest.approx(expected, rel=1e-6)
        assert held_out_loss(model, batches) == pytest.approx(expected, rel=1e-6)


def test_kl_is_from_the_teacher_to_the_model(teacher, pruned, batches):
    forward, backward, tokens = 0.0, 0.0, 0
    for ids in batches:
        reference, own = float64_log_probabilities(teacher, ids), float64_log_probabilities(pruned, ids)
        forward += (reference.exp() * (reference - own)).sum().item()
        backward += (own.exp() * (own - reference)).sum().item()
        tokens += reference.shape[0] * reference.shape[1]
    kl = evaluate(pruned, teacher, batches).kl_to_teacher_nats_per_token
    assert kl == pytest.approx(forward / tokens, rel=1e-5) and kl != pytest.approx(backward / tokens, rel=1e-2)


def test_agreement_is_the_share_of_equal_first_choices(teacher, pruned, batches):
    equal = [(float64_log_probabilities(teacher, ids).argmax(-1) == float64_log_probabilities(pruned, ids).argmax(-1)).flatten() for ids in batches]
    assert evaluate(pruned, teacher, batches).top1_agreement == torch.cat(equal).double().mean().item()


def test_every_token_but_the_first_of_a_row_is_predicted(teacher, batches):
    heard = []
    assert evaluate(teacher, teacher, batches, heard.append).tokens == 5 * 15
    assert heard == [32, 32, 16]


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_evaluation_does_not_depend_on_the_batch(batch, teacher, pruned, batches):
    one, other = evaluate(pruned, teacher, batches), evaluate(pruned, teacher, list(torch.cat(batches).split(batch)))
    assert one.loss_nats_per_token == pytest.approx(other.loss_nats_per_token, rel=1e-6)
    assert one.kl_to_teacher_nats_per_token == pytest.approx(other.kl_to_teacher_nats_per_token, rel=1e-5)


def test_rows_become_batches_in_their_order():
    rows = np.arange(14, dtype=np.int32).reshape(7, 2)
    batches = batches_of(rows, 3, "cpu")
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.cat(batches).dtype == torch.int64 and torch.equal(torch.cat(batches), torch.from_numpy(rows).long())


def test_rows_are_spread_over_all_of_them():
    rows = np.arange(100)[:, None]
    assert spread_rows(rows, 5)[:, 0].tolist() == [0, 24, 49, 74, 99]
    assert spread_rows(rows, 100) is rows and len(set(spread_rows(rows, 60)[:, 0].tolist())) == 60


def test_decoding_speed_is_a_positive_number(teacher, token_ids):
    assert decode_tokens_per_second(teacher, token_ids(1, 8)[0], new_tokens=4) > 0


# Importance that a candidate keeps.


@pytest.fixture(scope="module")
def candidates(tiny):
    space = SearchSpace(num_layers=(7, 8, 9), hidden=(16, 24, 32), ffn=(12, 30, 48), mamba_num_heads=(2, 6, 8), floors={})
    kept = {7: KEPT_LAYERS, 8: (0, 1, 2, 3, 4, 5, 7, 8), 9: tuple(range(9))}
    return enumerate_candidates(tiny, space, kept, Workload(context_tokens=64))


@pytest.fixture(scope="module")
def retained(candidates, scores):
    return retained_importance(candidates, scores, [0.1, 0.4])


def test_the_teacher_itself_keeps_all_importance(candidates, retained):
    whole = (candidates.num_layers == 9) & (candidates.hidden == 32) & (candidates.ffn == 48) & (candidates.mamba_num_heads == 8)
    assert retained[whole] == pytest.approx([1.0], abs=1e-12)
    assert np.all(retained[~whole] < 1) and np.all(retained > 0)


@pytest.mark.parametrize("axis", ["num_layers", "hidden", "ffn", "mamba_num_heads"])
def test_retained_importance_falls_along_every_axis(axis, candidates, retained):
    columns = ["num_layers", "hidden", "ffn", "mamba_num_heads"]
    values = {tuple(int(getattr(candidates, name)[row]) for name in columns): retained[row] for row in range(len(candidates))}
    options, position = sorted(set(getattr(candidates, axis).tolist())), columns.index(axis)
    larger_of = dict(zip(options, options[1:], strict=False))
    steps = [(key, (*key[:position], larger_of[key[position]], *key[position + 1 :])) for key in values if key[position] in larger_of]
    assert len(steps) == 54 and all(values[small] < values[large] for small, large in steps)


def test_retained_importance_is_the_kept_share_of_the_scores(candidates, retained, scores):
    row = np.flatnonzero((candidates.num_layers == 8) & (candidates.hidden == 16) & (candidates.ffn == 48) & (candidates.mamba_num_heads == 8))[0]
    hidden = sorted(scores.hidden(), reverse=True)
    assert retained[row] == pytest.approx(sum(hidden[:16]) / sum(hidden) / 1.1, rel=1e-12)


def test_key_value_heads_count_as_much_within_a_window(tiny, candidates, scores):
    narrow = replace(candidates, num_key_value_heads=np.ones(len(candidates), dtype=np.int64))
    windowed = replace(narrow, teacher=replace(tiny, pattern=tiny.pattern.replace("*", "W"), window=8))
    kept, all_heads = retained_importance(narrow, scores, [0.1, 0.4]), retained_importance(candidates, scores, [0.1, 0.4])
    assert np.array_equal(retained_importance(windowed, scores, [0.1, 0.4]), kept) and np.all(kept < all_heads)


def test_a_teacher_without_ffn_layers_is_measured_too(tiny, build_model, batches):
    architecture = replace(tiny, pattern="MM*")
    scores = aggregate(measure_width(WholeModel(FAMILY, build_model(pattern="MM*"), architecture), list(batches)))
    space = SearchSpace(num_layers=(3,), hidden=(16, 32), ffn=(48,), mamba_num_heads=(8,), floors={})
    kept = retained_importance(enumerate_candidates(architecture, space, {3: (0, 1, 2)}, Workload(context_tokens=64)), scores, [])
    assert kept[1] == pytest.approx(1.0) and 0 < kept[0] < 1
