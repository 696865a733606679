"""Which directions of the stream are kept: moments against a whole model's autograd, the expected rise against its definition, what is unread."""

from dataclasses import replace

import pytest
import torch

from minitron.checkpoints.placement import WholeModel
from minitron.families.base import HIDDEN
from minitron.families.nemotron_h import FAMILY
from minitron.pruning.directions import expected_rise, least_needed, stream_basis
from minitron.pruning.rotation import normalised
from minitron.pruning.stream_moments import Moments, num_sites, stream_moments

EPSILON = 1e-5


@pytest.fixture(scope="module")
def rows(token_ids) -> list[torch.Tensor]:
    return [token_ids(rows=4, tokens=40, seed=seed) for seed in (21, 22)]


@pytest.fixture
def moments(teacher, tiny, rows) -> Moments:
    return stream_moments(WholeModel(FAMILY, teacher, tiny), rows, EPSILON)


def by_autograd(model, rows, seed: int = 0) -> Moments:
    """The same by one backward pass through the whole model for each batch."""
    norms = [layer.norm for layer in model.model.layers] + [model.model.norm_f]
    generator, sums = torch.Generator().manual_seed(seed), [[0.0] * len(norms), [0.0] * len(norms)]
    seen = {}
    handles = [norm.register_forward_hook(lambda _m, args, out, at=at: seen.update({at: (args[0].detach(), out)})) for at, norm in enumerate(norms)]
    for ids in rows:
        logits = model(ids, use_cache=False).logits.flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, drawn, reduction="sum"), [seen[at][1] for at in range(len(norms))])
        for at, norm in enumerate(norms):
            for total, vectors in zip(sums, (normalised(seen[at][0], EPSILON), gradients[at] * norm.weight.detach()), strict=True):
                total[at] = total[at] + vectors.flatten(0, 1).double().T @ vectors.flatten(0, 1).double()
    for handle in handles:
        handle.remove()
    tokens = sum(ids.numel() for ids in rows)
    return Moments(*(torch.stack(total) / tokens for total in sums))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_moments_are_those_of_a_whole_models_autograd(teacher, tiny, rows, moments):
    expected = by_autograd(teacher, rows)
    assert moments.covariances_SDD.shape == moments.fishers_SDD.shape == (tiny.num_layers + 1, 32, 32)
    assert apart(moments.covariances_SDD, expected.covariances_SDD) < 0.01  # inputs are rounded to bf16 between the walks
    assert apart(moments.fishers_SDD, expected.fishers_SDD) < 0.02
    assert apart(by_autograd(teacher, rows, seed=1).fishers_SDD, expected.fishers_SDD) > 0.1


def test_padding_counts_nothing(teacher, tiny, rows, moments):
    padded = [torch.cat([ids, torch.full((4, 7), -1)], dim=1) for ids in rows]
    found = stream_moments(WholeModel(FAMILY, teacher, tiny), padded, EPSILON)
    assert apart(found.covariances_SDD, moments.covariances_SDD) < 1e-3 and apart(found.fishers_SDD, moments.fishers_SDD) < 1e-2


def test_norms_share_sums_where_they_would_be_too_large():
    assert num_sites(128, 21) == 22 and num_sites(5120, 62) == 10 and num_sites(65536, 80) == 2


def test_the_sums_of_norms_that_share_them(monkeypatch, teacher, tiny, rows, moments):
    monkeypatch.setattr("minitron.pruning.plan.SUMS_BYTES", 3 * 2 * 8 * 32**2)
    shared = stream_moments(WholeModel(FAMILY, teacher, tiny), rows, EPSILON)
    assert len(shared.fishers_SDD) == 3
    assert apart(shared.fishers_SDD.sum(0), moments.fishers_SDD.sum(0)) < 1e-9
    assert apart(shared.covariances_SDD[-1], moments.covariances_SDD[-1]) < 1e-9


def test_a_folder_that_a_killed_run_left_is_emptied(tmp_path, teacher, tiny, rows):
    scratch = tmp_path / "residuals"
    scratch.mkdir()
    (scratch / "3.pt").write_text("half of a")
    stream_moments(WholeModel(FAMILY, teacher, tiny), rows, EPSILON, scratch=scratch)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(("broken", "says"), [(2, "the residuals before layer 3 are not finite"), (8, "the residuals before the output head are not finite")])
def test_what_is_not_finite_is_refused_with_its_layer(build_model, tiny, rows, broken, says):
    model = build_model()
    next(matrix for name, matrix in model.model.layers[broken].named_parameters() if "out_proj" in name or "down_proj" in name).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=says):
        stream_moments(WholeModel(FAMILY, model, tiny), rows, EPSILON)


# What is left out.


def random_moments(sites: int, size: int = 12) -> Moments:
    draw = torch.Generator().manual_seed(3)
    roots = [torch.randn(sites, size, size, generator=draw, dtype=torch.float64) for _ in range(2)]
    return Moments(*(root @ root.transpose(1, 2) / size for root in roots))


def rise_by_definition(left_out: torch.Tensor, moments: Moments) -> float:
    """½ Σ tr(F · what least squares from the kept directions leaves unexplained)."""
    kept = torch.linalg.qr(left_out, mode="complete")[0][:, left_out.shape[1] :]
    rise = 0.0
    for covariance, fisher in zip(moments.covariances_SDD, moments.fishers_SDD, strict=True):
        explained = covariance @ kept @ torch.linalg.inv(kept.T @ covariance @ kept) @ kept.T @ covariance
        rise += 0.5 * torch.trace(fisher @ (covariance - explained)).item()
    return rise


def orthonormal(number: int, seed: int, size: int = 12) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def test_the_expected_rise_is_that_of_its_definition():
    moments, left_out = random_moments(3), orthonormal(4, seed=0)
    found = expected_rise(left_out, torch.linalg.inv(moments.covariances_SDD), moments.fishers_SDD).item()
    assert found == pytest.approx(rise_by_definition(left_out, moments), rel=1e-6)
    assert found != pytest.approx(rise_by_definition(orthonormal(4, seed=1), moments), rel=1e-2)


@pytest.mark.parametrize("sites", [1, 3])
def test_no_random_directions_near_or_far_are_needed_less(sites):
    moments = random_moments(sites)
    best = least_needed(random_moments(sites), 4)
    least, step = rise_by_definition(best, moments), 1e-2
    assert torch.allclose(best.T @ best, torch.eye(4, dtype=torch.float64), atol=1e-9)
    for seed in range(20):
        assert rise_by_definition(orthonormal(4, seed), moments) > least
        assert rise_by_definition(torch.linalg.qr(best + step * orthonormal(4, seed))[0], moments) > least * (1 - 1e-4)


def test_what_nobody_reads_goes_first_however_much_the_stream_holds_of_it(build_model, tiny, keep_all, config_of, rows):
    model = build_model()
    model.get_input_embeddings().weight.data[:, :8] *= 30
    for norm in [layer.norm for layer in model.model.layers] + [model.model.norm_f]:
        norm.weight.data[:8] = 0
    base, config = WholeModel(FAMILY, model, tiny), config_of(tiny)
    plan = keep_all(**{HIDDEN: {-1: tuple(range(24))}})
    plan = replace(plan, student=replace(plan.student, hidden=24))
    unread = torch.eye(32)[:, :8]

    def held_of_unread(directions: str) -> float:
        return (unread.T @ stream_basis(base, plan, rows, directions=directions, config=config).matrix_DK).square().sum().item() / 8

    assert held_of_unread("loss") < 0.01 and held_of_unread("variance") > 0.9
