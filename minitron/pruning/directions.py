"""Which directions of the residual stream a student keeps.

`variance`: the eigenvectors of Σ n nᵀ, n being the normalised residual at every norm input, by descending eigenvalue; what the stream holds least
of is left out (SliceGPT, arXiv 2401.15024, §3.3). One order serves every hidden size.

`loss`: what the loss can best do without (stream_moments.py measures it). At a norm input s let C_s = E[n nᵀ], and F_s = E[g gᵀ] with g the gradient
of the loss at n: the Fisher information, which stands for the loss's curvature. Leave out r orthonormal directions U [D, r], and let the rest predict
n as well as least squares can, as readers that are refitted do. What is left unexplained of n then has the covariance U (Uᵀ C_s⁻¹ U)⁻¹ Uᵀ (the
part outside U is known exactly, and a Schur complement is the inverse of a block of the inverse), so that to second order the loss rises by

    ½ Σ_s tr[(Uᵀ C_s⁻¹ U)⁻¹ Uᵀ F_s U].

With one site that is an eigenproblem: U spans the first r of L·v, where C = L Lᵀ and v are the eigenvectors of Lᵀ F L by ascending eigenvalue. With
more it is minimised from there, with C and F of all sites together, by L-BFGS over U = qr(A). A head that is the table of embeddings is not
refitted: what it is given in the directions U is lost to it, and there the rise is ½ tr[Uᵀ C U Uᵀ F U].

Letters: S norm inputs ("sites") or runs of them, D hidden of the base, K hidden of the student, r = D − K.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from minitron.checkpoints.placement import PlacedModel
from minitron.families.base import HIDDEN
from minitron.pruning.basis import Basis, basis_without
from minitron.pruning.plan import Indices, PruningPlan
from minitron.pruning.refits.tied_head import aligned
from minitron.pruning.rotation import check_rms, check_turns, factors, norm_inputs, normalised
from minitron.pruning.stream_moments import Moments, stream_moments
from minitron.text.samples import batches_of, spread_rows

RIDGE = 1e-3  # of the mean variance, so that few tokens have an inverse
ITERATIONS = 30


def stream_basis(base: PlacedModel, plan: PruningPlan, batches: Sequence[torch.Tensor], *, directions: str | None, config: dict,
                 samples: int = 8, scratch: Path | None = None, on_layer: Callable[[], None] = lambda: None) -> Basis:  # fmt: skip
    """Q_K of a plan, by `directions` "loss" or "variance"; with None, and where hidden is not cut and there is nothing to choose, the kept channels.

    `batches` are calibration rows [B, T], padding included; `loss` takes `samples` of them, spread over all. `scratch` is a folder for the base's residuals
    (see stream_moments); `on_layer` hears of layers walked: once of each for `variance`, twice for `loss`.
    """
    hidden, kept = plan.teacher.hidden, plan.student.hidden
    if directions is None or kept == hidden:
        return Basis(channel_basis(plan.kept(HIDDEN, -1), hidden, base.device))
    check_turns(plan.teacher)
    epsilon = check_rms(base.family, config)
    if directions == "variance":
        left_out_Dr = principal_basis(stream_covariance(base, batches, epsilon, on_layer))[:, kept:]
    else:
        some = batches_of(spread_rows(torch.cat(list(batches)).cpu().numpy(), samples), len(batches[0]), base.device)
        left_out_Dr = least_needed(stream_moments(base, some, epsilon, scratch=scratch, on_layer=on_layer), hidden - kept,
                                   tied=plan.student.tied_embeddings)  # fmt: skip
    if not plan.student.tied_embeddings:
        return basis_without(left_out_Dr)
    ((_, weight_D),) = base.stored_rows(f"{base.family.outside_names['norm']}weight")
    return aligned(basis_without(left_out_Dr), factors(base.family, weight_D))


def stream_covariance(base: PlacedModel, batches: Sequence[torch.Tensor], epsilon: float, on_layer: Callable[[], None] = lambda: None) -> torch.Tensor:
    """Σ n nᵀ over tokens and norm inputs (every layer's and the last), n the normalised residual; float64 [D, D]. Raises ValueError as norm_inputs does."""
    total_DD = torch.zeros(base.architecture.hidden, base.architecture.hidden, dtype=torch.float64, device=base.device)
    for _, residual_ND in norm_inputs(base, batches, on_layer):
        tokens_ND = normalised(residual_ND, epsilon).double()
        total_DD.addmm_(tokens_ND.T, tokens_ND)
    return total_DD


def principal_basis(covariance_DD: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns [D, D], float32, by descending share of the covariance: the first K hold the most that K can."""
    return torch.linalg.eigh(covariance_DD)[1].flip(1).float().contiguous()


def channel_basis(kept: Indices | None, hidden: int, device: torch.device) -> torch.Tensor:
    """The columns [D, K] of the identity that a plan keeps: no rotation, hidden channels as they are."""
    everything = torch.eye(hidden, device=device)
    return everything if kept is None else everything[:, list(kept)].contiguous()


@torch.no_grad()
def least_needed(moments: Moments, number: int, *, tied: bool = False) -> torch.Tensor:
    """The orthonormal directions [D, number], float64, that the loss can best do without; see the file's top. Uses the covariances up. `tied` says that
    the last site is read by a head that cannot be refitted.
    """
    covariances_SDD, fishers_SDD = moments.covariances_SDD, moments.fishers_SDD
    diagonals_SD = covariances_SDD.diagonal(dim1=1, dim2=2)
    diagonals_SD += RIDGE * diagonals_SD.mean(1, keepdim=True)
    factor_DD = torch.linalg.cholesky(covariances_SDD.mean(0))
    needs_DD = factor_DD.T @ fishers_SDD.sum(0) @ factor_DD
    start_Dr = torch.linalg.qr(factor_DD @ torch.linalg.eigh(needs_DD)[1][:, :number])[0]
    at_head_DD = covariances_SDD[-1].clone() if tied else None
    precisions_SDD = covariances_SDD
    for precision_DD in precisions_SDD:
        precision_DD.copy_(torch.cholesky_inverse(torch.linalg.cholesky(precision_DD)))

    def rise(left_out_Dr: torch.Tensor) -> torch.Tensor:
        if at_head_DD is None:
            return expected_rise(left_out_Dr, precisions_SDD, fishers_SDD)
        lost_rr, needed_rr = (left_out_Dr.T @ (matrix_DD @ left_out_Dr) for matrix_DD in (at_head_DD, fishers_SDD[-1]))
        return expected_rise(left_out_Dr, precisions_SDD[:-1], fishers_SDD[:-1]) + (lost_rr * needed_rr.T).sum() / 2

    return _minimised(start_Dr, rise)


def expected_rise(left_out_Dr: torch.Tensor, precisions_SDD: torch.Tensor, fishers_SDD: torch.Tensor) -> torch.Tensor:
    """½ Σ_s tr[(Uᵀ C_s⁻¹ U)⁻¹ Uᵀ F_s U], nats per token, a scalar; C_s⁻¹ and F_s [S, D, D]."""
    unexplained_Srr, needed_Srr = (left_out_Dr.T @ (matrix_SDD @ left_out_Dr) for matrix_SDD in (precisions_SDD, fishers_SDD))
    return torch.linalg.solve(unexplained_Srr, needed_Srr).diagonal(dim1=1, dim2=2).sum() / 2


def _minimised(start_Dr: torch.Tensor, cost: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The orthonormal columns near `start` at which a function of their span is least."""
    free_Dr = start_Dr.clone(memory_format=torch.contiguous_format).requires_grad_()
    optimizer = torch.optim.LBFGS([free_Dr], max_iter=ITERATIONS, line_search_fn="strong_wolfe")
    scale = cost(start_Dr).item()  # so that L-BFGS's tolerances mean the same for every model

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        value = cost(torch.linalg.qr(free_Dr)[0]) / scale
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(evaluate)
    return torch.linalg.qr(free_Dr.detach())[0]
