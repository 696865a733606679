"""Writers refitted for every width of a shortlist's candidates, and the stage that ranks by them."""

import json
import shutil
from copy import deepcopy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from minitron.checkpoints.placement import WholeModel
from minitron.families.experts import experts_of
from minitron.families.nemotron_h import FAMILY
from minitron.importance.activations import measure_width
from minitron.importance.scores import aggregate
from minitron.pruning.plan import ENOUGH_FOR_EXPERT, ridge_for
from minitron.pruning.refits.least_squares import NormalEquations
from minitron.pruning.views import SortedTeacher
from minitron.pruning.width_refits import refit_widths
from minitron.settings.run import PruneMethod, PruneSettings, Settings, TeacherSettings, TinyTeacherSettings
from minitron.settings.search import AxisSettings, FixedSettings, SearchSettings
from minitron.walk.table import stages

RIDGE, EVERYTHING = 0.01, tuple(range(9))  # of "M-M*-M-*-"
CUTS = {  # what is cut, and a layer of the kind with its writer
    "ffn": ({"ffn": 20}, 4, "mixer.down_proj"),
    "mamba heads": ({"mamba_num_heads": 6}, 5, "mixer.out_proj"),
    "mamba channels": ({"mamba_head_dim": 3}, 2, "mixer.out_proj"),
    "attention heads": ({"num_attention_heads": 4}, 7, "mixer.o_proj"),
}


@pytest.fixture(scope="module")
def rows(padded_batches) -> list[torch.Tensor]:
    return padded_batches(seed=21)


@pytest.fixture(scope="module")
def sort(tiny, config_of, rows):
    """A sorted copy of a model, its heads by the channels that stay."""

    def sorted_copy(model, architecture=tiny, head_dim=None) -> SortedTeacher:
        scores = aggregate(measure_width(WholeModel(FAMILY, model, architecture), rows))
        return SortedTeacher(FAMILY, deepcopy(model), config_of(architecture), architecture, scores, head_dim)

    return sorted_copy


@pytest.fixture(scope="module")
def refitted(sort, teacher, tiny, rows) -> dict[str, SortedTeacher]:
    """By cut, the sorted teacher refitted for it and for another width of every axis at once."""
    found = {}
    for name, (sizes, _, _) in CUTS.items():
        found[name] = sort(teacher, head_dim=sizes.get("mamba_head_dim"))
        other = replace(tiny, ffn=36, num_attention_heads=2, **{"mamba_num_heads": 4} | {key: size for key, size in sizes.items() if key == "mamba_head_dim"})
        refit_widths(found[name], [replace(tiny, hidden=24, **sizes), other, tiny], rows, RIDGE)
    return found


@torch.no_grad()
def inner_activations(model, layer: int, writer: str, residuals: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the writer of one layer is given, from the residuals before that layer."""
    inner, block = [], model.model.layers[layer]
    handle = block.get_submodule(writer).register_forward_pre_hook(lambda _module, args: inner.append(args[0]))
    for residual_BTD in residuals:
        block(residual_BTD)
    handle.remove()
    return inner


def difference(first, second) -> float:
    return ((first - second).abs().max() / second.abs().max()).item()


@pytest.mark.parametrize("name", CUTS)
@torch.no_grad()
def test_a_writer_is_the_least_squares_fit_of_the_cut_layer_to_the_whole_one(name, refitted, sort, teacher, tiny, rows):
    """By numpy in float64, the ridge as further samples, from what the candidate's own layer gives its writer."""
    sizes, layer, writer = CUTS[name]
    whole, plain = refitted[name].model, sort(teacher, head_dim=sizes.get("mamba_head_dim")).view(replace(tiny, **sizes), EVERYTHING).model
    masks, residuals = [batch != -1 for batch in rows], [whole.model.embeddings(batch.clamp(min=0)) for batch in rows]
    for block in whole.model.layers[:layer]:
        residuals = [block(residual_BTD) for residual_BTD in residuals]

    def tokens(model) -> np.ndarray:
        inner = inner_activations(model, layer, writer, residuals)
        return torch.cat([inner_BTI[mask] for inner_BTI, mask in zip(inner, masks, strict=True)]).double().numpy()

    given, wanted = tokens(plain), tokens(whole) @ whole.model.layers[layer].get_submodule(writer).weight.double().numpy().T
    # λ of neurons and attention heads is of all inputs together, for every width; Mamba's are sums of their own.
    pull = np.sqrt(RIDGE * np.square(given if "mamba" in name else tokens(whole)).sum(0).mean())
    start = plain.model.layers[layer].get_submodule(writer).weight.double().numpy()
    stacked = np.concatenate([given, pull * np.eye(given.shape[1])]), np.concatenate([wanted, pull * start.T])
    expected = torch.from_numpy(np.linalg.lstsq(*stacked, rcond=None)[0].T)
    found = refitted[name].view(replace(tiny, hidden=24, **sizes), EVERYTHING).model.model.layers[layer].get_submodule(writer).weight
    assert difference(found.double(), expected[:24]) < 1e-4
    assert difference(torch.from_numpy(start)[:24], expected[:24]) > 1e-2, "the control: without a fit it is another matrix"


def test_candidates_of_every_hidden_size_share_it(refitted, tiny):
    for hidden in (16, 24, 32):
        view = refitted["ffn"].view(replace(tiny, hidden=hidden, ffn=20), EVERYTHING)
        weight = view.model.model.layers[4].mixer.down_proj.weight
        assert torch.equal(weight, refitted["ffn"].refitted["layers.4.mixer.down_proj.weight", 20, b""][:hidden]) and weight.shape == (hidden, 20)
        assert view.copied_bytes == 0
        refitted["ffn"].view(replace(tiny, hidden=hidden, ffn=24), EVERYTHING)  # a width that was not asked for: as it was


def test_what_is_not_cut_stays(sort, refitted, teacher, tiny, rows, logits_of):
    whole = sort(teacher)
    refit_widths(whole, [tiny, replace(tiny, hidden=16)], rows, RIDGE)
    assert whole.refitted == {}
    assert difference(logits_of(refitted["ffn"].view(tiny, EVERYTHING).model), logits_of(teacher)) < 1e-5
    assert difference(logits_of(refitted["ffn"].model), logits_of(teacher)) < 1e-5


@torch.no_grad()
def test_neurons_that_repeat_others_are_cut_without_loss(sort, build_model, tiny, rows, logits_of):
    """relu(c·x)² = c²·relu(x)²: the second half of the neurons says what the first says, more quietly."""
    model = build_model(seed=7)
    for block in (model.model.layers[layer] for layer in (1, 4, 6, 8)):
        block.mixer.up_proj.weight[24:] = 0.02 * block.mixer.up_proj.weight[:24]
        block.mixer.down_proj.weight[:, 24:] *= 0.02**-2
    half, wanted = replace(tiny, ffn=24), logits_of(model)
    candidates = sort(model)
    assert difference(logits_of(candidates.view(half, EVERYTHING).model), wanted) > 0.1
    refit_widths(candidates, [half], rows, 1e-9)
    assert difference(logits_of(candidates.view(half, EVERYTHING).model), wanted) < 1e-3


def test_every_width_of_one_factor_is_the_fit_of_its_own_sums():
    random = torch.Generator().manual_seed(3)
    inputs, targets, start = (torch.randn(*shape, generator=random) for shape in ((50, 9), (50, 4), (4, 9)))
    inputs = inputs * torch.linspace(2, 0.1, 9)

    def equations(width: int) -> NormalEquations:
        sums = NormalEquations(width, 4, torch.device("cpu"))
        sums.add(inputs[:, :width], targets)
        return sums

    square = inputs.double().square().sum(0)
    found = equations(9).solve_first([3, 7, 9], start, 0.05, place="here")
    for width, matrix in found.items():
        alike = 0.05 * square.mean().item() / square[:width].mean().item()  # the same λ
        assert torch.allclose(matrix, equations(width).solve(start[:, :width], alike, place="here"), atol=1e-6)
    assert not torch.allclose(found[9][:, :7], found[7], atol=1e-2), "the control: a fit's first columns are no fit of fewer"


# Experts.


@torch.no_grad()
def test_experts_are_fitted_to_their_own_tokens_by_what_the_router_gives_them(build_tiny, rows):
    """Against numpy in float64, as above: one routed expert, its tokens weighted, and the shared one, padding left out."""
    one = build_tiny("nemotron_h experts")
    layer = one.architecture.pattern.index("E")
    scores = aggregate(measure_width(WholeModel(one.family, one.model, one.architecture), rows))
    ordered = SortedTeacher(one.family, deepcopy(one.model), one.config, one.architecture, scores)
    block, heard, mask = ordered.model.model.layers[layer], {}, torch.cat(rows).flatten() != -1
    experts_of(block).watch = lambda routed: heard.update({routed.expert: routed})
    hook = block.mixer.shared_experts.down_proj.register_forward_pre_hook(lambda _module, args: heard.update(shared=args[0].flatten(0, -2)[mask]))
    residual_BTD = ordered.model.model.embeddings(torch.cat(rows).clamp(min=0))
    for each in ordered.model.model.layers[: layer + 1]:
        residual_BTD = each(residual_BTD)
    experts_of(block).watch = hook.remove()
    busiest = max(range(8), key=lambda number: len(heard[number].tokens_n) if number in heard else 0)
    routed = heard[busiest]
    weighted = (routed.inner_nF * routed.weights_n[:, None])[mask[routed.tokens_n]]
    before = {suffix: block.get_parameter(suffix).clone() for suffix in (f"mixer.experts.{busiest}.down_proj.weight", "mixer.shared_experts.down_proj.weight")}
    refit_widths(ordered, [replace(one.architecture, moe_ffn=6, moe_shared_ffn=9, hidden=24)], rows, RIDGE)
    ridges = ridge_for(RIDGE, one.architecture.moe_ffn, len(weighted), enough=ENOUGH_FOR_EXPERT), RIDGE
    for (suffix, weight_DI), given, width, ridge in zip(before.items(), (weighted, heard["shared"]), (6, 9), ridges, strict=True):
        given, weight = given.double().numpy(), weight_DI.double().numpy()
        pull = np.sqrt(ridge * np.square(given).sum(0).mean()) * np.eye(width)
        expected = np.linalg.lstsq(np.concatenate([given[:, :width], pull]), np.concatenate([given @ weight.T, pull @ weight[:, :width].T]), rcond=None)[0].T
        found = ordered.refitted[f"layers.{layer}.{suffix}", width, b""].double().numpy()
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        assert np.abs(weight[:, :width] - expected).max() > 1e-2 * np.abs(expected).max(), "the control: without a fit it is another matrix"


def test_fewer_experts_are_ranked_as_they_are_dropped(build_tiny, rows):
    one = build_tiny("qwen3_moe")
    scores = aggregate(measure_width(WholeModel(one.family, one.model, one.architecture), rows))
    ordered = SortedTeacher(one.family, deepcopy(one.model), one.config, one.architecture, scores)
    refit_widths(ordered, [replace(one.architecture, moe_num_experts=3)], rows, RIDGE)
    assert ordered.refitted == {}


# The stages.


def key(tiny, search: SearchSettings, **values) -> dict:
    sizes = TinyTeacherSettings(**{field.name: getattr(tiny, field.name) for field in fields(TinyTeacherSettings)})
    return stages()["shortlist"].what(Settings(teacher=TeacherSettings(tiny=sizes, train_anew=True), search=search, prune=PruneSettings(**values)))


@pytest.mark.parametrize(("axis", "low"), [("ffn", 20), ("mamba_heads", 4), ("mamba_channels", 2), ("attention_heads", 2)])
def test_the_shortlist_knows_of_the_fits_only_where_it_ranks_by_them(axis, low, tiny):
    search, compensated = SearchSettings(**{axis: AxisSettings(values=[low])}), {"method": PruneMethod.compensated}
    plain, fitted = key(tiny, search), key(tiny, search, **compensated)
    assert fitted != plain == key(tiny, search, **compensated, refit_writing=False, ridge=0.1)
    assert key(tiny, search, **compensated, ridge=0.1) != fitted != key(tiny, search, **compensated, samples=7)
    assert fitted == key(tiny, search, **compensated, refit_reading=False, batch=3, refit_experts=False) == key(tiny, search, **compensated, rotate=False)
    fixed = SearchSettings(**{axis: AxisSettings(values=[low])}, fixed=FixedSettings(ffn=20))
    assert key(tiny, fixed, **compensated) == key(tiny, fixed), "nothing is ranked"


def test_a_search_for_a_compensated_cut_ranks_by_refitted_widths(walk, door, tmp_path):
    shutil.copytree(walk.runs, tmp_path / "runs", symlinks=True)
    kl = {}
    for refits in ("true", "false"):
        settings = (*walk.settings, f"runs_folder={tmp_path / 'runs'}", "stage=search", "search.finalists=0", "prune.method=compensated", "prune.ridge=0.01")
        finished = door(tmp_path, *settings, f"prune.refit_writing={refits}")
        assert finished.returncode == 0 and ("refitted to its widths" in finished.stdout) == (refits == "true"), finished.stderr
        found = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())["candidates"]
        cut = [entry for entry in found if entry["architecture"]["ffn"] < 64 or entry["architecture"]["mamba_num_heads"] < 8]
        kl[refits] = {entry["id"]: entry["zero_shot_kl"] for entry in cut}
    assert kl["true"] and all(kl["true"][name] < before for name, before in kl["false"].items())
