"""Fits whose ridge is chosen, and neurons that are: on random numbers of known structure."""

import pytest
import torch

from minitron.pruning.refits import least_squares
from minitron.pruning.refits.least_squares import RIDGES, Refit, factored
from minitron.pruning.refits.local_training import train_locally
from minitron.pruning.refits.neurons import least_missed

CPU = torch.device("cpu")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(ridge: float | None, batches, start_OI: torch.Tensor) -> torch.Tensor:
    refit = Refit(start_OI.shape[1], len(start_OI), CPU, ridge)
    for number, (inputs_NI, targets_NO) in enumerate(batches):
        refit.add(inputs_NI, targets_NO, torch.full((len(inputs_NI),), number % 2 == 1))
    return refit.solve(start_OI, place="here")


@pytest.mark.parametrize("noise", [0.05, 2.0])
def test_a_chosen_ridge_serves_tokens_that_were_not_seen_nearly_as_well_as_the_best_of_all(noise):
    true_OI = random(4, 32, seed=1)
    start_OI = true_OI + 0.3 * random(4, 32, seed=2)
    batches = [(inputs_NI, inputs_NI @ true_OI.T + noise * random(20, 4, seed=9 + seed)) for seed in range(4) for inputs_NI in [random(20, 32, seed=3 + seed)]]
    new_NI = random(4000, 32, seed=20)

    def unseen(matrix_OI: torch.Tensor) -> float:
        return float((new_NI @ (matrix_OI - true_OI).T).square().mean())

    of_each = [unseen(fitted(ridge, batches, start_OI)) for ridge in RIDGES]
    assert unseen(fitted(None, batches, start_OI)) < 1.25 * min(of_each)
    assert max(of_each) > 1.6 * min(of_each)  # so that there is something to choose


@pytest.mark.parametrize("noise", [0.05, 2.0])
def test_ridges_are_compared_by_mixtures_as_by_all_outputs(noise, monkeypatch):
    true_OI, start_OI = random(300, 32, seed=1), torch.zeros(300, 32)
    given = [random(40, 32, seed=3 + seed) for seed in range(4)]
    batches = [(inputs_NI, inputs_NI @ true_OI.T + noise * random(40, 300, seed=9 + seed)) for seed, inputs_NI in enumerate(given)]
    by_mixtures = fitted(None, batches, start_OI)
    monkeypatch.setattr(least_squares, "MIXTURES", 300)
    assert torch.equal(fitted(None, batches, start_OI), by_mixtures)
    assert not torch.equal(fitted(RIDGES[0], batches, start_OI), by_mixtures)


def test_products_are_of_float64_where_the_ridge_asks_for_it(monkeypatch):
    true_OI = random(4, 16, seed=1)
    batches = [(inputs_NI, inputs_NI @ true_OI.double().T) for seed in range(2)
               for inputs_NI in [(random(500, 1, seed=2 + seed) + 1e-4 * random(500, 16, seed=5 + seed)).double()]]  # inputs that are nearly alike

    def off() -> float:
        return float((fitted(1e-12, batches, torch.zeros(4, 16)) - true_OI).abs().max())

    assert off() < 1e-2
    monkeypatch.setattr(least_squares, "LEAST_IN_FLOAT32", 0.0)
    with pytest.raises(ValueError, match="singular"):
        off()


def test_a_single_row_has_a_ridge_too():
    inputs_NI = random(50, 8, seed=1)
    found_OI = fitted(None, [(inputs_NI, inputs_NI @ random(3, 8, seed=2).T)], torch.zeros(3, 8))
    assert torch.isfinite(found_OI).all() and found_OI.abs().max() > 0.1


def test_of_neurons_that_are_alike_one_stays():
    halves_N6 = random(500, 6, seed=1)
    writer_OI = random(5, 12, seed=2)
    writer_OI[:, :3] *= 1.5  # of these, scores by size would keep both
    writer_OI[:, 6:9] *= 1.5
    activations_NI = torch.cat([halves_N6, halves_N6], dim=1)
    kept = least_missed(activations_NI.split(100), writer_OI, 6, place="layer 1")
    assert sorted(place % 6 for place in kept) == list(range(6))
    by_size = (writer_OI.norm(dim=0) * activations_NI.norm(dim=0)).topk(6).indices.tolist()
    assert sorted(place % 6 for place in by_size) != list(range(6))


def test_neurons_whose_activations_are_not_finite_are_refused_by_their_layer():
    activations_NI, writer_OI = random(50, 12, seed=1), random(5, 12, seed=2)
    assert len(least_missed([activations_NI], writer_OI, 6, place="layer 1")) == 6
    activations_NI[3, 4] = float("nan")
    with pytest.raises(ValueError, match="layer 1 are not finite"):
        least_missed([activations_NI], writer_OI, 6, place="layer 1")


def test_a_gram_matrix_is_factored_in_its_own_place():
    inputs_NI = random(300, 200, seed=1).double()
    gram_II = inputs_NI.T @ inputs_NI
    wanted_II, place = torch.linalg.cholesky(gram_II), gram_II.data_ptr()
    factor_II, failed = factored(gram_II)
    assert torch.equal(factor_II, wanted_II) and factor_II.data_ptr() == place and not failed
    assert factored(-wanted_II @ wanted_II.T)[1]


def test_training_that_serves_its_own_rows_alone_is_undone():
    linear = torch.nn.Linear(64, 4, bias=False)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(1))
    given_RTI, noise_RTO = random(16, 3, 64, seed=2), random(16, 3, 4, seed=3)  # more numbers to learn than rows to learn them from
    before_OI, wanted_RTO = linear.weight.detach().clone(), linear(given_RTI).detach() + noise_RTO

    def train(*, apart: bool) -> bool:
        return train_locally(linear.parameters(), lambda rows: linear(given_RTI[rows]) - wanted_RTO[rows], 16, steps=40, batch=4, apart=apart)

    with torch.no_grad():
        assert not train(apart=True)
        assert torch.equal(linear.weight, before_OI)
        assert train(apart=False)  # its own rows are served
    assert not torch.equal(linear.weight, before_OI)
