"""What layers of two sublayers ask for beside what every family is asked: scores of whole blocks, writers for fewer heads, heads tied and not."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memory_budget.hf_config import read_config
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.placement import StreamedModel, WholeModel
from minitron.checkpoints.publish import check_layer_by_layer
from minitron.importance.layers import Block, SweepLimits, measure_round
from minitron.importance.scores import aggregate
from minitron.pruning.basis import Basis
from minitron.pruning.compensate import Recipe, build_compensated
from minitron.pruning.cut import build_pruned
from minitron.pruning.disk_to_disk import planned_tensors
from minitron.pruning.plan import PruningPlan, recipe_of
from minitron.pruning.rotated import rotate_model, with_own_head
from minitron.pruning.views import SortedTeacher
from minitron.pruning.width_refits import refit_widths
from minitron.search.distances import measure_batch
from minitron.settings.run import PruneSettings
from nas.depth import spelled

EVERYTHING, RIDGE = (0, 1, 2, 3), 0.01
LIMITS = SweepLimits(branch_tokens=100, logits_tokens=64, reuse_bytes=2**20)
BIASED_AND_SANDWICHED = pytest.mark.parametrize("one", ["llama untied", "gemma3_text"], indirect=True)  # norms behind mixers, windows
SANDWICHED, TIED = (pytest.mark.parametrize("one", [name], indirect=True) for name in ("gemma3_text", "llama tied"))


def whole(one) -> WholeModel:
    return WholeModel(one.family, one.model, one.architecture)


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).abs().max() / right.abs().max()).item()


def random_basis(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0].float()


def with_layers(architecture, kept):
    return replace(architecture, pattern=spelled(architecture, kept))


# Scores.


def score_round(model, calibration, kept, removable, criterion="mse") -> dict[int, float]:
    return measure_round(model, Block(calibration), kept, removable, criterion, LIMITS).scores(criterion, normalised=True)


@SANDWICHED
def test_blocks_of_a_streamed_teacher_score_bit_for_bit_as_those_of_a_whole_one(one, calibration, teacher_folder):
    streamed = StreamedModel(one.family, teacher_folder, read_config(teacher_folder), one.architecture, torch.device("cpu"))
    found, expected = (score_round(model, calibration, [0, 1, 3], [1, 3], "kl") for model in (streamed, whole(one)))
    assert found == expected and len(set(found.values())) == 2


@BIASED_AND_SANDWICHED
@torch.no_grad()
def test_block_influence_is_one_minus_cosine_over_a_whole_block(one, calibration, measured):
    for layer in EVERYTHING:
        away = of_sublayer = tokens = 0.0
        for batch in calibration:
            states = one.model(batch.clamp(min=0), use_cache=False, output_hidden_states=True).hidden_states
            seen, handle = [], None
            if layer == 3:  # hidden_states' last has been through the final norm
                handle = one.model.model.norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                one.model(batch.clamp(min=0), use_cache=False)
                handle.remove()
            before, after, mask = states[layer].double(), (seen[0] if seen else states[layer + 1]).double(), batch != -1
            away += (1 - F.cosine_similarity(before, after, dim=-1))[mask].sum().item()
            between = one.family.parts(one.model).layers[2 * layer](states[layer]).double()
            of_sublayer += (1 - F.cosine_similarity(before, between, dim=-1))[mask].sum().item()
            tokens += mask.sum().item()
        assert measured.num_tokens == tokens and measured.block_influence[layer] == pytest.approx(away, rel=1e-4)
        assert measured.block_influence[layer] != pytest.approx(of_sublayer, rel=1e-2), "the control: attention alone turns it otherwise"


@SANDWICHED
@pytest.mark.parametrize("criterion", ["mse", "kl", "loss"])
@torch.no_grad()
def test_leaving_out_a_block_is_the_model_without_it(criterion, one, calibration):
    scores, kept = score_round(whole(one), calibration, [0, 1, 3], [0, 1, 3], criterion), (0, 1, 3)
    for gone in kept:
        left = tuple(layer for layer in kept if layer != gone)
        without = build_pruned(one.family, one.model, PruningPlan(one.architecture, with_layers(one.architecture, left), left, {}), one.config)
        numerator = squares = tokens = 0.0
        for batch in calibration:
            ids, mask = batch.clamp(min=0), batch != -1
            full, other = (model(ids, use_cache=False).logits.double() for model in (one.model, without))
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


# Writers refitted to their widths.

WIDTHS = {
    "query heads": ({"num_attention_heads": 3}, 0, "mixer.o_proj"),
    "KV heads": ({"num_key_value_heads": 1, "num_attention_heads": 2}, 0, "mixer.o_proj"),
    "one KV head less": ({"num_key_value_heads": 2, "num_attention_heads": 4}, 0, "mixer.o_proj"),
    "ffn": ({"ffn": 30}, 1, "mixer.down_proj"),
}  # sizes of three KV heads with two query heads each; a block's sublayer and its writer


@BIASED_AND_SANDWICHED
@pytest.mark.parametrize("name", WIDTHS)
@torch.no_grad()
def test_a_refitted_writer_is_the_least_squares_fit(name, one, measured, calibration):
    layer, (sizes, half, writer) = 2, WIDTHS[name]
    student = replace(one.architecture, **sizes)
    base = SortedTeacher(one.family, deepcopy(one.model), one.config, one.architecture, aggregate(measured), sort_key_values=True)
    plain = base.view(student, EVERYTHING).model
    refit_widths(base, [student, replace(student, hidden=24), one.architecture], calibration, RIDGE)
    found = base.view(student, EVERYTHING).model
    residuals, masks = [one.family.parts(base.model).embed(batch.clamp(min=0)) for batch in calibration], [batch != -1 for batch in calibration]
    sublayers = one.family.parts(base.model).layers
    for sublayer in sublayers[: 2 * layer + half]:
        residuals = [sublayer(residual_BTD) for residual_BTD in residuals]

    def inner(model) -> np.ndarray:
        seen, block = [], one.family.parts(model).layers[2 * layer + half]
        handle = block.get_submodule(writer).register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
        for residual_BTD in residuals:
            block(residual_BTD)
        handle.remove()
        return torch.cat([inner_BTI[mask] for inner_BTI, mask in zip(seen, masks, strict=True)]).double().numpy()

    def matrix(model) -> np.ndarray:
        return one.family.parts(model).layers[2 * layer + half].get_submodule(writer).weight.double().numpy()

    given, of_all = inner(plain), inner(base.model)
    pull = np.sqrt(RIDGE * np.square(given if "KV" in name else of_all).sum(0).mean())
    stacked = np.concatenate([given, pull * np.eye(given.shape[1])]), np.concatenate([of_all @ matrix(base.model).T, pull * matrix(plain).T])
    expected = np.linalg.lstsq(*stacked, rcond=None)[0].T
    assert np.abs(matrix(found) - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(matrix(plain) - expected).max() > 1e-2 * np.abs(expected).max(), "the control: without a fit it is another matrix"


# Rotations.


@TIED
@torch.no_grad()
def test_a_stream_that_lives_in_fewer_directions_is_viewed_in_them_without_loss(one, calibration, measured, logits_of):
    inside_DK, narrow = random_basis(48, seed=5)[:, :36], deepcopy(one.model)
    for name, parameter in narrow.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
            parameter.copy_(inside_DK @ (inside_DK.T @ parameter))
        elif "embed_tokens" in name:
            parameter.copy_(parameter @ inside_DK @ inside_DK.T)
    wanted, scores = logits_of(narrow), aggregate(measured)
    norm_scales = rotate_model(one.family, narrow, one.architecture, calibration, config=one.config)
    candidates = SortedTeacher(one.family, narrow, one.config, with_own_head(one.architecture), scores, norm_scales=norm_scales)
    lossless, lossy = (candidates.view(replace(one.architecture, hidden=hidden), EVERYTHING).model for hidden in (36, 30))
    assert difference(logits_of(lossless), wanted) < 1e-4 < 1e-2 < difference(logits_of(lossy), wanted)
    kept = measure_batch(candidates.model, {"lossless": lossless, "lossy": lossy}, calibration[0])
    assert kept["lossless"].means()["kl"] == pytest.approx(0, abs=1e-5) and kept["lossy"].means()["kl"] > 1e-3


# Compensated.


def compensated(one, plan, calibration, recipe, **more):
    return build_compensated(whole(one), plan, calibration, recipe, config=one.config, **more)


@pytest.mark.parametrize("one", ["llama untied", "llama tied"], indirect=True)
def test_only_a_head_of_its_own_can_be_rotated_without_loss(one, keep_all, calibration, logits_of):
    student = compensated(one, keep_all(one.architecture), calibration, Recipe(), basis=Basis(random_basis(48)))
    assert (difference(logits_of(student), logits_of(one.model)) < 1e-4) == (not one.architecture.tied_embeddings)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == one.architecture.tied_embeddings


@pytest.mark.parametrize("one", ["llama tied", "gemma3_text"], indirect=True)
def test_each_part_lowers_the_error_of_a_hard_cut(one, hard_plan, sliced, calibration, logits_of):
    recipes = [recipe_of(PruneSettings(refit_reading=reading, refit_writing=writing), one.architecture) for reading, writing in
               ((False, False), (True, False), (True, True))]  # fmt: skip
    ids = torch.cat(calibration).clamp(min=0)
    wanted = logits_of(one.model, ids)
    models = [sliced, *(compensated(one, hard_plan, calibration, recipe) for recipe in recipes)]
    cut, rotated, read, both = ((logits_of(model, ids) - wanted).square().mean().item() for model in models)
    assert both < min(read, rotated) and max(read, rotated) < cut


# A student too large for memory.


@SANDWICHED
def test_a_student_is_checked_layer_by_layer(one, hard_plan, sliced, teacher_folder, tmp_path, write_checkpoint):
    source, built, config = Checkpoint(teacher_folder), deepcopy(sliced), one.family.hf_config(one.config, hard_plan.student)
    folder, planned = write_checkpoint(tmp_path / "student", built, config), planned_tensors(one.family, hard_plan, source)
    check_layer_by_layer(folder, one.family, planned, config)
    with torch.no_grad():
        built.model.layers[1].mlp.gate_proj.weight[0, 0] += 1
    with pytest.raises(RuntimeError, match=r"tensor mixer.gate_proj.weight of layer 3, read back, is not what was planned"):
        check_layer_by_layer(write_checkpoint(tmp_path / "other", built, config), one.family, planned, config)
