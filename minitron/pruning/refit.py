"""Least squares from sums: a matrix refitted so that from what it is given now it makes what was once made.

Letters: N tokens, I inputs, W the first of them, O outputs.
"""

from collections.abc import Iterable

import torch

from minitron.pruning.plan import ridge_for

LEAST_STRIP = 128


class NormalEquations:
    """Σ a aᵀ and Σ t aᵀ over tokens, for inputs a and targets t, in float64: all that a least squares fit needs, added up in one pass.

    Of the first, which is symmetric, the upper part is added up, and mirrored before it is used.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device):
        self.gram_II = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.cross_OI = torch.zeros(num_outputs, num_inputs, dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, inputs_NI: torch.Tensor, targets_NO: torch.Tensor) -> None:
        inputs_NI, targets_NO = inputs_NI.double(), targets_NO.double()
        for first, end in _strips(len(self.gram_II)):
            self.gram_II[first:end, first:].addmm_(inputs_NI[:, first:end].T, inputs_NI[:, first:])
        self.cross_OI.addmm_(targets_NO.T, inputs_NI)
        self.num_tokens += len(inputs_NI)

    def of_inputs(self, indices: torch.Tensor) -> "NormalEquations":
        """The sums of some of the inputs alone."""
        self._mirror()
        some = NormalEquations(0, len(self.cross_OI), self.gram_II.device)
        some.gram_II, some.cross_OI, some.num_tokens = self.gram_II[indices][:, indices], self.cross_OI[:, indices], self.num_tokens
        return some

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
        if not (torch.isfinite(self.gram_II).all() and torch.isfinite(self.cross_OI).all()):
            raise ValueError(f"prune: the activations of {place} are not finite")
        self._mirror()
        start_OI, num_inputs, diagonal_I = start_OI.double(), len(self.gram_II), self.gram_II.diagonal()
        added = ridge_for(ridge, num_inputs, self.num_tokens) * diagonal_I.mean()
        diagonal_I += added  # in place: at 15,680 inputs a copy takes 1.8 GiB
        factor_II, failed = torch.linalg.cholesky_ex(self.gram_II)
        if failed:
            raise ValueError(f"prune.ridge is {ridge}, with which the Gram matrix of {place} ({num_inputs} inputs) is singular; it must be larger")

        def first(width: int) -> torch.Tensor:
            start_OW = start_OI[:, :width]
            left_OW = self.cross_OI[:, :width] + added * start_OW - start_OW @ self.gram_II[:width, :width]
            return (start_OW + torch.cholesky_solve(left_OW.T, factor_II[:width, :width]).T).float()

        return {width: first(width) for width in widths}

    def _mirror(self) -> None:
        for first, end in _strips(len(self.gram_II)):
            self.gram_II[end:, first:end] = self.gram_II[first:end, end:].T


def _strips(size: int) -> list[tuple[int, int]]:
    """First and end of strips of rows: 8 of a large matrix, which leave 7/16 of the products out; none so narrow that a product of it were slow."""
    width = max(LEAST_STRIP, -(-size // 8))
    return [(first, min(first + width, size)) for first in range(0, size, width)]
