"""Every family scored, sorted, rotated and compensated: against the model itself, the plain slice, and the same done layer by layer from disk."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from memory_budget.hf_config import read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.placement import StreamedModel, WholeModel
from minitron.families.state import load_tensors, model_tensors
from minitron.importance.activations import measure_width
from minitron.importance.scores import aggregate
from minitron.pruning.basis import Basis
from minitron.pruning.compensate import CompensatedCut, Recipe, build_compensated
from minitron.pruning.cut import build_pruned
from minitron.pruning.directions import stream_basis
from minitron.pruning.plan import make_plan, recipe_of
from minitron.pruning.rotated import rotate_model
from minitron.pruning.views import SortedTeacher
from minitron.settings.run import PruneSettings
from nas.couplings import QUERY_HEADS, completed, following


def whole(one) -> WholeModel:
    return WholeModel(one.family, one.model, one.architecture)


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).abs().max() / right.abs().max()).item()


def random_basis(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0].float()


@pytest.fixture(scope="module")
def streamed(one, teacher_folder) -> StreamedModel:
    return StreamedModel(one.family, teacher_folder, read_config(teacher_folder), one.architecture, torch.device("cpu"))


def test_a_streamed_teacher_scores_bit_for_bit_as_a_whole_one(streamed, measured, calibration):
    found = measure_width(streamed, calibration)
    assert found.sums.keys() == measured.sums.keys() and all(np.array_equal(found.sums[site], measured.sums[site]) for site in measured.sums)
    assert np.array_equal(found.block_influence, measured.block_influence) and len(found.block_influence) == streamed.architecture.num_layers


# Views.


def students_of(one, hard_plan) -> dict[str, tuple]:
    """Students and their layers: of some axes alone, with what follows from one by an equation, and of all together."""
    teacher, smaller, couplings, every_layer = one.architecture, hard_plan.student, one.family.couplings, tuple(range(one.architecture.num_layers))
    queries = teacher.num_key_value_heads * (teacher.num_attention_heads // max(teacher.num_key_value_heads, 1) - 1)
    widths = {"hidden": smaller.hidden, "num_attention_heads": queries, "mamba_num_heads": smaller.mamba_num_heads,
              "moe_num_experts": smaller.moe_num_experts}  # fmt: skip
    students = {name: (completed(replace(teacher, **{name: size}), teacher, following(couplings, {name})), every_layer) for name, size in widths.items()}
    students["layers"] = replace(teacher, pattern=smaller.pattern), hard_plan.kept_layers
    students["everything"] = replace(smaller, mamba_head_dim=teacher.mamba_head_dim), hard_plan.kept_layers
    students["nothing"] = teacher, every_layer
    different = {student: name for name, (student, _) in students.items()}  # of an axis that the model has not, or that follows, no second one
    return {name: students[name] for student, name in different.items() if all(coupling.holds(student, teacher) for coupling in (*couplings, QUERY_HEADS))}


@torch.no_grad()
def test_a_view_of_the_sorted_teacher_gives_the_logits_of_the_materialised_candidate(one, measured, hard_plan, logits_of):
    scores, students = aggregate(measured), students_of(one, hard_plan)
    candidates = SortedTeacher(one.family, deepcopy(one.model), one.config, one.architecture, scores, sort_key_values=True)
    assert difference(logits_of(candidates.model), logits_of(one.model)) <= 1e-5
    before = model_tensors(one.family, one.model)
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in candidates.state.items()) > 15
    plans = {name: make_plan(one.architecture, *student, scores) for name, student in students.items()}
    logits = {name: logits_of(build_pruned(one.family, one.model, plan, one.config)) for name, plan in plans.items()}
    for name, student in students.items():
        model = candidates.view(*student).model
        own = logits_of(model)
        apart = {other: difference(own, wanted) for other, wanted in logits.items()}
        assert apart.pop(name) <= 1e-5 and min(apart.values()) > 1e-3, f"{name}; the control: every cut is another model"
        assert model.num_parameters() == count_total_parameters(student[0])


# Rotations.


def test_a_random_rotation_changes_no_logit_or_is_refused_with_the_reason(one, calibration, keep_all, logits_of):
    turned, skewed, before = deepcopy(one.model), deepcopy(one.model), one.family.parts(one.model).embed.weight
    basis_DD = random_basis(one.architecture.hidden)
    if one.architecture.post_norms:
        said, plan = "a gemma3_text cannot be rotated: the norm behind every mixer weighs the channels", keep_all(one.architecture)
        with pytest.raises(ValueError, match=said):
            rotate_model(one.family, turned, one.architecture, calibration, config=one.config, basis_DD=basis_DD)
        with pytest.raises(ValueError, match=said):
            build_compensated(whole(one), plan, calibration, Recipe(), config=one.config, basis=Basis(basis_DD))
        return
    norm_scales = rotate_model(one.family, turned, one.architecture, calibration, config=one.config, basis_DD=basis_DD)
    assert difference(logits_of(turned), logits_of(one.model)) < 1e-4
    parts = one.family.parts(turned)
    assert not torch.allclose(parts.embed.weight, before, atol=0.1) and not torch.allclose(parts.head.weight, parts.embed.weight, atol=0.1)
    assert len(norm_scales) == one.architecture.num_sublayers + 1 and all(scale_D[-1].item() == pytest.approx(1, abs=1e-6) for scale_D in norm_scales.values())
    assert one.model.config.tie_word_embeddings == one.architecture.tied_embeddings, "the model itself is as it was"
    rotate_model(one.family, skewed, one.architecture, calibration, config=one.config, basis_DD=basis_DD @ torch.diag(torch.linspace(0.7, 1.3, len(basis_DD))))
    assert difference(logits_of(skewed), logits_of(one.model)) > 1e-2, "the control: a basis that is not orthogonal"


# Compensated.


def test_with_nothing_cut_the_compensated_cut_changes_no_logit(one, keep_all, calibration, logits_of):
    recipe = recipe_of(PruneSettings(), one.architecture)
    student = build_compensated(whole(one), keep_all(one.architecture), calibration[:1], recipe, config=one.config)
    assert difference(logits_of(student), logits_of(one.model)) < 1e-4


def made(base, one, plan, calibration) -> dict[str, torch.Tensor]:
    recipe = recipe_of(PruneSettings(), plan.student)
    basis = stream_basis(base, plan, calibration, directions=recipe.directions, samples=recipe.direction_samples, config=one.config)
    return {name: torch.cat(list(pieces)) for name, pieces in CompensatedCut(base, plan, calibration, basis, recipe, config=one.config).tensors()}


@pytest.fixture(scope="module")
def compensated(one, hard_plan, calibration) -> dict[str, torch.Tensor]:
    """The tensors of the compensated student, made in memory."""
    return made(whole(one), one, hard_plan, calibration)


def test_a_compensated_cut_is_closer_to_the_base_than_the_slice(one, hard_plan, sliced, compensated, calibration, logits_of):
    ids = torch.cat(calibration).clamp(min=0)
    with torch.device("meta"):
        student = one.family.build(one.family.hf_config(one.config, hard_plan.student))
    load_tensors(one.family, student, compensated)
    wanted = logits_of(one.model, ids)
    mended, cut = ((logits_of(model, ids) - wanted).square().mean().item() for model in (student.eval(), sliced))
    assert mended < 0.7 * cut


def test_a_model_read_from_disk_layer_by_layer_is_cut_to_the_same_bits(one, hard_plan, sliced, streamed, compensated, calibration):
    found = made(streamed, one, hard_plan, calibration)
    assert found.keys() == compensated.keys() and all(torch.equal(tensor, compensated[name]) for name, tensor in found.items())
    assert ("lm_head.weight" in found) == (not one.architecture.tied_embeddings)
    assert sum(not torch.equal(tensor, found[name]) for name, tensor in model_tensors(one.family, sliced).items()) > 10, "the control: the slice"


def test_norms_of_the_student_multiply_by_as_much_as_the_bases(one, hard_plan, compensated):
    """Whatever is stored for it: a number for all channels, the root mean square of the base's."""
    base = model_tensors(one.family, one.model)
    for position, layer in enumerate(hard_plan.kept_sublayers):
        stored = base[f"layers.{layer}.norm.weight"], compensated[f"layers.{position}.norm.weight"]
        factors_D, factors_K = (weight + one.family.norm_offset for weight in stored)
        assert torch.allclose(factors_K, factors_D.square().mean().sqrt().expand(hard_plan.student.hidden), rtol=1e-5)
