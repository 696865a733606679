"""Distillation losses as pure functions of logits. B batch, T tokens, V vocabulary."""

import torch
import torch.nn.functional as F


def forward_kl(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """Mean over tokens of KL(teacher ‖ student), in nats per token, a float32 scalar.

    Σ_v p(v)·(log p(v) − log q(v)) with p, q the softmax of teacher and student logits over `temperature`;
    times temperature², so that gradients keep their size (MT1, arXiv 2407.14679, §3; temperature 1 there).
    """
    student = F.log_softmax(student_BTV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BTV.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean() * temperature**2


def next_token_loss(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every next token, nats per token: logits at t against the id at t + 1."""
    vocabulary = logits_BTV.shape[-1]
    return F.cross_entropy(logits_BTV[:, :-1].reshape(-1, vocabulary).float(), ids_BT[:, 1:].reshape(-1))
