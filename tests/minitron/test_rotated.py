"""A model rotated to full width, candidates as prefixes of it, and the stages that rank by them."""

import json
import shutil
from copy import deepcopy
from dataclasses import fields, replace

import pytest
import torch

from memory_budget.hf_config import architecture_from_config
from minitron.checkpoints.placement import WholeModel
from minitron.families.nemotron_h import FAMILY
from minitron.importance.activations import measure_width
from minitron.importance.scores import aggregate
from minitron.pruning.basis import Basis
from minitron.pruning.compensate import Recipe, build_compensated
from minitron.pruning.cut import build_pruned
from minitron.pruning.directions import principal_basis, stream_covariance
from minitron.pruning.plan import make_plan
from minitron.pruning.rotated import rotate_model
from minitron.pruning.views import SortedTeacher
from minitron.settings.run import PruneMethod, PruneSettings, Settings, TeacherSettings, TinyTeacherSettings
from minitron.settings.search import AxisSettings, FixedSettings, SearchSettings
from minitron.walk.table import stages

EPSILON, EVERYTHING, SOME = 1e-5, tuple(range(9)), (0, 1, 2, 3, 5, 7, 8)
CUTS = {
    "hidden": ({"hidden": 24}, EVERYTHING),
    "hidden by one": ({"hidden": 31}, EVERYTHING),
    "ffn": ({"ffn": 20}, EVERYTHING),
    "everything but channels": ({"hidden": 16, "ffn": 20, "mamba_num_heads": 4, "num_attention_heads": 4}, SOME),
}


@pytest.fixture(scope="module")
def rows(padded_batches) -> list[torch.Tensor]:
    return padded_batches(seed=11)


@pytest.fixture(scope="module")
@torch.no_grad()
def narrow(build_model):
    """A model whose residuals lie in 20 of the 32 dimensions, in no channel's direction."""
    model, inside_DK = build_model(), torch.linalg.qr(torch.randn(32, 20, generator=torch.Generator().manual_seed(5)))[0]
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "down_proj.weight", "o_proj.weight")):
            parameter.copy_(inside_DK @ (inside_DK.T @ parameter))
        elif "embeddings" in name:
            parameter.copy_(parameter @ inside_DK @ inside_DK.T)
    return model


@pytest.fixture(scope="module")
def scores(teacher, tiny, rows):
    return aggregate(measure_width(WholeModel(FAMILY, teacher, tiny), rows))


@pytest.fixture(scope="module")
def rotate(rows, config_of):
    """A copy of a model, rotated, and its norms' numbers."""

    def rotated(model, architecture, **basis):
        turned = deepcopy(model)
        return turned, rotate_model(FAMILY, turned, architecture, rows, config=config_of(architecture), **basis)

    return rotated


@pytest.fixture(scope="module")
def rotated(rotate, teacher, tiny):
    return rotate(teacher, tiny)


@pytest.fixture(scope="module")
def views(rotated, tiny, scores, config_of):
    model, norm_scales = rotated
    candidates = SortedTeacher(FAMILY, deepcopy(model), config_of(tiny), tiny, scores, norm_scales=norm_scales)
    return {name: candidates.view(student_of(tiny, name), kept) for name, (_, kept) in CUTS.items()}


def student_of(tiny, name: str):
    sizes, kept = CUTS[name]
    return replace(tiny, pattern="".join(tiny.pattern[layer] for layer in kept), **sizes)


def difference(first, second) -> float:
    return ((first - second).abs().max() / second.abs().max()).item()


# Nothing cut.


def test_a_rotated_model_has_the_logits_of_the_model_and_other_weights(rotated, teacher, logits_of):
    model, _ = rotated
    assert difference(logits_of(model), logits_of(teacher)) < 1e-4
    assert not torch.allclose(model.model.embeddings.weight, teacher.model.embeddings.weight, atol=0.1)


def test_a_basis_that_is_not_orthogonal_changes_them(rotate, teacher, tiny, logits_of):
    model, _ = rotate(teacher, tiny, basis_DD=torch.diag(torch.linspace(0.7, 1.3, 32)))
    assert difference(logits_of(model), logits_of(teacher)) > 1e-2


@torch.no_grad()
def test_biases_are_rotated_too(rotate, config_of, tiny, logits_of):
    config = config_of(tiny) | {"use_bias": True, "mamba_proj_bias": True, "mlp_bias": True}
    model = FAMILY.build(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    turned = deepcopy(model)
    rotate_model(FAMILY, turned, architecture_from_config(config), [torch.arange(90).reshape(3, 30)], config=config)
    assert difference(logits_of(turned), logits_of(model)) < 1e-4


# The numbers of the norms.


@pytest.mark.parametrize("hidden", [1, 20, 32])
@torch.no_grad()
def test_the_numbers_are_the_least_squares_fit_of_float64(hidden, rotated, teacher, tiny, rows):
    basis_DK = principal_basis(stream_covariance(WholeModel(FAMILY, teacher, tiny), rows, EPSILON))[:, :hidden].double()
    residuals, masks = [teacher.model.embeddings(batch.clamp(min=0)) for batch in rows], [batch != -1 for batch in rows]
    for name, block in [*((f"layers.{layer}.norm.weight", block) for layer, block in enumerate(teacher.model.layers)), ("norm_f.weight", None)]:
        x_ND = torch.cat([residual_BTD[mask] for residual_BTD, mask in zip(residuals, masks, strict=True)]).double()
        wanted = x_ND / (x_ND.square().mean(-1, keepdim=True) + EPSILON).sqrt() @ basis_DK
        y_NK = x_ND @ basis_DK
        own = y_NK / (y_NK.square().mean(-1, keepdim=True) + EPSILON).sqrt()
        fit = torch.linalg.lstsq(own.reshape(-1, 1), wanted.reshape(-1, 1)).solution.item()
        assert rotated[1][name][hidden - 1].item() == pytest.approx(fit, rel=1e-5)
        assert hidden == 32 or abs(rotated[1][name][hidden].item() - fit) > 1e-4, "the control: the next size has another number"
        residuals = [block(residual_BTD) for residual_BTD in residuals] if block else residuals


def test_at_full_width_every_number_is_one(rotated):
    assert all(scale_D[-1].item() == pytest.approx(1, abs=1e-7) for scale_D in rotated[1].values())


def test_they_are_what_the_compensated_cut_fits_where_its_stream_is_the_bases(rotate, narrow, teacher, tiny, scores, rows, config_of):
    """Where the cut loses directions that matter, it fits to what the student made of the stream; only before the first layer that is the same."""
    for model, hidden in ((narrow, 20), (teacher, 20)):
        plan = make_plan(tiny, replace(tiny, hidden=hidden), EVERYTHING, scores)
        student = build_compensated(WholeModel(FAMILY, model, tiny), plan, rows, Recipe("variance", False, False, balanced=False), config=config_of(tiny))
        fitted = {FAMILY.canonical_name(name): tensor for name, tensor in student.named_parameters()}
        _, norm_scales = rotate(model, tiny)
        same = {name: scale_D[hidden - 1].item() == pytest.approx(fitted[name][0].item(), rel=1e-4) for name, scale_D in norm_scales.items()}
        assert same["layers.0.norm.weight"] and all(same.values()) == (model is narrow)


# Candidates.


@pytest.mark.parametrize("name", CUTS)
@torch.no_grad()
def test_a_view_is_the_compensated_cut_without_refits(name, views, teacher, tiny, scores, rows, config_of, logits_of):
    """But for the norms' numbers, which come from the base's own residuals: they are taken over."""
    plan, config = make_plan(tiny, student_of(tiny, name), CUTS[name][1], scores), config_of(tiny)
    base = WholeModel(FAMILY, teacher, tiny)
    basis = Basis(principal_basis(stream_covariance(base, rows, EPSILON))[:, : plan.student.hidden].contiguous())
    cut = build_compensated(base, plan, rows, Recipe(refit_reading=False, refit_writing=False, balanced=False), config=config, basis=basis)
    own, other = logits_of(views[name].model), logits_of(cut)
    assert name == "ffn" or difference(own, other) > 1e-4, "the control: the numbers differ where hidden is cut"
    norms = {name: norm for name, norm in views[name].model.named_parameters() if name.endswith(("norm.weight", "norm_f.weight")) and "mixer" not in name}
    for parameter_name, norm in norms.items():
        cut.get_parameter(parameter_name).copy_(norm)
    assert difference(own, logits_of(cut)) < 1e-4


def test_a_stream_that_lives_in_fewer_directions_is_cut_to_them_without_loss(rotate, narrow, tiny, scores, config_of, logits_of):
    config, wanted = config_of(tiny), logits_of(narrow)
    turned, norm_scales = rotate(narrow, tiny)
    candidates = SortedTeacher(FAMILY, turned, config, tiny, scores, norm_scales=norm_scales)
    assert difference(logits_of(candidates.view(replace(tiny, hidden=20), EVERYTHING).model), wanted) < 1e-4
    assert difference(logits_of(candidates.view(replace(tiny, hidden=19), EVERYTHING).model), wanted) > 1e-2
    plain = build_pruned(FAMILY, narrow, make_plan(tiny, replace(tiny, hidden=20), EVERYTHING, scores), config)
    assert difference(logits_of(plain), wanted) > 0.1


def test_nothing_but_the_norms_is_copied(views, tiny):
    norms = tiny.num_layers + 1
    assert views["hidden"].copied_bytes == norms * 24 * 4 and views["ffn"].copied_bytes == 0
    assert views["hidden"].mamba_copied_bytes == 0


# The stages.


def search_of(**values) -> SearchSettings:
    return SearchSettings(hidden=AxisSettings(low=0.5), **values)


def test_the_shortlist_knows_of_the_cut_only_where_it_ranks_by_it(tiny):
    sizes = TinyTeacherSettings(**{field.name: getattr(tiny, field.name) for field in fields(TinyTeacherSettings)})

    def key(search: SearchSettings | None = None, **values) -> dict:
        teacher = TeacherSettings(tiny=sizes, train_anew=True)
        return stages()["shortlist"].what(Settings(teacher=teacher, search=search or search_of(), prune=PruneSettings(**values)))

    compensated = {"method": PruneMethod.compensated}
    plain = key()
    assert key(**compensated) != plain != key(**compensated, samples=7) != key(**compensated)
    assert plain == key(samples=7) == key(**compensated, rotate=False) == key(rotate=False)
    assert key(**compensated) == key(**compensated, ridge=0.1, refit_reading=False, refit_writing=False, batch=3)
    for search in (SearchSettings(), search_of(fixed=FixedSettings(hidden=24))):  # hidden is not cut; nothing is ranked
        assert key(search, **compensated) == key(search)


def test_a_search_for_a_compensated_cut_ranks_by_the_rotated_model(walk, door, tmp_path):
    shutil.copytree(walk.runs, tmp_path / "runs", symlinks=True)
    settings = (*walk.settings, f"runs_folder={tmp_path / 'runs'}", "stage=search", "search.finalists=0", "prune.method=compensated")
    finished = door(tmp_path, *settings)
    assert finished.returncode == 0 and "in the rotated basis" in finished.stdout, finished.stderr
    found = {entry["id"]: entry for entry in json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())["candidates"]}
    before = {entry["id"]: entry for entry in walk.summary["candidates"]}
    assert found.keys() == before.keys()
    assert all(found[name]["zero_shot_kl"] < entry["zero_shot_kl"] for name, entry in before.items())
    again = door(tmp_path, *settings, "prune.rotate=false", "prune.refit_writing=false")
    assert again.returncode == 0 and "in the rotated basis" not in again.stdout and again.stdout.count("shortlist") and "(already done)" in again.stdout
