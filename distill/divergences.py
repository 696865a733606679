"""Divergences between the distributions p of the teacher and q of the student, row by row, with their gradients.

Each takes the student's logits float32 [R, V], gives every row's divergence in nats [R], and leaves its gradient with respect to
those logits in their place. All of it is passes in place over few rows, which stay in the processor's cache. Sums are
torch.sum's, in pairs: torch.log_softmax adds in line and is off by 8e-6 at a vocabulary of 131,072.
Equal logits give exactly zero, and so does their gradient. R rows (tokens), V vocabulary, K tokens kept of a teacher.
"""

from collections.abc import Callable
from functools import partial

import torch

# (student [R, V], teacher [R, V], scratch [R, V]) → nats [R]; all three are overwritten, the first with the gradient.
Divergence = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def divergence_named(name: str, beta: float) -> Divergence:
    """One of DIVERGENCES; `beta` is jsd's."""
    return {"forward_kl": forward_kl_rows, "reverse_kl": reverse_kl_rows, "jsd": partial(jsd_rows, beta=beta)}[name]


def forward_kl_rows(student_RV: torch.Tensor, teacher_RV: torch.Tensor, scratch_RV: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) = Σ p·(log p − log q); gradient q − p."""
    q_RV, log_ratio_RV, p_RV = _distributions(student_RV, teacher_RV, scratch_RV)
    loss_R = -log_ratio_RV.mul_(p_RV).sum(-1)
    q_RV.sub_(p_RV)
    return loss_R


def reverse_kl_rows(student_RV: torch.Tensor, teacher_RV: torch.Tensor, scratch_RV: torch.Tensor) -> torch.Tensor:
    """KL(q ‖ p) = Σ q·(log q − log p); gradient q·(log q − log p − KL)."""
    q_RV, log_ratio_RV, _ = _distributions(student_RV, teacher_RV, scratch_RV)
    loss_R1 = torch.mul(q_RV, log_ratio_RV, out=scratch_RV).sum(-1, keepdim=True)
    q_RV.mul_(log_ratio_RV.sub_(loss_R1))
    return loss_R1[:, 0]


def jsd_rows(student_RV: torch.Tensor, teacher_RV: torch.Tensor, scratch_RV: torch.Tensor, *, beta: float) -> torch.Tensor:
    """β·KL(p ‖ m) + (1 − β)·KL(q ‖ m), m = β·p + (1 − β)·q (arXiv 2306.13649, §2); gradient (1 − β)·q·(log q − log m − KL(q ‖ m)).

    What reaches q through m cancels in the gradient. As β → 0 it tends to β times forward KL, as β → 1 to 1 − β times reverse KL.
    """
    q_RV, log_ratio_RV, p_RV = _distributions(student_RV, teacher_RV, scratch_RV)
    # From the ratio alone, so exactly 0 where p = q. Past e^80 the rarer side's weight is below float32.
    log_m_over_q_RV = log_ratio_RV.clamp_(-80, 80).neg().expm1_().mul_(beta).log1p_()
    teacher_loss_R = -log_ratio_RV.add_(log_m_over_q_RV).mul_(p_RV).sum(-1)
    student_loss_R1 = -torch.mul(q_RV, log_m_over_q_RV, out=scratch_RV).sum(-1, keepdim=True)
    q_RV.mul_(log_m_over_q_RV.add_(student_loss_R1)).mul_(beta - 1)
    return beta * teacher_loss_R + (1 - beta) * student_loss_R1[:, 0]


def top_k_rows(student_RV: torch.Tensor, ids_RK: torch.Tensor, log_probabilities_RK: torch.Tensor, tail_log_mass_R: torch.Tensor) -> torch.Tensor:
    """distill.losses.forward_kl_top_k's divergence; gradient q − p where p is kept, q − tail·(q's share among the others) elsewhere."""
    kept_RK = student_RV.gather(-1, ids_RK)
    student_RV.scatter_(-1, ids_RK, float("-inf"))
    shift_R1 = student_RV.amax(-1, keepdim=True).nan_to_num_(neginf=0.0)  # −inf where there are no others
    others_sum_R1 = student_RV.sub_(shift_R1).exp_().sum(-1, keepdim=True)
    others_log_mass_R1 = shift_R1 + others_sum_R1.log()  # not yet normalised
    normaliser_R1 = torch.logaddexp(kept_RK.logsumexp(-1, keepdim=True), others_log_mass_R1)
    kept_RK -= normaliser_R1
    p_RK, tail_R1 = log_probabilities_RK.exp(), tail_log_mass_R.exp()[:, None]
    loss_R1 = (p_RK * (log_probabilities_RK - kept_RK)).sum(-1, keepdim=True) + torch.special.xlogy(tail_R1, tail_R1)
    loss_R1 -= torch.where(tail_R1 > 0, tail_R1 * (others_log_mass_R1 - normaliser_R1), 0.0)
    # The sum over others is at least 1, their likeliest one's, or 0 where there are none.
    student_RV.mul_((shift_R1 - normaliser_R1).exp() - tail_R1 / others_sum_R1.clamp_min(1.0))
    student_RV.scatter_(-1, ids_RK, kept_RK.exp() - p_RK)
    return loss_R1[:, 0]


def cross_entropy_rows(student_RV: torch.Tensor, labels_R: torch.Tensor, *, with_gradient: bool = True) -> torch.Tensor:
    """−log q(label); gradient q − onehot(label), else the logits' place holds nothing of use. A row whose label is negative counts zero, and so does its
    gradient."""
    at_label_R1 = student_RV.gather(-1, labels_R.clamp(min=0)[:, None])
    shift_R1 = student_RV.amax(-1, keepdim=True)
    sum_R1 = student_RV.sub_(shift_R1).exp_().sum(-1, keepdim=True)
    has_label_R = labels_R >= 0
    if with_gradient:
        student_RV.mul_(has_label_R[:, None] / sum_R1)
        student_RV.scatter_add_(-1, labels_R.clamp(min=0)[:, None], -has_label_R[:, None].to(sum_R1.dtype))
    return (sum_R1.log() + shift_R1 - at_label_R1)[:, 0] * has_label_R


def _distributions(student_RV: torch.Tensor, teacher_RV: torch.Tensor, scratch_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, log q − log p, p) in the places of the three, each logit shifted by its row's largest so that no exponential overflows."""
    student_shift_R1, teacher_shift_R1 = student_RV.amax(-1, keepdim=True), teacher_RV.amax(-1, keepdim=True)
    p_RV = torch.sub(teacher_RV, teacher_shift_R1, out=scratch_RV).exp_()
    log_ratio_RV = torch.sub(student_RV, teacher_RV, out=teacher_RV)
    q_RV = student_RV.sub_(student_shift_R1).exp_()
    p_sum_R1, q_sum_R1 = p_RV.sum(-1, keepdim=True), q_RV.sum(-1, keepdim=True)
    log_ratio_RV.sub_((student_shift_R1 - teacher_shift_R1) + (q_sum_R1.log() - p_sum_R1.log()))
    return q_RV.div_(q_sum_R1), log_ratio_RV, p_RV.div_(p_sum_R1)
