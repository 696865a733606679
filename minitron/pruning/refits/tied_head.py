"""The last norm of a student whose output head is its table of embeddings.

The base gives the logits E·diag(w)·n(x), w being its last norm's weight; the student has the table E·Q_K, and a weight v of its last norm that is
free: E·Q_K·diag(v)·n(y). A rotation of the stream would have to be E·diag(w)·Q_K in the head, another matrix than the table where w is no constant.
What v can do is found in closed form. With G = Eᵀ(diag(p) − p pᵀ)E, p being how often tokens come (the softmax takes no notice of what all logits have
in common, and little of logits of tokens that never come), Σ over tokens of |E·Q_K·diag(v)·n(y) − E·diag(w)·n(x)|² in that metric is least for

    [(Q_Kᵀ G Q_K) ∘ Σ n(y) n(y)ᵀ] v = diag(Q_Kᵀ G diag(w) Σ n(x) n(y)ᵀ)

with ∘ the product of entries. The basis of the kept directions matters here, which it does not elsewhere: in that of the eigenvectors of
Q_Kᵀ diag(w) Q_K, diag(v) can be all of w that does not lead out of them. Letters: N tokens, V rows of the table, D hidden of the base, K hidden of the student.
"""

import torch

from minitron.pruning.basis import Basis

SMOOTHING = 1.0  # seen once more than it was, every token


def aligned(basis: Basis, weight_D: torch.Tensor) -> Basis:
    """Another basis of the same directions: the one in which the last norm's weight has no entries beside its diagonal."""
    basis_DK = basis.matrix_DK.double()
    turn_KK = torch.linalg.eigh(basis_DK.T @ (weight_D.double()[:, None] * basis_DK))[1]
    return Basis((basis_DK @ turn_KK).float())


class TiedHead:
    """The sums of such a fit, float64."""

    def __init__(self, weight_D: torch.Tensor, basis: Basis):
        self.weight_D, self.basis_DK = weight_D.double(), basis.matrix_DK.double()
        hidden, kept = self.basis_DK.shape
        self.cross_DK, self.own_KK = (self.basis_DK.new_zeros(rows, kept) for rows in (hidden, kept))
        self.gram_DD, self.mean_D, self.tokens = self.basis_DK.new_zeros(hidden, hidden), self.basis_DK.new_zeros(hidden), 0.0

    def add(self, wanted_ND: torch.Tensor, own_NK: torch.Tensor) -> None:
        """n(x) and n(y) of some tokens."""
        wanted_ND, own_NK = wanted_ND.double(), own_NK.double()
        self.cross_DK.addmm_(wanted_ND.T, own_NK)
        self.own_KK.addmm_(own_NK.T, own_NK)

    def add_rows(self, rows_VD: torch.Tensor, counts_V: torch.Tensor) -> None:
        """Some rows of the table E, and how often their tokens came."""
        counts_V, rows_VD = counts_V.double() + SMOOTHING, rows_VD.double()
        self.gram_DD.addmm_((rows_VD * counts_V[:, None]).T, rows_VD)
        self.mean_D += counts_V @ rows_VD
        self.tokens += float(counts_V.sum())

    def solve(self, ridge: float) -> torch.Tensor:
        """v [K], float32, drawn by the ridge towards the directions' own weights, diag(Q_Kᵀ diag(w) Q_K)."""
        mean_D = self.mean_D / self.tokens
        metric_DD = self.gram_DD / self.tokens - torch.outer(mean_D, mean_D)
        turned_KD = self.basis_DK.T @ metric_DD
        system_KK = (turned_KD @ self.basis_DK) * self.own_KK
        wanted_K = ((turned_KD * self.weight_D) * self.cross_DK.T).sum(1)
        start_K = (self.basis_DK.square() * self.weight_D[:, None]).sum(0)
        added = ridge * system_KK.diagonal().mean()
        system_KK.diagonal().add_(added)
        return torch.linalg.solve(system_KK, wanted_K + added * start_K).float()
