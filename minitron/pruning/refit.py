"""Least squares from sums: a matrix refitted so that from what it is given now it makes what was once made.

Letters: N tokens, I inputs, O outputs.
"""

import torch


class NormalEquations:
    """Σ a aᵀ and Σ t aᵀ over tokens, for inputs a and targets t, in float64: all that a least squares fit needs, added up in one pass."""

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device):
        self.gram_II = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.cross_OI = torch.zeros(num_outputs, num_inputs, dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, inputs_NI: torch.Tensor, targets_NO: torch.Tensor) -> None:
        inputs_NI, targets_NO = inputs_NI.double(), targets_NO.double()
        self.gram_II.addmm_(inputs_NI.T, inputs_NI)
        self.cross_OI.addmm_(targets_NO.T, inputs_NI)
        self.num_tokens += len(inputs_NI)

    def solve(self, start_OI: torch.Tensor, ridge: float, *, place: str) -> torch.Tensor:
        """The matrix M [O, I], float32, of the least Σ|M a − t|² + λ|M − start|², with λ = ridge_for(…) · mean over inputs of Σ a².

        Uses the sums up: it can be asked once. Raises ValueError naming the place where the sums are not finite or, with a ridge of 0, singular.
        """
        if not (torch.isfinite(self.gram_II).all() and torch.isfinite(self.cross_OI).all()):
            raise ValueError(f"prune: the activations of {place} are not finite")
        start_OI, num_inputs = start_OI.double(), len(self.gram_II)
        left_OI = self.cross_OI - start_OI @ self.gram_II
        diagonal_I = self.gram_II.diagonal()
        diagonal_I += ridge_for(ridge, num_inputs, self.num_tokens) * diagonal_I.mean()  # in place: at 15,680 inputs a copy takes 1.8 GiB
        factor_II, failed = torch.linalg.cholesky_ex(self.gram_II)
        if failed:
            raise ValueError(f"prune.ridge is {ridge}, with which the Gram matrix of {place} ({num_inputs} inputs) is singular; it must be larger")
        return (start_OI + torch.cholesky_solve(left_OI.T, factor_II).T).float()


def ridge_for(ridge: float, num_inputs: int, num_tokens: int) -> float:
    """The ridge of a fit: as set, and raised by as much as tokens are fewer than the inputs solved for."""
    return ridge * max(1.0, num_inputs / num_tokens)
