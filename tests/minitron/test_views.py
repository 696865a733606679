"""Candidates as views of a sorted teacher, and the zero-shot rung that measures them."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.placement import WholeModel
from minitron.families.experts import experts_of
from minitron.families.nemotron_h import FAMILY
from minitron.importance.activations import measure_width
from minitron.importance.scores import aggregate
from minitron.measures.held_out import evaluate
from minitron.pruning.cut import build_pruned
from minitron.pruning.plan import make_plan
from minitron.pruning.views import SortedTeacher
from minitron.search.distances import best_first, measure_batch

EVERYTHING = tuple(range(9))
SOME = (0, 1, 2, 3, 5, 7, 8)
# What is cut, which layers stay, and whether Mamba's fused tensors must be copied for it.
CUTS = {
    "nothing": ({}, EVERYTHING, False),
    "layers": ({}, SOME, False),
    "hidden": ({"hidden": 24}, EVERYTHING, False),
    "ffn": ({"ffn": 20}, EVERYTHING, False),
    "hidden, ffn and layers": ({"hidden": 16, "ffn": 12}, SOME, False),
    "mamba heads": ({"mamba_num_heads": 6}, EVERYTHING, True),
    "attention heads": ({"num_attention_heads": 2}, EVERYTHING, False),
    "everything but channels": ({"hidden": 24, "ffn": 20, "mamba_num_heads": 4, "num_attention_heads": 4}, SOME, True),
}


@pytest.fixture(scope="module")
def scores(teacher, tiny, token_ids):
    return aggregate(measure_width(WholeModel(FAMILY, teacher, tiny), [token_ids(rows=5, tokens=16, seed=9)]))


@pytest.fixture(scope="module")
def sorted_teacher(teacher, tiny, scores, config_of) -> SortedTeacher:
    return SortedTeacher(FAMILY, deepcopy(teacher), config_of(tiny), tiny, scores)


@pytest.fixture(scope="module")
def student_of(tiny):
    def student(name):
        sizes, kept, _ = CUTS[name]
        return replace(tiny, pattern="".join(tiny.pattern[layer] for layer in kept), **sizes), kept

    return student


@pytest.fixture(scope="module")
def views(sorted_teacher, student_of):
    return {name: sorted_teacher.view(*student_of(name)) for name in CUTS}


@pytest.fixture(scope="module")
def materialised(teacher, tiny, scores, config_of, student_of):
    def build(name, **other):
        student, kept = student_of(name)
        return build_pruned(FAMILY, teacher, make_plan(tiny, replace(student, **other), kept, scores), config_of(tiny))

    return build


def difference(first, second) -> float:
    return ((first - second).abs().max() / second.abs().max()).item()


def test_sorting_moves_the_units_and_no_logit(sorted_teacher, teacher, logits_of):
    assert difference(logits_of(sorted_teacher.model), logits_of(teacher)) <= 1e-5
    moved = [name for name, tensor in sorted_teacher.model.state_dict().items() if not torch.equal(tensor, teacher.state_dict()[name])]
    assert len(moved) > 20


@pytest.mark.parametrize("name", CUTS)
def test_a_view_gives_the_logits_of_the_materialised_candidate(name, views, materialised, logits_of):
    assert difference(logits_of(views[name].model), logits_of(materialised(name))) <= 1e-5


def test_a_view_of_other_sizes_gives_other_logits(views, materialised, logits_of):
    assert difference(logits_of(views["ffn"].model), logits_of(materialised("ffn", ffn=24))) > 1e-2


@pytest.mark.parametrize("channels", [2, 3])
def test_where_channels_are_cut_heads_rank_by_the_channels_that_stay(channels, teacher, tiny, scores, config_of, logits_of):
    student = replace(tiny, mamba_head_dim=channels, mamba_num_heads=4)
    view = SortedTeacher(FAMILY, deepcopy(teacher), config_of(tiny), tiny, scores, channels).view(student, EVERYTHING)
    cut = build_pruned(FAMILY, teacher, make_plan(tiny, student, EVERYTHING, scores), config_of(tiny))
    assert difference(logits_of(view.model), logits_of(cut)) <= 1e-5


@pytest.mark.parametrize("name", CUTS)
def test_a_view_has_the_planned_parameters(name, views, student_of):
    assert sum(parameter.numel() for parameter in views[name].model.parameters()) == count_total_parameters(student_of(name)[0])


def test_the_digests_of_all_views_differ_and_that_of_one_repeats(views, sorted_teacher, student_of):
    digests = [view.digest for view in views.values()]
    assert len(set(digests)) == len(CUTS)
    assert sorted_teacher.view(*student_of("ffn")).digest == views["ffn"].digest


@pytest.mark.parametrize("name", CUTS)
def test_next_to_nothing_is_copied_but_mambas_fused_tensors(name, views, teacher):
    whole = sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())
    assert (views[name].mamba_copied_bytes > 0) == CUTS[name][2]
    assert views[name].copied_bytes < 0.05 * whole


def test_what_is_not_copied_is_the_sorted_teachers_own_memory(views, sorted_teacher):
    own = {tensor.untyped_storage().data_ptr() for tensor in sorted_teacher.state.values()}
    for view in (views["hidden, ffn and layers"], views["nothing"]):
        assert all(parameter.untyped_storage().data_ptr() in own for parameter in view.model.parameters())
    copied = [name for name, parameter in views["mamba heads"].model.named_parameters() if parameter.untyped_storage().data_ptr() not in own]
    assert any("in_proj" in name for name in copied) and not any("out_proj" in name for name in copied)


def test_candidates_with_equally_many_heads_share_their_copies(sorted_teacher, tiny):
    one, other = (sorted_teacher.view(replace(tiny, mamba_num_heads=6, hidden=hidden), EVERYTHING).model for hidden in (32, 16))
    first, second = (dict(model.named_parameters())["model.layers.0.mixer.in_proj.weight"] for model in (one, other))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() and first.shape != second.shape


# Experts.

OF_EXPERTS = {
    "experts": {"moe_num_experts": 4},
    "neurons": {"moe_ffn": 7},
    "shared neurons": {"moe_shared_ffn": 9},
    "everything": {"moe_num_experts": 4, "moe_ffn": 7, "hidden": 24, "ffn": 20, "moe_shared_ffn": 9},
}


@pytest.fixture(scope="module", params=["nemotron_h experts", "qwen3_moe"])
def of_experts(request, build_tiny, calibration):
    """A model, its scores, and a sorted copy."""
    one = build_tiny(request.param)
    scores = aggregate(measure_width(WholeModel(one.family, one.model, one.architecture), calibration))
    return one, scores, SortedTeacher(one.family, deepcopy(one.model), one.config, one.architecture, scores)


def test_experts_change_places_whole_and_no_logit(of_experts, logits_of):
    one, scores, ordered = of_experts
    assert difference(logits_of(ordered.model), logits_of(one.model)) <= 1e-5
    layer, groups = one.architecture.mixers.index("E"), one.architecture.moe_groups
    before, after = (experts_of(one.family.parts(model).layers[layer]) for model in (one.model, ordered.model))
    order = np.argsort(-scores.experts(layer).reshape(groups, -1), axis=1, kind="stable")
    order = (order + np.arange(groups)[:, None] * order.shape[1]).reshape(-1).tolist()
    assert order != sorted(order), "the control: something was to be moved"
    for place, expert in enumerate(order):
        assert torch.equal(*(one.down_proj.weight.flatten().sort().values for one in (after[place], before[expert]))), "its own numbers"


@pytest.mark.parametrize("name", OF_EXPERTS)
def test_a_view_of_experts_gives_the_logits_of_the_materialised_candidate(name, of_experts, logits_of):
    one, scores, ordered = of_experts
    sizes = {field: size for field, size in OF_EXPERTS[name].items() if getattr(one.architecture, field)}
    student, layers = replace(one.architecture, **sizes), tuple(range(one.architecture.num_layers))
    view, cut = ordered.view(student, layers), build_pruned(one.family, one.model, make_plan(one.architecture, student, layers, scores), one.config)
    assert difference(logits_of(view.model), logits_of(cut)) <= 1e-5
    assert not sizes or difference(logits_of(cut), logits_of(one.model)) > 1e-2
    routers = student.num_layers_of("E") * 4 * student.moe_num_experts * (student.hidden + 1)  # and what corrects them
    copied = routers if student.moe_groups > 1 and "moe_num_experts" in sizes else 0  # of experts in groups those that stay are no run
    assert view.copied_bytes == copied and view.mamba_copied_bytes == 0


# The zero-shot rung.


@pytest.fixture(scope="module")
def rows(token_ids):
    ids = token_ids(rows=3, tokens=24, seed=4).clone()
    ids[1, 15:] = -1
    return ids


def test_zero_shot_measures_every_candidate_as_evaluation_does(views, sorted_teacher, teacher, materialised, rows):
    measured = measure_batch(sorted_teacher.model, {name: view.model for name, view in views.items()}, rows, chunk_tokens=7)
    for name in ("hidden", "mamba heads", "everything but channels"):
        expected, means = evaluate(materialised(name), teacher, [rows]), measured[name].means()
        assert means["loss"] == pytest.approx(expected.loss_nats_per_token, rel=1e-5)
        assert means["kl"] == pytest.approx(expected.kl_to_teacher_nats_per_token, rel=1e-4)
        assert measured[name].tokens == expected.tokens
    assert measured["nothing"].means()["kl"] == pytest.approx(0, abs=1e-6)
    assert measured["hidden"].means()["kl"] > 0.01


def test_zero_shot_kl_is_that_of_float64(views, sorted_teacher, rows):
    model = views["hidden, ffn and layers"].model
    ids, predicted = rows.where(rows != -1, 0), (rows != -1)[:, 1:]
    with torch.no_grad():
        own, reference = (F.log_softmax(one(ids, use_cache=False).logits[:, :-1].double(), -1) for one in (model, sorted_teacher.model))
    kl = (reference.exp() * (reference - own)).sum(-1)[predicted].mean().item()
    assert measure_batch(sorted_teacher.model, {"one": model}, rows)["one"].means()["kl"] == pytest.approx(kl, rel=1e-5)


def test_zero_shot_survives_logits_that_overflow(sorted_teacher, rows):
    """The target's logit is no safe stand-in for the highest: exp(140) is more than float32 holds."""
    model = deepcopy(sorted_teacher.model)
    with torch.no_grad():
        model.lm_head.weight.mul_(400)
        logits = model(rows.where(rows != -1, 0), use_cache=False).logits[:, :-1].double()
    targets, predicted = rows[:, 1:], (rows != -1)[:, 1:]
    own = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    assert (logits.amax(-1) - own)[predicted].max() > 89, "the control: exp of it is infinite in float32"
    loss = (logits.logsumexp(-1) - own)[predicted].mean().item()
    assert measure_batch(sorted_teacher.model, {"one": model}, rows)["one"].means()["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_shot_kl_of_a_model_to_itself_is_nothing_in_any_type(teacher, rows, dtype):
    model = deepcopy(teacher).to(dtype)
    sharpened = deepcopy(model)
    sharpened.requires_grad_(False).lm_head.weight.mul_(2)
    measured = measure_batch(model, {"same": model, "sharpened": sharpened}, rows)
    assert measured["same"].means()["kl"] == pytest.approx(0, abs=1e-6)
    assert measured["sharpened"].means()["kl"] > 1e-3


def test_the_order_leaves_out_what_is_no_number():
    assert best_first({"a": 2.0, "b": float("nan"), "c": 1.0, "d": float("inf")}) == ["c", "a"]
