"""The compensated cut: rotations that change nothing, redundancy that is cut without loss, fits against a slow reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from memory_budget.hf_config import architecture_from_config
from minitron.checkpoints.placement import WholeModel
from minitron.families.base import FFN, HIDDEN, MAMBA_HEAD
from minitron.families.nemotron_h import FAMILY
from minitron.pruning.basis import Basis, basis_without
from minitron.pruning.compensate import CompensatedCut, Recipe, build_compensated
from minitron.pruning.cut import build_pruned
from minitron.pruning.damage import walked_loss
from minitron.pruning.directions import principal_basis, stream_basis, stream_covariance
from minitron.pruning.plan import PruningPlan
from minitron.pruning.refits.least_squares import NormalEquations, ridge_for
from minitron.pruning.rotation import EMBED, NORM, READ, WRITE, stream_role

EVERY_PART = Recipe()
RECIPES = [Recipe(refit_reading=reading, refit_writing=writing) for reading in (False, True) for writing in (False, True)]
TIGHT = replace(EVERY_PART, ridge=1e-9)


@pytest.fixture(scope="module")
def rows(token_ids) -> list[torch.Tensor]:
    """Calibration rows: many more tokens than any width here, as fits to a random model take."""
    return [token_ids(rows=8, tokens=80, seed=seed) for seed in range(11, 16)]


@pytest.fixture(scope="module")
def compensate(tiny, config_of, rows):
    """The compensated student of a model under a plan."""

    def build(model, plan: PruningPlan, recipe: Recipe = EVERY_PART, basis: Basis | None = None):
        return build_compensated(WholeModel(FAMILY, model, plan.teacher), plan, rows, recipe, config=config_of(plan.teacher), basis=basis)

    return build


@pytest.fixture
def difference(logits_of):
    """Largest difference of two models' logits, as a share of the largest logit."""

    def measure(one, other) -> float:
        expected = logits_of(other)
        return ((logits_of(one) - expected).abs().max() / expected.abs().max()).item()

    return measure


def random_basis(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0].float()


def cut(plan: PruningPlan, **sizes) -> PruningPlan:
    return replace(plan, student=replace(plan.student, **sizes))


# Nothing cut.


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"reading {recipe.refit_reading}, writing {recipe.refit_writing}")
def test_with_nothing_cut_a_random_rotation_changes_no_logit(recipe, teacher, keep_all, compensate, difference):
    student = compensate(teacher, keep_all(), recipe, Basis(random_basis(32)))
    assert difference(student, teacher) < 1e-4
    assert not torch.allclose(student.model.embeddings.weight, teacher.model.embeddings.weight, atol=0.1)  # it is another basis


def test_a_basis_that_is_not_orthogonal_does(teacher, keep_all, compensate, difference):
    skewed = random_basis(32) @ torch.diag(torch.linspace(0.7, 1.3, 32))
    assert difference(compensate(teacher, keep_all(), RECIPES[0], Basis(skewed)), teacher) > 1e-2


@torch.no_grad()
def test_with_nothing_cut_a_rotation_turns_biases_too(config_of, tiny, keep_all, rows, difference):
    config = config_of(tiny) | {"use_bias": True, "mamba_proj_bias": True, "mlp_bias": True}
    biased, model = architecture_from_config(config), FAMILY.build(config).eval()
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith(("out_proj.bias", "down_proj.bias"))]
    assert len(biases) == 7  # three Mamba layers and four FFN layers
    for number, bias in enumerate(biases):
        bias.copy_(torch.randn(32, generator=torch.Generator().manual_seed(number)))
    base = WholeModel(FAMILY, model, biased)
    assert difference(build_compensated(base, keep_all(biased), rows, EVERY_PART, config=config, basis=Basis(random_basis(32))), model) < 1e-4


def test_with_nothing_cut_the_principal_basis_changes_no_logit(teacher, tiny, keep_all, compensate, difference, rows):
    basis_DD = principal_basis(stream_covariance(WholeModel(FAMILY, teacher, tiny), rows, 1e-5))
    assert difference(compensate(teacher, keep_all(), EVERY_PART, Basis(basis_DD)), teacher) < 1e-4


def test_where_hidden_is_not_cut_the_channels_stay_as_they_are(teacher, tiny, keep_all, config_of, rows):
    basis = stream_basis(WholeModel(FAMILY, teacher, tiny), keep_all(), rows, directions="loss", config=config_of(tiny))
    assert torch.equal(basis.matrix_DK, torch.eye(32))


def test_every_tensor_that_meets_the_stream_has_the_role_that_its_name_says():
    roles = {row.suffix: stream_role(FAMILY, row) for row in FAMILY.table}
    assert {suffix for suffix, role in roles.items() if role == NORM} == {"norm.weight", "norm_f.weight"}
    assert {suffix for suffix, role in roles.items() if role == EMBED} == {"embeddings.weight"}
    assert {suffix.split(".")[-2] for suffix, role in roles.items() if role == WRITE} == {"out_proj", "down_proj", "o_proj", "fc2_latent_proj"}
    assert {suffix.split(".")[-2] for suffix, role in roles.items() if role == READ} == {
        "in_proj", "up_proj", "q_proj", "k_proj", "v_proj", "lm_head", "gate", "fc1_latent_proj"}  # fmt: skip
    assert roles["mixer.norm.weight"] is None  # Mamba's own norm is over inner channels


# What is redundant is cut without loss.


@torch.no_grad()
def embed_in_wider_stream(narrow, build_model, narrow_hidden: int):
    """The narrow model as one of hidden 32 whose residuals lie in a random subspace; its norms' weights are not constant."""
    wide, inside_DK = build_model(), random_basis(32, seed=5)[:, :narrow_hidden]
    weights = dict(narrow.named_parameters())
    for name, parameter in wide.named_parameters():
        value, role = weights[name], name.removesuffix(".weight").split(".")[-1]
        if role in ("norm", "norm_f") and "mixer" not in name:
            value = 1 + 0.3 * torch.rand(32, generator=torch.Generator().manual_seed(len(name)))
        elif role == "embeddings":
            value = value @ inside_DK.T
        elif role in ("in_proj", "up_proj", "q_proj", "k_proj", "v_proj", "lm_head"):
            norm = "model.norm_f" if role == "lm_head" else name.split(".mixer")[0] + ".norm"
            weight_D = 1 + 0.3 * torch.rand(32, generator=torch.Generator().manual_seed(len(f"{norm}.weight")))
            value = (value * weights[f"{norm}.weight"]) @ inside_DK.T * (narrow_hidden / 32) ** 0.5 / weight_D
        elif role in ("out_proj", "down_proj", "o_proj"):
            value = inside_DK @ value
        parameter.copy_(value)
    return wide


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"reading {recipe.refit_reading}, writing {recipe.refit_writing}")
def test_a_stream_that_lives_in_fewer_directions_is_cut_to_them_without_loss(recipe, build_model, keep_all, compensate, difference, config_of):
    wide = embed_in_wider_stream(build_model(seed=3, hidden=20), build_model, 20)
    plan = cut(keep_all(**{HIDDEN: {-1: tuple(range(20))}}), hidden=20)
    assert difference(compensate(wide, plan, recipe), wide) < 1e-3
    assert difference(build_pruned(FAMILY, wide, plan, config_of(plan.teacher)), wide) > 0.1  # the plain slice


def test_the_channels_of_a_plan_are_kept_where_rotation_is_off(build_model, keep_all, compensate, difference):
    wide = embed_in_wider_stream(build_model(seed=3, hidden=20), build_model, 20)
    plan = cut(keep_all(**{HIDDEN: {-1: tuple(range(20))}}), hidden=20)
    student = compensate(wide, plan, Recipe(directions=None))
    assert torch.equal(student.model.embeddings.weight, wide.model.embeddings.weight[:, :20])


@torch.no_grad()
def double(model, layer: int) -> None:
    """Makes the second half of an FFN layer's neurons do what the first half does, apart from a factor."""
    up, down = model.model.layers[layer].mixer.up_proj.weight, model.model.layers[layer].mixer.down_proj.weight
    half = len(up) // 2
    up[half:] = up[:half] * torch.linspace(0.5, 1.5, half)[:, None]
    down[:, half:] = down[:, half:].roll(1, 0)


def test_neurons_that_others_can_stand_in_for_are_cut_without_loss(build_model, keep_all, compensate, difference, config_of):
    model, half = build_model(), tuple(range(24))
    layers = [layer for layer, kind in enumerate(keep_all().teacher.pattern) if kind == "-"]
    for layer in layers:
        double(model, layer)
    plan = cut(keep_all(**{FFN: dict.fromkeys(layers, half)}), ffn=24)
    as_planned = replace(TIGHT, choose_neurons=False)
    assert difference(compensate(model, plan, as_planned), model) < 1e-3
    assert difference(compensate(model, plan, replace(as_planned, refit_writing=False)), model) > 0.1
    assert difference(build_pruned(FAMILY, model, plan, config_of(plan.teacher)), model) > 0.1


@pytest.fixture(scope="module")
def hard_plan(tiny, keep_all) -> PruningPlan:
    """Everything is cut: two layers, hidden, neurons and Mamba heads."""
    kept, heads = (0, 1, 3, 4, 5, 6, 8), (0, 1, 2, 4, 5, 6)
    units = {HIDDEN: {-1: tuple(range(24))}, FFN: dict.fromkeys((1, 4, 6, 8), tuple(range(36))), MAMBA_HEAD: dict.fromkeys((0, 5), heads)}
    student = replace(tiny, pattern="".join(tiny.pattern[layer] for layer in kept), hidden=24, ffn=36, mamba_num_heads=6)
    return PruningPlan(teacher=tiny, student=student, kept_layers=kept, units=units)


def error(student, model, logits_of) -> float:
    return (logits_of(student) - logits_of(model)).square().mean().item()


def test_each_part_lowers_the_error_of_a_hard_cut(teacher, hard_plan, compensate, logits_of, config_of):
    sliced = error(build_pruned(FAMILY, teacher, hard_plan, config_of(hard_plan.teacher)), teacher, logits_of)
    recipes = [Recipe(refit_reading=False, refit_writing=False), Recipe(refit_writing=False), EVERY_PART]
    rotated, read, both = (error(compensate(teacher, hard_plan, recipe), teacher, logits_of) for recipe in recipes)
    assert both < read < rotated < sliced


def test_local_training_brings_feed_forward_layers_closer_than_their_fit(teacher, hard_plan, rows, tiny, config_of):
    base = WholeModel(FAMILY, teacher, tiny)
    basis = stream_basis(base, hard_plan, rows, directions="variance", config=config_of(tiny))
    walks = [CompensatedCut(base, hard_plan, rows, basis, replace(EVERY_PART, feed_forward_steps=steps), config=config_of(tiny)) for steps in (0, 200)]
    before, after = ({name: torch.cat(list(pieces)) for name, pieces in walk.tensors()} for walk in walks)
    fitted, trained = (sum(missing_BTK.square().sum() for missing_BTK in walk.streams.missing()) for walk in walks)
    assert trained < 0.97 * fitted
    changed = {name for name in before if name.startswith(("layers.0.", "layers.1.mixer.")) and not torch.equal(before[name], after[name])}
    assert changed == {"layers.1.mixer.up_proj.weight", "layers.1.mixer.down_proj.weight"}  # what comes later is refitted to what these leave


def test_behind_three_layers_trained_in_vain_none_is(teacher, hard_plan, rows, tiny, config_of):
    base, basis = WholeModel(FAMILY, teacher, tiny), Basis(torch.eye(32)[:, :24])
    assert [replace(hard_plan, trained_in_vain=frozenset(layers)).trains(8) for layers in ((1, 4, 6), (1, 4), (1, 6), (6, 8))] == [False, True, True, True]
    plan = replace(hard_plan, trained_in_vain=frozenset((1, 4, 6)))
    walk = CompensatedCut(base, plan, rows, basis, replace(EVERY_PART, feed_forward_steps=2), config=config_of(tiny))
    list(walk.tensors())
    assert (len(walk.feed_forward_kept), walk.not_trained) == (3, 1)


def test_a_large_ridge_is_the_cut_without_refits(teacher, hard_plan, compensate, difference):
    plain = compensate(teacher, hard_plan, Recipe(refit_reading=False, refit_writing=False))
    assert difference(compensate(teacher, hard_plan, Recipe(ridge=1e9, choose_neurons=False)), plain) < 1e-4
    assert difference(compensate(teacher, hard_plan), plain) > 1e-2


def test_a_writer_answers_for_the_layers_removed_behind_it(teacher, tiny, keep_all, compensate, rows, config_of):
    """After the last kept layer before removed ones, the student's residual is nearer to the base's behind those than without its refit."""
    plan = replace(keep_all(), student=replace(tiny, pattern="M-M*-"), kept_layers=(0, 1, 2, 3, 4))  # four layers go at the end
    base, config = WholeModel(FAMILY, teacher, tiny), config_of(tiny)
    ids = rows[0]
    with torch.no_grad():
        wanted = teacher.model.embeddings(ids)
        for block in teacher.model.layers:
            wanted = block(wanted)

        def missed(recipe: Recipe) -> float:
            own = (student := build_compensated(base, plan, rows, recipe, config=config)).model.embeddings(ids)
            for block in student.model.layers:
                own = block(own)
            return (own - wanted).square().mean().item()

        assert missed(EVERY_PART) < 0.9 * missed(Recipe(refit_writing=False))


# The walk.


def test_padding_does_not_count(teacher, tiny, hard_plan, config_of, rows):
    base, config = WholeModel(FAMILY, teacher, tiny), config_of(tiny)
    padded = [torch.cat([batch, torch.full((len(batch), 7), -1)], dim=1) for batch in rows]
    plain, same = (build_compensated(base, hard_plan, batches, EVERY_PART, config=config).state_dict() for batches in (rows, padded))
    assert all(torch.allclose(tensor, same[name], rtol=1e-3, atol=1e-4) for name, tensor in plain.items())
    shown = [torch.where(batch == -1, 0, batch) for batch in padded]
    other = build_compensated(base, hard_plan, shown, EVERY_PART, config=config).state_dict()
    assert not torch.allclose(plain["lm_head.weight"], other["lm_head.weight"], rtol=1e-3, atol=1e-4)


def whole(made: CompensatedCut) -> dict[str, torch.Tensor]:
    return {name: torch.cat(list(pieces)) for name, pieces in made.tensors()}


def test_tensors_have_the_dtypes_they_are_stored_in(teacher, tiny, hard_plan, config_of, rows):
    base, config = WholeModel(FAMILY, teacher, tiny), config_of(tiny)
    names = {FAMILY.canonical_name(name) for name in teacher.state_dict()}
    dtypes = {name: torch.float32 if name.endswith(("A_log", ".D")) else torch.bfloat16 for name in names}
    basis = stream_basis(base, hard_plan, rows, directions="loss", config=config)
    made = whole(CompensatedCut(base, hard_plan, rows, basis, EVERY_PART, config=config, dtypes=dtypes))
    assert all(tensor.dtype == (torch.float32 if name.endswith(("A_log", ".D")) else torch.bfloat16) for name, tensor in made.items())
    model = build_compensated(base, hard_plan, rows, EVERY_PART, config=config, dtypes=dtypes)
    in_memory = {FAMILY.canonical_name(name): tensor for name, tensor in model.state_dict().items()}
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, made[name].float()) for name, tensor in in_memory.items())


def test_the_directions_of_a_smaller_hidden_are_among_those_of_a_larger(teacher, tiny, keep_all, config_of, rows):
    base, config = WholeModel(FAMILY, teacher, tiny), config_of(tiny)
    plans = [cut(keep_all(**{HIDDEN: {-1: tuple(range(hidden))}}), hidden=hidden) for hidden in (16, 24)]
    small, large = (stream_basis(base, plan, rows, directions="variance", config=config).matrix_DK for plan in plans)
    assert torch.allclose(large @ (large.T @ small), small, atol=1e-5)
    assert not torch.allclose(small @ (small.T @ large), large, atol=1e-1)


# Bases.


@pytest.mark.parametrize("kept", [4, 8, 16, 20, 27, 31])
def test_a_basis_is_orthonormal_and_orthogonal_to_what_is_left_out(kept):
    directions = random_basis(32, seed=kept)
    matrix = basis_without(directions[:, kept:]).matrix_DK
    assert torch.allclose(matrix.T @ matrix, torch.eye(kept), atol=1e-5) and (matrix.T @ directions[:, kept:]).abs().max() < 1e-5
    assert torch.allclose(matrix @ matrix.T, directions[:, :kept] @ directions[:, :kept].T, atol=1e-5)  # it spans the rest
    assert not torch.allclose(matrix, directions[:, :kept], atol=0.1)


def test_the_last_channels_left_out_leave_the_first_as_they_are():
    assert torch.allclose(basis_without(torch.eye(32)[:, 24:]).matrix_DK.abs(), torch.eye(32, 24), atol=1e-6)


def test_a_product_by_the_basis_factors_is_that_by_its_matrix():
    basis, rows = basis_without(random_basis(32)[:, 28:]), torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(1))
    left_Kr, right_rK = basis.factors
    assert left_Kr.shape == (28, 4) and right_rK.shape == (4, 28)
    weight = torch.linspace(0.5, 2, 32)
    assert torch.allclose(basis.project(rows), rows @ basis.matrix_DK, atol=1e-5)
    assert torch.allclose(basis.project(rows, weight), rows * weight @ basis.matrix_DK, atol=1e-5)
    assert torch.allclose(basis.project_columns(rows[0].T), basis.matrix_DK.T @ rows[0].T, atol=1e-5)
    assert not torch.allclose(basis.project(rows), rows[..., :28], atol=0.1)


def test_factors_are_kept_only_where_they_save_work():
    assert basis_without(random_basis(32)[:, 12:]).factors is None


def test_the_loss_by_a_walk_is_that_of_the_whole_model(teacher, tiny, rows):
    from minitron.measures.held_out import held_out_loss

    padded = torch.cat([rows[0], torch.full((8, 5), -1)], dim=1)
    assert walked_loss(WholeModel(FAMILY, teacher, tiny), [padded, rows[1]]) == pytest.approx(held_out_loss(teacher, [padded, rows[1]]), rel=1e-6)


# Least squares.


def equations_of(inputs: torch.Tensor, targets: torch.Tensor) -> NormalEquations:
    equations = NormalEquations(inputs.shape[1], targets.shape[1], torch.device("cpu"))
    for part in (slice(0, 13), slice(13, None)):
        equations.add(inputs[part], targets[part])
    return equations


@pytest.fixture
def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [60, 9], targets [60, 4] and a start [4, 9]."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(60, 9, generator=draw), torch.randn(60, 4, generator=draw), torch.randn(4, 9, generator=draw)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 10.0])
def test_a_fit_is_that_of_numpy_with_the_ridge_as_further_samples(samples, ridge):
    inputs, targets, start = samples
    found = equations_of(inputs, targets).solve(start, ridge, place="here")
    a, t, s = (value.double().numpy() for value in samples)
    pull = np.sqrt(ridge * np.square(a).sum(0).mean())
    expected = np.linalg.lstsq(np.vstack([a, pull * np.eye(9)]), np.vstack([t, pull * s.T]), rcond=None)[0].T
    assert np.allclose(found.numpy(), expected, atol=1e-5)


def test_the_ridge_is_raised_as_tokens_are_fewer_than_inputs():
    assert ridge_for(0.01, 64, 256) == 0.01 and ridge_for(0.01, 64, 16) == pytest.approx(0.04)


def test_a_singular_matrix_is_refused_with_its_place(samples):
    inputs, targets, start = samples
    inputs[:, 3] = 0  # a dead unit
    assert torch.isfinite(equations_of(inputs, targets).solve(start, 1e-3, place="layer 5")).all()
    with pytest.raises(ValueError, match=r"prune\.ridge is 0\.0.*layer 5 \(9 inputs\) is singular"):
        equations_of(inputs, targets).solve(start, 0.0, place="layer 5")


def test_sums_that_are_not_finite_are_refused_with_their_place(samples):
    inputs, targets, start = samples
    inputs[7, 2] = float("inf")
    with pytest.raises(ValueError, match="the activations of layer 5 are not finite"):
        equations_of(inputs, targets).solve(start, 1e-3, place="layer 5")


def test_residuals_that_are_not_finite_are_refused_with_their_layer(build_model, tiny, rows):
    model = build_model()
    model.model.layers[2].mixer.out_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the residuals before layer 3 are not finite"):
        stream_covariance(WholeModel(FAMILY, model, tiny), rows, 1e-5)


def test_a_family_without_rmsnorm_is_refused(teacher, tiny, keep_all, rows, config_of):
    other = replace(FAMILY, rms_epsilon=None)
    with pytest.raises(ValueError, match="prune.method is compensated, but the norms of nemotron_h are not RMSNorm; it must be slice"):
        build_compensated(WholeModel(other, teacher, tiny), keep_all(), rows, EVERY_PART, config=config_of(tiny))
