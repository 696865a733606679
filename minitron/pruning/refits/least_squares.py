"""Least squares from sums: a matrix refitted so that from what it is given now it makes what was once made.

Letters: N tokens, I inputs, W the first of them, O outputs.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from minitron.pruning.plan import LEAST_IN_FLOAT32, MIXTURES, RIDGE, ridge_for

LEAST_STRIP = 128
ADDED_AT_ONCE = 4096  # tokens whose products are added up before float64 has them
RIDGE_OF_ONE = 0.03
RIDGES = (3.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.01, 3e-3, 1e-3, 1e-4)  # of which one is chosen
ROUNDS = 3  # of a fit behind a norm
LEAST_FACTOR = 0.1  # of the factors' root mean square: by no less is a row divided


class NormalEquations:
    """Σ a aᵀ and Σ t aᵀ over tokens, for inputs a and targets t, in float64: all that a least squares fit needs, added up in one pass.

    Of the first, which is symmetric, the upper part is added up, and mirrored before it is used. `enough` tokens an input are those with which the ridge is
    as set (ridge_for). `products` is what some tokens' products are computed in before they are added up.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device, *, enough: float = 1.0, products: torch.dtype = torch.float64):
        self.gram_II = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.cross_OI = torch.zeros(num_outputs, num_inputs, dtype=torch.float64, device=device)
        self.num_tokens, self.enough, self.products = 0, enough, products

    def add(self, inputs_NI: torch.Tensor, targets_NO: torch.Tensor) -> None:
        self.num_tokens += len(inputs_NI)
        for inputs_nI, targets_nO in zip(inputs_NI.split(ADDED_AT_ONCE), targets_NO.split(ADDED_AT_ONCE), strict=True):
            inputs_nI, targets_nO = inputs_nI.to(self.products), targets_nO.to(self.products)
            for first, end in _strips(len(self.gram_II)):
                _add_product(self.gram_II[first:end, first:], inputs_nI[:, first:end], inputs_nI[:, first:])
            _add_product(self.cross_OI, targets_nO, inputs_nI)

    def copied(self) -> "NormalEquations":
        """With a Gram matrix of its own, of one that is mirrored."""
        return self._with(self.gram_II.clone(), self.cross_OI)

    def of_outputs(self, mixing_PO: torch.Tensor) -> "NormalEquations":
        """The sums, with mixtures of the outputs in their place, over the same Gram matrix."""
        return self._with(self.gram_II, mixing_PO @ self.cross_OI)

    def _with(self, gram_II: torch.Tensor, cross_OI: torch.Tensor) -> "NormalEquations":
        some = NormalEquations(0, 0, gram_II.device, enough=self.enough, products=self.products)
        some.gram_II, some.cross_OI, some.num_tokens = gram_II, cross_OI, self.num_tokens
        return some

    def error(self, matrix_OI: torch.Tensor) -> float:
        """Σ|M a − t|² of a matrix M [O, I], less Σ|t|², by a Gram matrix that is mirrored."""
        matrix_OI = matrix_OI.double()
        return float((matrix_OI * (matrix_OI @ self.gram_II - 2 * self.cross_OI)).sum())

    def of_inputs(self, indices: torch.Tensor) -> "NormalEquations":
        """The sums of some of the inputs alone."""
        self.mirror()
        return self._with(self.gram_II[indices][:, indices], self.cross_OI[:, indices])

    def solve(self, start_OI: torch.Tensor, ridge: float, *, place: str) -> torch.Tensor:
        """The matrix M [O, I], float32, of the least Σ|M a − t|² + λ|M − start|², with λ = ridge_for(…) · mean over inputs of Σ a².

        Uses the sums up: it can be asked once. Raises ValueError naming the place where the sums are not finite or, with a ridge of 0, singular.
        """
        num_inputs = len(self.gram_II)
        return self.solve_first([num_inputs], start_OI, ridge, place=place)[num_inputs]

    def solve_first(self, widths: Iterable[int], start_OI: torch.Tensor, ridge: float, *, place: str) -> dict[int, torch.Tensor]:
        """By width n, the matrix [O, n] of the fit that knows the first n inputs alone; as solve, λ being that of all inputs.

        The factor of a Gram matrix's first rows and columns is its factor's, so all widths share one.
        """
        if not torch.isfinite(self.gram_II.trace() + self.cross_OI.sum()):  # of squares, where one is not, the trace; without a copy of the matrix
            raise ValueError(f"prune: the activations of {place} are not finite")
        self.mirror()
        start_OI, num_inputs, diagonal_I = start_OI.double(), len(self.gram_II), self.gram_II.diagonal()
        added = ridge_for(ridge, num_inputs, self.num_tokens, enough=self.enough) * diagonal_I.mean()
        diagonal_I += added  # in place: at 15,680 inputs a copy takes 1.8 GiB
        starts = {width: start_OI[:, :width] for width in widths}
        left = {width: self.cross_OI[:, :width] + added * start_OW - start_OW @ self.gram_II[:width, :width] for width, start_OW in starts.items()}
        factor_II, failed = factored(self.gram_II)
        if failed:
            raise ValueError(f"prune.ridge is {ridge}, with which the Gram matrix of {place} ({num_inputs} inputs) is singular; it must be larger")
        return {width: (start_OW + _solved(factor_II[:width, :width], left.pop(width))).float() for width, start_OW in starts.items()}

    def mirror(self) -> None:
        for first, end in _strips(len(self.gram_II)):
            self.gram_II[end:, first:end] = self.gram_II[first:end, end:].T


class Refit:
    """Normal equations of a fit whose ridge is set or, where it is None, chosen: the one of RIDGES with which a fit to either half of the tokens errs least on
    the other half.

    The other half's error is that of MIXTURES random sums of the outputs, drawn once: alike for all ridges, so that they can be compared.

    Calibration text is little and its tokens are alike, so that a ridge that serves the tokens it was fitted to may be a hundred times too small for others.
    From the largest ridge downwards the first minimum is taken. All tokens have half the ridge of half of them, since it is a share of the inputs' mean square,
    and what it should be does not grow with tokens. Where there is but one half it is RIDGE_OF_ONE.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device, ridge: float | None):
        self.ridge, products = ridge, products_for(ridge)
        self.halves = [NormalEquations(num_inputs, num_outputs, device, enough=0.0 if ridge is None else 1.0, products=products)
                       for _ in range(1 + (ridge is None))]  # fmt: skip

    def add(self, inputs_NI: torch.Tensor, targets_NO: torch.Tensor, second_N: torch.Tensor) -> None:
        """Of some tokens inputs, what is to be made of them, and whether they are of the second half: all of a row or none."""
        if len(self.halves) == 1:
            self.halves[0].add(inputs_NI, targets_NO)
            return
        for half, own_N in zip(self.halves, (~second_N, second_N), strict=True):
            if own_N.any():
                half.add(inputs_NI[own_N], targets_NO[own_N])

    def factor(self, matrix_OI: torch.Tensor) -> float:
        """The number s of the least Σ|s·a − Mᵀt|², of a matrix M whose columns are orthonormal."""
        alike, square = (sum(float(found) for found in each) for each in zip(*(((matrix_OI * half.cross_OI).sum(), half.gram_II.trace())
                                                                               for half in self.halves), strict=True))  # fmt: skip
        return alike / square

    def solve(self, start_OI: torch.Tensor, *, place: str) -> torch.Tensor:
        """The matrix [O, I], float32, drawn to `start`; see NormalEquations.solve. Uses the sums up."""
        ridge, whole = self.ridge, self.halves[0]
        if ridge is None:
            ridge = self._chosen(start_OI, place) / 2 if all(half.num_tokens for half in self.halves) else RIDGE_OF_ONE
            whole.gram_II += self.halves[1].gram_II
            whole.cross_OI += self.halves[1].cross_OI
            whole.num_tokens += self.halves.pop().num_tokens
        return whole.solve(start_OI, ridge, place=place)

    def _chosen(self, start_OI: torch.Tensor, place: str) -> float:
        outputs, device = start_OI.shape[0], start_OI.device
        for half in self.halves:
            half.mirror()
        one, other, start_OI = *self.halves, start_OI.double()
        if outputs > MIXTURES:
            mixing_PO = torch.randn(MIXTURES, outputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
            one, other, start_OI = one.of_outputs(mixing_PO), other.of_outputs(mixing_PO), mixing_PO @ start_OI
        best, least = RIDGES[0], float("inf")
        for ridge in RIDGES:
            error = sum(judge.error(fitted.copied().solve(start_OI, ridge, place=place)) for fitted, judge in ((one, other), (other, one)))
            if not error < least:
                break
            best, least = ridge, error
        return best


def factored(gram_II: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The lower Cholesky factor of a mirrored Gram matrix in the matrix's own place, and whether there is none."""
    failed = torch.empty((), dtype=torch.int32, device=gram_II.device)
    turned_II = gram_II.mT  # columns first, as LAPACK has it: the same numbers, and no copy
    torch.linalg.cholesky_ex(turned_II, out=(turned_II, failed))
    return turned_II, bool(failed)


def _solved(factor_II: torch.Tensor, left_OI: torch.Tensor) -> torch.Tensor:
    """As torch.cholesky_solve of the transposed, to the bit, which copies the factor."""
    half_IO = torch.linalg.solve_triangular(factor_II, left_OI.T, upper=False)
    return torch.linalg.solve_triangular(factor_II.mT, half_IO, upper=True).T


def products_for(ridge: float | None) -> torch.dtype:
    return torch.float32 if ridge is None or ridge >= LEAST_IN_FLOAT32 else torch.float64


def _add_product(total_AB: torch.Tensor, one_NA: torch.Tensor, other_NB: torch.Tensor) -> None:
    if one_NA.dtype == total_AB.dtype:
        total_AB.addmm_(one_NA.T, other_NB)
    else:
        total_AB += one_NA.T @ other_NB


def _strips(size: int) -> list[tuple[int, int]]:
    """First and end of strips of rows: 8 of a large matrix, which leave 7/16 of the products out; none so narrow that a product of it were slow."""
    width = max(LEAST_STRIP, -(-size // 8))
    return [(first, min(first + width, size)) for first in range(0, size, width)]


def fit_behind_norm(writer: nn.Linear, factor_O: torch.Tensor, tokens: Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]],
                    epsilon: float, ridge: float | None, *, place: str) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """A matrix M [O, I] and what the RMSNorm behind it multiplies by, g [O], so that g·n(M a + b) comes close to targets t; both float32.

    `tokens` gives inputs a [N, I], targets t [N, O] and what Refit.add asks for, anew each time that it is asked. With r, a token's root mean square before
    the norm, held fast, g·M is the least squares fit from a/r to t, and M that divided by g; then r is measured again, and so on for some rounds. Given M, the
    best g follows channel by channel. Of all rounds, the start among them, the one with the least error is taken. Raises ValueError as NormalEquations.solve
    does.
    """
    weight_OI, best, pull = writer.weight.float(), None, RIDGE if ridge is None else ridge
    bias_O = writer.bias if writer.bias is not None else torch.zeros_like(factor_O)
    for last in (False,) * (ROUNDS - 1) + (True,):
        refit, alike_O, square_O, error = Refit(weight_OI.shape[1], len(weight_OI), weight_OI.device, ridge), 0.0, 0.0, 0.0
        for inputs_NI, targets_NO, second_N in tokens():
            made_NO = inputs_NI @ weight_OI.T + bias_O
            root_N1 = (made_NO.square().mean(-1, keepdim=True) + epsilon).sqrt()
            normed_NO = made_NO / root_N1
            alike_O, square_O = alike_O + (targets_NO * normed_NO).double().sum(0), square_O + normed_NO.double().square().sum(0)
            error += float(targets_NO.square().sum(dtype=torch.float64))
            if not last:
                refit.add(inputs_NI / root_N1, targets_NO - factor_O * bias_O / root_N1, second_N)
        fitted_O = ((alike_O + pull * square_O * factor_O) / ((1 + pull) * square_O).clamp_min(torch.finfo(torch.float64).tiny)).float()
        error += float((fitted_O * (fitted_O * square_O - 2 * alike_O)).sum())
        if best is None or error < best[0]:
            best = error, weight_OI, fitted_O
        if not last:
            least = LEAST_FACTOR * fitted_O.square().mean().sqrt()
            factor_O = torch.where(fitted_O.abs() < least, least.copysign(fitted_O), fitted_O)
            weight_OI = refit.solve(fitted_O[:, None] * weight_OI, place=place) / factor_O[:, None]
    return best[1], best[2]
