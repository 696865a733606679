"""Distillation losses as pure functions of logits. B batch, T tokens, V vocabulary."""

import torch
import torch.nn.functional as F

from distill.batches import NOT_COUNTED, PADDING, counted_positions
from distill.top_k import TopK


def forward_kl(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, *, temperature: float = 1.0, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the tokens of `mask_BT` (bool; all when None) of KL(teacher ‖ student), in nats per token, a float32 scalar.

    Σ_v p(v)·(log p(v) − log q(v)) with p, q the softmax of teacher and student logits over `temperature`;
    times temperature², so that gradients keep their size (MT1, arXiv 2407.14679, §3; temperature 1 there).
    """
    student = F.log_softmax(student_BTV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BTV.float() / temperature, dim=-1)
    divergence_BT = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return (divergence_BT if mask_BT is None else divergence_BT[mask_BT]).mean() * temperature**2


def next_token_loss(logits_BTV: torch.Tensor, rows_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every label of next_token_labels, nats per token: logits at t against the id at t + 1. Without any label it is 0."""
    vocabulary, labels_BT = logits_BTV.shape[-1], next_token_labels(rows_BT)[:, :-1]
    summed = F.cross_entropy(logits_BTV[:, :-1].reshape(-1, vocabulary).float(), labels_BT.reshape(-1), ignore_index=PADDING, reduction="sum")
    return summed / (labels_BT != PADDING).sum().clamp(min=1)


def next_token_labels(rows_BT: torch.Tensor) -> torch.Tensor:
    """What each position should predict, int64 [B, T]: the following id; PADDING where there is none in its document or the position is not counted."""
    following_BT = rows_BT[:, 1:].clamp(min=PADDING)
    following_BT = following_BT.where(following_BT < NOT_COUNTED, following_BT - NOT_COUNTED)
    return F.pad(following_BT.where(counted_positions(rows_BT[:, :-1]), PADDING), (0, 1), value=PADDING).long()


def hidden_state_loss(
    student_BTD: torch.Tensor,
    teacher_BTE: torch.Tensor,
    projection_ED: torch.Tensor | None = None,
    *,
    mask_BT: torch.Tensor | None = None,
    num_tokens: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean square of projection · student − teacher over the teacher's E channels and the tokens of `mask_BT`, a float32 scalar.

    Summed over tokens and divided by `num_tokens`, the mask's own count when None. Without a projection both are equally wide.
    Gradients reach student and projection; the teacher gets none (MT1, arXiv 2407.14679, §3, its loss on intermediate states).
    """
    if mask_BT is not None:
        student_BTD, teacher_BTE = student_BTD[mask_BT], teacher_BTE[mask_BT]
    projected_BTE = student_BTD if projection_ED is None else F.linear(student_BTD, projection_ED)
    squares_BT = (projected_BTE.float() - teacher_BTE.detach().float()).square().mean(-1)
    return squares_BT.sum() / (max(squares_BT.numel(), 1) if num_tokens is None else num_tokens)


def forward_kl_top_k(student_BTV: torch.Tensor, teacher: TopK, *, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    """forward_kl at temperature 1 where of the teacher only the top k is known: its other tokens count as one, the student's likewise.

    Σ_kept p(v)·(log p(v) − log q(v)) + t·(log t − log s), t and s the mass that teacher and student leave to the other
    tokens: never more than forward_kl (merging tokens loses information), and the same where k = V.
    """
    student_BTV = student_BTV.float()
    normaliser_BT = student_BTV.logsumexp(-1)
    kept_BTK = student_BTV.gather(-1, teacher.ids_BTK) - normaliser_BT[..., None]
    divergence_BT = (teacher.log_probabilities_BTK.exp() * (teacher.log_probabilities_BTK - kept_BTK)).sum(-1)
    if teacher.ids_BTK.shape[-1] < student_BTV.shape[-1]:  # else there are no others
        others_BT = student_BTV.scatter(-1, teacher.ids_BTK, float("-inf")).logsumexp(-1) - normaliser_BT
        tail_BT = teacher.tail_log_mass_BT.exp()
        divergence_BT = divergence_BT + torch.special.xlogy(tail_BT, tail_BT) - tail_BT * others_BT
    return (divergence_BT if mask_BT is None else divergence_BT[mask_BT]).mean()
