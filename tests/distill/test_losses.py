"""Losses against float64 references."""

import pytest
import torch
import torch.nn.functional as F

from distill.losses import forward_kl, next_token_loss


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(2, 5, 97, generator=random) for _ in range(2))


def reference_kl(student, teacher, temperature=1.0) -> float:
    p, q = (torch.softmax(value.double() / temperature, -1) for value in (teacher, student))
    return (F.kl_div(q.log(), p, reduction="none").sum(-1).mean() * temperature**2).item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_forward_kl_is_the_divergence_in_float64(logits, temperature):
    student, teacher = logits
    assert forward_kl(student, teacher, temperature=temperature).item() == pytest.approx(reference_kl(student, teacher, temperature), rel=1e-6)


def test_forward_kl_is_not_the_reverse_one(logits):
    student, teacher = logits
    assert forward_kl(student, teacher).item() != pytest.approx(reference_kl(teacher, student), rel=1e-2)


def test_forward_kl_of_equal_logits_is_zero_and_so_is_its_gradient(logits):
    student = logits[0].clone().requires_grad_()
    loss = forward_kl(student, logits[0])
    loss.backward()
    assert loss.item() == 0.0 and student.grad.abs().max() < 1e-7


def test_forward_kl_of_other_logits_has_a_gradient(logits):
    student = logits[0].clone().requires_grad_()
    forward_kl(student, logits[1]).backward()
    assert student.grad.abs().max() > 1e-3


def test_a_shift_of_all_logits_of_a_token_changes_nothing(logits):
    student, teacher = logits
    assert forward_kl(student + 5.0, teacher).item() == pytest.approx(forward_kl(student, teacher).item(), rel=1e-6)
    assert forward_kl(student * 1.1, teacher).item() != pytest.approx(forward_kl(student, teacher).item(), rel=1e-3)


def test_temperature_keeps_the_size_of_the_gradient(logits):
    """T² undoes the 1/T² of softened gradients, near equality of the two (MT1, §3)."""
    sizes = []
    for temperature in (4.0, 8.0):
        student = (logits[0] / 10).clone().requires_grad_()
        forward_kl(student, logits[1] / 10, temperature=temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_bfloat16_logits_are_reduced_in_float32(logits):
    student, teacher = (value.bfloat16() for value in logits)
    loss = forward_kl(student, teacher)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(reference_kl(student, teacher), rel=1e-6)


def test_next_token_loss_holds_each_position_against_the_following_id(logits):
    ids = torch.randint(97, (2, 5), generator=torch.Generator().manual_seed(1))
    log_probabilities = logits[0].double().log_softmax(-1)
    expected = -torch.stack([log_probabilities[b, t, ids[b, t + 1]] for b in range(2) for t in range(4)]).mean()
    assert next_token_loss(logits[0], ids).item() == pytest.approx(expected.item(), rel=1e-6)
    same_position = F.cross_entropy(logits[0].reshape(-1, 97), ids.reshape(-1)).item()
    assert next_token_loss(logits[0], ids).item() != pytest.approx(same_position, rel=1e-3)
