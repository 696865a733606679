"""Losses against float64 references."""

import pytest
import torch
import torch.nn.functional as F

from distill.batches import PADDING, split_padding
from distill.losses import forward_kl, forward_kl_top_k, hidden_state_loss, next_token_loss
from distill.top_k import top_k_of_logits


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


# Padding.

LENGTHS = (5, 2, 4)


@pytest.fixture
def padded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student logits, teacher logits, rows): rows of 5, 2 and 4 tokens; the logits at padding are anything at all."""
    random = torch.Generator().manual_seed(2)
    student, teacher = (3 * torch.randn(3, 5, 97, generator=random) for _ in range(2))
    rows = torch.randint(97, (3, 5), generator=random)
    for row, length in zip(rows, LENGTHS, strict=True):
        row[length:] = PADDING
    return student, teacher, rows


def mean_of_rows(losses: list[torch.Tensor], numbers: list[int]) -> float:
    return sum(loss.item() * number for loss, number in zip(losses, numbers, strict=True)) / sum(numbers)


def test_next_token_loss_of_a_padded_batch_is_that_of_its_rows_one_by_one(padded):
    logits, _, rows = padded
    one_by_one = [next_token_loss(logits[b : b + 1, :length], rows[b : b + 1, :length]) for b, length in enumerate(LENGTHS)]
    expected = mean_of_rows(one_by_one, [length - 1 for length in LENGTHS])
    assert next_token_loss(logits, rows).item() == pytest.approx(expected, rel=1e-6)
    assert next_token_loss(logits, rows.clamp(min=0)).item() != pytest.approx(expected, rel=1e-2)  # padding taken for tokens


def test_forward_kl_of_a_padded_batch_is_that_of_its_rows_one_by_one(padded):
    student, teacher, rows = padded
    one_by_one = [forward_kl(student[b : b + 1, :length], teacher[b : b + 1, :length], temperature=2.0) for b, length in enumerate(LENGTHS)]
    expected = mean_of_rows(one_by_one, list(LENGTHS))
    assert forward_kl(student, teacher, temperature=2.0, mask_BT=split_padding(rows)[1]).item() == pytest.approx(expected, rel=1e-6)
    assert forward_kl(student, teacher, temperature=2.0).item() != pytest.approx(expected, rel=1e-3)  # padding counted


def test_padding_gets_no_gradient(padded):
    student, teacher, rows = padded
    mask = split_padding(rows)[1]
    for loss in (lambda logits: forward_kl(logits, teacher, mask_BT=mask), lambda logits: next_token_loss(logits, rows)):
        logits = student.clone().requires_grad_()
        loss(logits).backward()
        assert logits.grad[~mask].abs().max() == 0 < logits.grad[mask].abs().max()


def test_a_mask_of_nothing_but_tokens_changes_no_bit(logits):
    student, teacher = logits
    assert torch.equal(forward_kl(student, teacher, mask_BT=torch.ones(2, 5, dtype=torch.bool)), forward_kl(student, teacher))


# The teacher's top k.


def reference_kl_top_k(student, teacher, k: int) -> float:
    """Slow: the other tokens merged into one, on both sides."""
    divergences = []
    for q, p in zip(student.double().softmax(-1).reshape(-1, 97), teacher.double().softmax(-1).reshape(-1, 97), strict=True):
        kept = p.topk(k).indices
        others = [v for v in range(97) if v not in kept]
        p, q = (torch.cat([value[kept], value[others].sum()[None]]) for value in (p, q))
        divergences.append((p * (p.log() - q.log())).sum().item())
    return sum(divergences) / len(divergences)


@pytest.mark.parametrize("k", [1, 8, 96])
def test_forward_kl_of_a_top_k_merges_the_other_tokens(logits, k):
    student, teacher = logits
    loss = forward_kl_top_k(student, top_k_of_logits(teacher, k))
    assert loss.item() == pytest.approx(reference_kl_top_k(student, teacher, k), rel=1e-5)
    assert loss.item() < reference_kl(student, teacher)


def test_forward_kl_of_a_top_k_of_the_whole_vocabulary_is_forward_kl(logits):
    losses, gradients = [], []
    for loss_of in (lambda student: forward_kl_top_k(student, top_k_of_logits(logits[1], 97)), lambda student: forward_kl(student, logits[1])):
        student = logits[0].clone().requires_grad_()
        losses.append(loss_of(student))
        losses[-1].backward()
        gradients.append(student.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)


def test_forward_kl_of_a_top_k_stands_a_tail_of_nothing_and_a_student_that_is_sure():
    """A teacher without a tail and a student whose kept tokens take all its mass: the loss and its gradient stay finite."""
    student = torch.tensor([[[80.0, 60.0, -40.0, -90.0]]], requires_grad=True)
    loss = forward_kl_top_k(student, top_k_of_logits(torch.tensor([[[200.0, 199.0, -200.0, -200.0]]]), 2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all() and loss.item() > 1.0


def test_forward_kl_of_a_top_k_leaves_padding_out(padded):
    student, teacher, rows = padded
    mask = split_padding(rows)[1]
    one_by_one = [forward_kl_top_k(student[b : b + 1, :length], top_k_of_logits(teacher[b : b + 1, :length], 8)).item() for b, length in enumerate(LENGTHS)]
    expected = sum(loss * length for loss, length in zip(one_by_one, LENGTHS, strict=True)) / sum(LENGTHS)
    assert forward_kl_top_k(student, top_k_of_logits(teacher, 8), mask_BT=mask).item() == pytest.approx(expected, rel=1e-6)
    assert forward_kl_top_k(student, top_k_of_logits(teacher, 8)).item() != pytest.approx(expected, rel=1e-3)


# Hidden states.


@pytest.fixture
def hidden() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student [2, 5, 6], teacher [2, 5, 8], projection [8, 6], mask)."""
    random = torch.Generator().manual_seed(3)
    sizes = ((2, 5, 6), (2, 5, 8), (8, 6))
    return *(torch.randn(size, generator=random) for size in sizes), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])


def test_hidden_states_are_held_against_the_teachers_through_the_projection(hidden):
    student, teacher, projection, mask = hidden
    expected = F.mse_loss((student.double() @ projection.double().T)[mask], teacher.double()[mask])
    assert hidden_state_loss(student, teacher, projection, mask_BT=mask).item() == pytest.approx(expected.item(), rel=1e-6)
    assert hidden_state_loss(student, teacher, projection).item() != pytest.approx(expected.item(), rel=1e-3)
    assert hidden_state_loss(student, teacher, projection, mask_BT=mask, num_tokens=70).item() == pytest.approx(expected.item() / 10, rel=1e-6)


def test_hidden_states_that_project_onto_the_teachers_have_no_loss(hidden):
    student, _, projection, _ = hidden
    assert hidden_state_loss(student, student).item() == 0.0 == hidden_state_loss(student, F.linear(student, projection), projection).item()
    assert hidden_state_loss(student, student + 1).item() == pytest.approx(1.0, rel=1e-6)


def test_a_loss_of_hidden_states_moves_student_and_projection_and_not_the_teacher(hidden):
    values = [value.clone().requires_grad_() for value in hidden[:3]]
    hidden_state_loss(*values, mask_BT=hidden[3]).backward()
    student, teacher, projection = (value.grad for value in values)
    assert teacher is None and projection.any() and student[hidden[3]].all(-1).any() and not student[~hidden[3]].any()
