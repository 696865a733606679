"""Which neurons of a feed-forward layer stay: those that the layer would miss most once its last matrix is refitted to the others.

With G = Σ a aᵀ of the activations a [I] before the last matrix W [O, I], leaving out neuron j and refitting the rest, drawn to W by λ, raises the error by

    |W_j|² · (1/P_jj − λ)        with P = (G + λ·1)⁻¹

(the Optimal Brain Surgeon's saliency, Hassibi and Stork, 1992, of a column, as ZipLM has it for structures, arXiv 2302.04089; without a ridge
|W_j|²/P_jj). A neuron whose part others can take over is cheap, however active it is. Some go at a time: W and P are then brought up to date, and the
next ones chosen.
Letters: I inputs of a matrix, O outputs, g those that go.
"""

from collections.abc import Iterable

import torch

from minitron.pruning.refits.least_squares import NormalEquations, factored, products_for

SHARE = 1 / 24  # of all that go, at a time
AMONG = 4  # times as many are looked at for it, one by one
RIDGE = 0.1  # of the inputs' mean square: the cost is to hold for tokens that were not seen


def least_missed(inputs: Iterable[torch.Tensor], writer_OI: torch.Tensor, number: int, *, place: str) -> tuple[int, ...]:
    """The `number` inputs to keep, ascending, of a matrix that is given these inputs, [N, I] of every batch. In memory are a matrix [I, I] and two of the
    writer's shape, float64. Raises ValueError naming the place where activations are not finite."""
    sums = NormalEquations(writer_OI.shape[1], 0, writer_OI.device, products=products_for(RIDGE))
    for inputs_NI in inputs:
        sums.add(inputs_NI, inputs_NI[:, :0])
    sums.mirror()
    gram_II, kept_I = sums.gram_II, torch.ones(writer_OI.shape[1], dtype=torch.bool, device=writer_OI.device)
    ridge = RIDGE * gram_II.diagonal().mean()
    gram_II.diagonal().add_(ridge)
    factor_II, failed = factored(gram_II)
    if failed:
        raise ValueError(f"prune: the activations of {place} are not finite")
    inverse_II, weight_OI = torch.cholesky_inverse(factor_II, out=factor_II), writer_OI.to(torch.float64, copy=True)
    going = len(inverse_II) - number
    at_once = max(1, int(going * SHARE))
    while going:
        rise_I = torch.where(kept_I, _rise(inverse_II, weight_OI, ridge), torch.inf)
        near_c = rise_I.argsort(stable=True)[: min(AMONG * at_once, int(kept_I.sum()))]
        gone_g = near_c[_one_by_one(inverse_II[near_c][:, near_c], weight_OI[:, near_c], ridge, min(at_once, going))]
        given_gI = torch.linalg.solve(inverse_II[gone_g][:, gone_g], inverse_II[gone_g])
        weight_OI -= weight_OI[:, gone_g] @ given_gI
        inverse_II.addmm_(inverse_II[:, gone_g], given_gI, alpha=-1)
        inverse_II.diagonal()[gone_g] = 1.0  # what is gone has no inverse
        kept_I[gone_g] = False
        going -= len(gone_g)
    return tuple(kept_I.nonzero().flatten().tolist())


def _rise(inverse_II: torch.Tensor, weight_OI: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    return weight_OI.square().sum(0) * (1 / inverse_II.diagonal() - ridge)


def _one_by_one(inverse_cc: torch.Tensor, weight_Oc: torch.Tensor, ridge: torch.Tensor, number: int) -> torch.Tensor:
    """The places of `number` candidates that go one after another, each the cheapest once those before it are gone: of two that are alike one stays."""
    gone, left_c = [], torch.ones(len(inverse_cc), dtype=torch.bool, device=inverse_cc.device)
    for _ in range(number):
        rise_c = torch.where(left_c, _rise(inverse_cc, weight_Oc, ridge), torch.inf)
        place = int(rise_c.argmin())
        share_c = inverse_cc[place] / inverse_cc[place, place]
        weight_Oc = weight_Oc - torch.outer(weight_Oc[:, place], share_c)
        inverse_cc = inverse_cc - torch.outer(inverse_cc[:, place], share_c)
        inverse_cc[place, place] = 1.0
        left_c[place] = False
        gone.append(place)
    return torch.tensor(gone, device=weight_Oc.device)
