"""Llama and Qwen3, tied and not: their blocks scored, rotated, viewed and compensated, against direct computations."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memory_budget.hf_config import read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.placement import StreamedModel, WholeModel
from minitron.checkpoints.publish import check_layer_by_layer
from minitron.families.state import model_tensors
from minitron.importance.activations import measure_width
from minitron.importance.layers import Block, SweepLimits, measure_round
from minitron.importance.removal import LayerRules, rank_iteratively
from minitron.importance.scores import aggregate
from minitron.pruning.basis import Basis
from minitron.pruning.compensate import CompensatedCut, Recipe, build_compensated
from minitron.pruning.cut import build_pruned
from minitron.pruning.directions import stream_basis
from minitron.pruning.disk_to_disk import planned_tensors
from minitron.pruning.plan import PruningPlan, make_plan
from minitron.pruning.rotated import rotate_model, with_own_head
from minitron.pruning.tied_head import SMOOTHING, TiedHead
from minitron.pruning.views import SortedTeacher
from minitron.pruning.width_refits import refit_widths
from minitron.search.distances import measure_batch

EVERYTHING, RIDGE = (0, 1, 2, 3), 0.01
LIMITS = SweepLimits(branch_tokens=100, logits_tokens=64, reuse_bytes=2**20)


@pytest.fixture(scope="module")
def rows(padded_batches) -> list[torch.Tensor]:
    return padded_batches(seed=31)


def whole(blocks) -> WholeModel:
    return WholeModel(blocks.family, blocks.model, blocks.architecture)


@pytest.fixture(scope="module")
def sums(blocks, rows):
    return measure_width(whole(blocks), rows)


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).abs().max() / right.abs().max()).item()


def random_basis(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0].float()


def cut(architecture, kept=EVERYTHING, **sizes):
    return replace(architecture, pattern="*-" * len(kept), **sizes)


# Scores.


def score_round(model, rows, kept, removable, criterion="mse") -> dict[int, float]:
    return measure_round(model, Block(rows), kept, removable, criterion, LIMITS).scores(criterion, normalised=True)


def removal_order(model, rows):
    block = Block(rows)

    def ask(kept, removable):
        return measure_round(model, block, kept, removable, "mse", LIMITS).scores("mse", normalised=True)

    return rank_iteratively(model.architecture.layer_kinds, 1, LayerRules({}, {}), ask)


def test_a_streamed_teacher_scores_bit_for_bit_as_a_whole_one(blocks, rows, sums, tmp_path, write_checkpoint):
    folder = write_checkpoint(tmp_path, blocks.model, blocks.config, max_shard_bytes=30_000)
    streamed = StreamedModel(blocks.family, folder, read_config(folder), blocks.architecture, torch.device("cpu"))
    found = measure_width(streamed, rows)
    assert found.sums.keys() == sums.sums.keys() and all(np.array_equal(found.sums[site], sums.sums[site]) for site in sums.sums)
    assert np.array_equal(found.block_influence, sums.block_influence) and len(sums.block_influence) == 4
    assert removal_order(streamed, rows) == removal_order(whole(blocks), rows)
    assert score_round(streamed, rows, [0, 1, 3], [1, 3], "kl") == score_round(whole(blocks), rows, [0, 1, 3], [1, 3], "kl")


@torch.no_grad()
def test_block_influence_is_one_minus_cosine_over_a_whole_block(blocks, rows, sums):
    for layer in EVERYTHING:
        away = of_sublayer = tokens = 0.0
        for batch in rows:
            states = blocks.model(batch.clamp(min=0), use_cache=False, output_hidden_states=True).hidden_states
            seen, handle = [], None
            if layer == 3:  # hidden_states' last has been through the final norm
                handle = blocks.model.model.norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                blocks.model(batch.clamp(min=0), use_cache=False)
                handle.remove()
            before, after, mask = states[layer].double(), (seen[0] if seen else states[layer + 1]).double(), batch != -1
            away += (1 - F.cosine_similarity(before, after, dim=-1))[mask].sum().item()
            between = blocks.family.parts(blocks.model).layers[2 * layer](states[layer]).double()
            of_sublayer += (1 - F.cosine_similarity(before, between, dim=-1))[mask].sum().item()
            tokens += mask.sum().item()
        assert sums.num_tokens == tokens and sums.block_influence[layer] == pytest.approx(away, rel=1e-4)
        assert sums.block_influence[layer] != pytest.approx(of_sublayer, rel=1e-2), "the control: attention alone turns it otherwise"


@pytest.mark.parametrize("criterion", ["mse", "kl", "loss"])
@torch.no_grad()
def test_leaving_out_a_block_is_the_model_without_it(criterion, blocks, rows):
    scores, kept = score_round(whole(blocks), rows, [0, 1, 3], [0, 1, 3], criterion), (0, 1, 3)
    for gone in kept:
        left = tuple(layer for layer in kept if layer != gone)
        without = build_pruned(blocks.family, blocks.model, PruningPlan(blocks.architecture, cut(blocks.architecture, left), left, {}), blocks.config)
        numerator = squares = tokens = 0.0
        for batch in rows:
            ids, mask = batch.clamp(min=0), batch != -1
            full, other = (model(ids, use_cache=False).logits.double() for model in (blocks.model, without))
            if criterion == "mse":
                numerator, squares = numerator + (full - other)[mask].square().sum().item(), squares + full[mask].square().sum().item()
            elif criterion == "kl":
                p, q = (F.log_softmax(logits[mask], -1) for logits in (full, other))
                numerator, tokens = numerator + (p.exp() * (p - q)).sum().item(), tokens + mask.sum().item()
            else:
                own = F.cross_entropy(other[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]], reduction="sum").item()
                numerator, tokens = numerator + own, tokens + mask[:, 1:].sum().item()
        assert scores[gone] == pytest.approx(numerator / (squares or tokens), rel=1e-4)
    assert len({round(score, 3) for score in scores.values()}) == 3, "the control: they are not all the same"


# Views.

CUTS = {
    "nothing": ({}, EVERYTHING),
    "layers": ({}, (0, 2, 3)),
    "hidden": ({"hidden": 36}, EVERYTHING),
    "ffn": ({"ffn": 30}, EVERYTHING),
    "query heads": ({"num_attention_heads": 3}, EVERYTHING),
    "KV heads": ({"num_key_value_heads": 1, "num_attention_heads": 2}, EVERYTHING),
    "one KV head less": ({"num_key_value_heads": -1}, EVERYTHING),
    "everything": ({"hidden": 24, "ffn": 20, "num_key_value_heads": 1, "num_attention_heads": 1}, (1, 2)),
}


def sizes_of(name: str, architecture) -> dict:
    """A cut's sizes; query heads in equal numbers of every KV head, and at the teacher's ratio where one KV head goes."""
    sizes = dict(CUTS[name][0])
    keys, per_group = architecture.num_key_value_heads, architecture.num_attention_heads // architecture.num_key_value_heads
    if name == "query heads":
        sizes["num_attention_heads"] = keys * (per_group - 1)
    if name == "one KV head less":
        sizes = {"num_key_value_heads": keys - 1, "num_attention_heads": (keys - 1) * per_group}
    return sizes


@pytest.fixture(scope="module")
def students(blocks):
    return {name: (cut(blocks.architecture, kept, **sizes_of(name, blocks.architecture)), kept) for name, (_, kept) in CUTS.items()}


@pytest.fixture(scope="module")
def sorted_teacher(blocks, sums) -> SortedTeacher:
    return SortedTeacher(blocks.family, deepcopy(blocks.model), blocks.config, blocks.architecture, aggregate(sums), sort_key_values=True)


@pytest.fixture(scope="module")
def materialised(blocks, sums, students):
    return {name: build_pruned(blocks.family, blocks.model, make_plan(blocks.architecture, *students[name], aggregate(sums)), blocks.config) for name in CUTS}


def test_sorting_moves_the_units_and_no_logit(sorted_teacher, blocks, logits_of):
    assert difference(logits_of(sorted_teacher.model), logits_of(blocks.model)) <= 1e-5
    assert sum(not torch.equal(tensor, blocks.model.state_dict()[name]) for name, tensor in sorted_teacher.model.state_dict().items()) > 20


@pytest.mark.parametrize("name", CUTS)
def test_a_view_gives_the_logits_of_the_materialised_candidate(name, sorted_teacher, students, materialised, logits_of):
    student, kept = students[name]
    view = sorted_teacher.view(student, kept)
    assert difference(logits_of(view.model), logits_of(materialised[name])) <= 1e-5
    assert sum(tensor.numel() for tensor in model_tensors(sorted_teacher.family, view.model).values()) == count_total_parameters(student)
    others = [other for other in CUTS if other != name]
    assert all(difference(logits_of(view.model), logits_of(materialised[other])) > 1e-3 for other in others), "the control: every cut is another model"


def test_views_of_a_teacher_whose_kv_heads_stay_where_they_are_give_the_same(blocks, sums, students, materialised, logits_of):
    plain = SortedTeacher(blocks.family, deepcopy(blocks.model), blocks.config, blocks.architecture, aggregate(sums))
    for name in ("query heads", "ffn", "layers"):
        assert difference(logits_of(plain.view(*students[name]).model), logits_of(materialised[name])) <= 1e-5


# Writers refitted to their widths.


@pytest.mark.parametrize("name", ["query heads", "KV heads", "one KV head less", "ffn"])
@torch.no_grad()
def test_a_refitted_writer_is_the_least_squares_fit(name, blocks, sums, rows, students):
    half, writer = (1, "mixer.down_proj") if name == "ffn" else (0, "mixer.o_proj")
    layer, (student, _) = 2, students[name]
    base = SortedTeacher(blocks.family, deepcopy(blocks.model), blocks.config, blocks.architecture, aggregate(sums), sort_key_values=True)
    plain = base.view(student, EVERYTHING).model
    refit_widths(base, [student, replace(student, hidden=24), blocks.architecture], rows, RIDGE)
    found = base.view(student, EVERYTHING).model
    residuals, masks = [base.model.model.embed_tokens(batch.clamp(min=0)) for batch in rows], [batch != -1 for batch in rows]
    sublayers = blocks.family.parts(base.model).layers
    for sublayer in sublayers[: 2 * layer + half]:
        residuals = [sublayer(residual_BTD) for residual_BTD in residuals]

    def inner(model) -> np.ndarray:
        seen, block = [], blocks.family.parts(model).layers[2 * layer + half]
        handle = block.get_submodule(writer).register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
        for residual_BTD in residuals:
            block(residual_BTD)
        handle.remove()
        return torch.cat([inner_BTI[mask] for inner_BTI, mask in zip(seen, masks, strict=True)]).double().numpy()

    def matrix(model) -> np.ndarray:
        return blocks.family.parts(model).layers[2 * layer + half].get_submodule(writer).weight.double().numpy()

    given, of_all = inner(plain), inner(base.model)
    pull = np.sqrt(RIDGE * np.square(given if "KV" in name else of_all).sum(0).mean())
    stacked = np.concatenate([given, pull * np.eye(given.shape[1])]), np.concatenate([of_all @ matrix(base.model).T, pull * matrix(plain).T])
    expected = np.linalg.lstsq(*stacked, rcond=None)[0].T
    assert np.abs(matrix(found) - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(matrix(plain) - expected).max() > 1e-2 * np.abs(expected).max(), "the control: without a fit it is another matrix"


# Rotations.


@pytest.fixture(scope="module")
def rotated(blocks, rows):
    model = deepcopy(blocks.model)
    return model, rotate_model(blocks.family, model, blocks.architecture, rows, config=blocks.config)


def test_a_rotated_model_has_the_logits_of_the_model_and_a_head_of_its_own(rotated, blocks, logits_of):
    model, norm_scales = rotated
    assert difference(logits_of(model), logits_of(blocks.model)) < 1e-4
    assert not torch.allclose(model.model.embed_tokens.weight, blocks.model.model.embed_tokens.weight, atol=0.1)
    assert not torch.allclose(model.lm_head.weight, model.model.embed_tokens.weight, atol=0.1) and not model.config.tie_word_embeddings
    assert blocks.model.config.tie_word_embeddings == blocks.architecture.tied_embeddings, "the model itself is as it was"
    assert len(norm_scales) == 9 and all(scale_D[-1].item() == pytest.approx(1, abs=1e-6) for scale_D in norm_scales.values())


def test_a_basis_that_is_not_orthogonal_changes_them(blocks, rows, logits_of):
    model = deepcopy(blocks.model)
    rotate_model(blocks.family, model, blocks.architecture, rows, config=blocks.config, basis_DD=torch.diag(torch.linspace(0.7, 1.3, 48)))
    assert difference(logits_of(model), logits_of(blocks.model)) > 1e-2


@torch.no_grad()
def test_a_stream_that_lives_in_fewer_directions_is_viewed_in_them_without_loss(blocks, rows, sums, logits_of):
    inside_DK, narrow = random_basis(48, seed=5)[:, :36], deepcopy(blocks.model)
    for name, parameter in narrow.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
            parameter.copy_(inside_DK @ (inside_DK.T @ parameter))
        elif "embed_tokens" in name:
            parameter.copy_(parameter @ inside_DK @ inside_DK.T)
    wanted, scores = logits_of(narrow), aggregate(sums)
    norm_scales = rotate_model(blocks.family, narrow, blocks.architecture, rows, config=blocks.config)
    candidates = SortedTeacher(blocks.family, narrow, blocks.config, with_own_head(blocks.architecture), scores, norm_scales=norm_scales)
    lossless, lossy = (candidates.view(cut(blocks.architecture, hidden=hidden), EVERYTHING).model for hidden in (36, 30))
    assert difference(logits_of(lossless), wanted) < 1e-4 < 1e-2 < difference(logits_of(lossy), wanted)
    measured = measure_batch(candidates.model, {"lossless": lossless, "lossy": lossy}, rows[0])
    assert measured["lossless"].means()["kl"] == pytest.approx(0, abs=1e-5) and measured["lossy"].means()["kl"] > 1e-3


# Compensated.


def compensated(blocks, plan, rows, recipe=Recipe(), **more):  # noqa: B008
    return build_compensated(whole(blocks), plan, rows, recipe, config=blocks.config, **more)


def test_with_nothing_cut_the_compensated_cut_changes_no_logit(blocks, keep_all, rows, logits_of):
    assert difference(logits_of(compensated(blocks, keep_all(blocks.architecture), rows)), logits_of(blocks.model)) < 1e-4


def test_only_a_head_of_its_own_can_be_rotated_without_loss(blocks, keep_all, rows, logits_of):
    student = compensated(blocks, keep_all(blocks.architecture), rows, basis=Basis(random_basis(48)))
    assert (difference(logits_of(student), logits_of(blocks.model)) < 1e-4) == (not blocks.architecture.tied_embeddings)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == blocks.architecture.tied_embeddings


@pytest.fixture(scope="module")
def hard_plan(blocks, sums) -> PruningPlan:
    keys = blocks.architecture.num_key_value_heads - 1
    student = cut(blocks.architecture, (0, 1, 3), hidden=36, ffn=42, num_key_value_heads=keys, num_attention_heads=keys * (6 // (keys + 1)))
    return make_plan(blocks.architecture, student, (0, 1, 3), aggregate(sums))


def test_each_part_lowers_the_error_of_a_hard_cut(blocks, hard_plan, rows, logits_of):
    recipes = [Recipe(refit_reading=False, refit_writing=False), Recipe(refit_writing=False), Recipe()]
    models = [build_pruned(blocks.family, blocks.model, hard_plan, blocks.config), *(compensated(blocks, hard_plan, rows, recipe) for recipe in recipes)]
    ids = torch.cat(rows).clamp(min=0)
    sliced, rotated, read, both = ((logits_of(model, ids) - logits_of(blocks.model, ids)).square().mean().item() for model in models)
    assert both < min(read, rotated) and max(read, rotated) < sliced


def test_readers_are_as_large_as_the_bases(blocks, hard_plan, rows):
    def sizes(student):
        return [student.model.layers[1].mlp.up_proj.weight.square().mean().sqrt().item(), student.model.layers[1].post_attention_layernorm.weight[0].item()]

    base = blocks.model.model.layers[1]
    balanced, fitted = (sizes(compensated(blocks, hard_plan, rows, Recipe(balanced=balanced))) for balanced in (True, False))
    assert balanced[1] == pytest.approx(base.post_attention_layernorm.weight.square().mean().sqrt().item(), rel=1e-6) != fitted[1]
    assert balanced[0] * balanced[1] == pytest.approx(fitted[0] * fitted[1], rel=1e-3), "the same function"


def test_a_model_read_from_disk_layer_by_layer_is_cut_to_the_same_bits(blocks, hard_plan, rows, tmp_path, write_checkpoint):
    folder = write_checkpoint(tmp_path, blocks.model, blocks.config)
    streamed = StreamedModel(blocks.family, folder, read_config(folder), blocks.architecture, torch.device("cpu"))

    def made(base) -> dict[str, torch.Tensor]:
        basis = stream_basis(base, hard_plan, rows, directions="loss", config=blocks.config)
        return {name: torch.cat(list(pieces)) for name, pieces in CompensatedCut(base, hard_plan, rows, basis, Recipe(), config=blocks.config).tensors()}

    one, other = made(streamed), made(whole(blocks))
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert ("lm_head.weight" in one) == (not blocks.architecture.tied_embeddings)


def test_the_weight_of_a_tied_heads_norm_is_the_least_squares_fit():
    random = torch.Generator().manual_seed(2)
    table_VD, weight_D, wanted_ND = (torch.randn(*shape, generator=random) for shape in ((11, 6), (6,), (40, 6)))
    own_NK, counts_V, basis_DK = wanted_ND[:, :4] + 0.1 * torch.randn(40, 4, generator=random), torch.arange(11.0), random_basis(6)[:, :4]
    fit = TiedHead(weight_D, Basis(basis_DK))
    fit.add(wanted_ND[:25], own_NK[:25])
    fit.add(wanted_ND[25:], own_NK[25:])
    fit.add_rows(table_VD[:7], counts_V[:7])
    fit.add_rows(table_VD[7:], counts_V[7:])
    share_V = ((counts_V + SMOOTHING) / (counts_V + SMOOTHING).sum()).double()
    root_VV = torch.diag(share_V.sqrt()) @ (torch.eye(11) - share_V[None])  # its square is diag(p) − p pᵀ
    seen_VK = root_VV @ (table_VD @ basis_DK).double()
    design = torch.cat([seen_VK * own_K.double() for own_K in own_NK])
    target = torch.cat([root_VV @ (table_VD @ (weight_D * wanted_D)).double() for wanted_D in wanted_ND])
    expected_K = torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
    found_K = fit.solve(1e-12)
    assert torch.allclose(found_K.double(), expected_K, rtol=1e-4, atol=1e-5)
    start_K = (basis_DK.square() * weight_D[:, None]).sum(0)
    assert not torch.allclose(found_K, start_K, atol=1e-2) and torch.allclose(_solved_anew(weight_D, basis_DK, 1e9), start_K, atol=1e-4)


def _solved_anew(weight_D: torch.Tensor, basis_DK: torch.Tensor, ridge: float) -> torch.Tensor:
    fit, random = TiedHead(weight_D, Basis(basis_DK)), torch.Generator().manual_seed(3)
    fit.add(torch.randn(9, 6, generator=random), torch.randn(9, 4, generator=random))
    fit.add_rows(torch.randn(5, 6, generator=random), torch.ones(5))
    return fit.solve(ridge)


# A student too large for memory.


def test_a_student_is_checked_layer_by_layer(blocks, hard_plan, tmp_path, write_checkpoint):
    source = Checkpoint(write_checkpoint(tmp_path / "teacher", blocks.model, blocks.config))
    built, config = build_pruned(blocks.family, blocks.model, hard_plan, blocks.config), blocks.family.hf_config(blocks.config, hard_plan.student)
    folder, planned = write_checkpoint(tmp_path / "student", built, config), planned_tensors(blocks.family, hard_plan, source)
    check_layer_by_layer(folder, blocks.family, planned, config)
    with torch.no_grad():
        built.model.layers[1].mlp.gate_proj.weight[0, 0] += 1
    with pytest.raises(RuntimeError, match=r"tensor mixer.gate_proj.weight of layer 3, read back, is not what was planned"):
        check_layer_by_layer(write_checkpoint(tmp_path / "other", built, config), blocks.family, planned, config)
