"""The chunked loss against whole logits in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill import chunk_sizes
from distill.batches import PADDING
from distill.chunked_loss import Head, LossRecipe, LossSums, chunked_cross_entropy, chunked_loss
from distill.losses import forward_kl_top_k, next_token_labels
from distill.top_k import top_k_of_logits

VOCABULARY = 301
RECIPES = [LossRecipe(name, 0.3, temperature, weight) for name in ("forward_kl", "reverse_kl", "jsd") for temperature in (1.0, 3.0) for weight in (0.0, 0.4)]


@pytest.fixture
def heads() -> tuple[Head, Head]:
    """(student, teacher) of different widths over [3, 11] tokens."""
    random = torch.Generator().manual_seed(0)
    sizes = (24, 32)
    return tuple(Head(torch.randn(3, 11, size, generator=random), torch.randn(VOCABULARY, size, generator=random).mul_(0.5)) for size in sizes)


@pytest.fixture
def rows() -> torch.Tensor:
    """Ids [3, 11] of rows of 11, 4 and 7 tokens."""
    rows = torch.randint(VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))
    rows[1, 4:] = rows[2, 7:] = PADDING
    return rows


def learnable(head: Head) -> Head:
    return Head(head.hidden_BTD.clone().requires_grad_(), head.weight_VD.clone().requires_grad_())


def logits_of(head: Head) -> torch.Tensor:
    return head.hidden_BTD @ head.weight_VD.T


def in_double(head: Head) -> Head:
    return Head(head.hidden_BTD.double(), head.weight_VD.double())


def reference_divergence(student, teacher, recipe: LossRecipe) -> torch.Tensor:
    """Sum over tokens, from float64 logits."""
    q, p = ((logits / recipe.temperature).log_softmax(-1) for logits in (student, teacher))
    m = (recipe.beta * p.exp() + (1 - recipe.beta) * q.exp()).log()
    kl = {
        "forward_kl": lambda: F.kl_div(q, p, log_target=True, reduction="sum"),
        "reverse_kl": lambda: F.kl_div(p, q, log_target=True, reduction="sum"),
        "jsd": lambda: recipe.beta * F.kl_div(m, p, log_target=True, reduction="sum") + (1 - recipe.beta) * F.kl_div(m, q, log_target=True, reduction="sum"),
    }
    return kl[recipe.divergence]()


def reference(student: Head, teacher: Head, recipe: LossRecipe, mask, labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, gradient of hidden, gradient of weight) in float64, the mean over the mask."""
    student, teacher = learnable(in_double(student)), in_double(teacher)
    student_logits, teacher_logits, weight = logits_of(student)[mask], logits_of(teacher)[mask], recipe.cross_entropy_weight
    cross_entropy = F.cross_entropy(student_logits, labels[mask], ignore_index=PADDING, reduction="sum")
    divergence = reference_divergence(student_logits, teacher_logits, recipe)
    loss = ((1 - weight) * recipe.temperature**2 * divergence + weight * cross_entropy) / mask.sum()
    loss.backward()
    return loss.detach(), student.hidden_BTD.grad, student.weight_VD.grad


def chunked(student: Head, teacher, recipe: LossRecipe | None = None, **more) -> tuple[LossSums, torch.Tensor, torch.Tensor]:
    student = learnable(student)
    sums = chunked_loss(student, teacher, recipe, **{"chunk_tokens": 4, **more})
    sums.loss.backward()
    return sums, student.hidden_BTD.grad, student.weight_VD.grad


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_loss_and_gradients_are_those_of_whole_logits_in_float64(heads, rows, recipe):
    mask, labels = rows != PADDING, next_token_labels(rows)
    sums, *gradients = chunked(*heads, recipe, mask_BT=mask, labels_BT=labels)
    for value, expected in zip((sums.loss, *gradients), reference(*heads, recipe, mask, labels), strict=True):
        assert relative(value, expected) < 1e-6
    assert relative(sums.loss, reference(*heads, replace(recipe, temperature=2.0, beta=0.5), mask, labels)[0]) > 1e-3  # another recipe is told apart


def test_forward_kl_is_the_teachers_divergence_from_the_student(heads):
    everything = torch.ones(3, 11, dtype=torch.bool)
    forward, reverse = (reference(*pair, LossRecipe(), everything, everything.long())[0] for pair in (heads, heads[::-1]))
    loss = chunked(*heads)[0].loss
    assert relative(loss, forward) < 1e-6 < 1e-2 < relative(loss, reverse)


@pytest.mark.parametrize("vocabulary", [3, 40000, 140000])
def test_any_vocabulary_is_as_exact(vocabulary):
    """Blocks of many rows, of a few and of one; a sum over many tokens loses nothing."""
    random = torch.Generator().manual_seed(0)
    student, teacher = (Head(torch.randn(1, 6, 8, generator=random), torch.randn(vocabulary, 8, generator=random)) for _ in range(2))
    everything = torch.ones(1, 6, dtype=torch.bool)
    sums, *gradients = chunked(student, teacher)
    for value, expected in zip((sums.loss, *gradients), reference(student, teacher, LossRecipe(), everything, everything.long()), strict=True):
        assert relative(value, expected) < 1e-6


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if not recipe.cross_entropy_weight], ids=str)
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(heads, recipe):
    sums, *gradients = chunked(heads[1], heads[1], recipe)
    assert sums.loss.item() == 0.0 and all(not gradient.any() for gradient in gradients)
    moved = replace(heads[1], hidden_BTD=heads[1].hidden_BTD + 1e-3)
    sums, *gradients = chunked(moved, heads[1], recipe)
    assert sums.loss.item() > 0.0 and all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 33, 1000])
def test_the_size_of_chunks_changes_nothing_but_rounding(heads, chunk_tokens):
    expected, *gradients = chunked(*heads)
    sums, *others = chunked(*heads, chunk_tokens=chunk_tokens)
    for value, other in zip((expected.loss, *gradients), (sums.loss, *others), strict=True):
        assert relative(other, value.double()) < 1e-6


class LargestTensor(TorchDispatchMode):
    """Sees every operation and keeps the number of values of the largest result."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.values = max([self.values, *(value.untyped_storage().nbytes() // value.element_size() for value in tree_leaves(result) if torch.is_tensor(value))])
        return result


def test_the_logits_of_all_tokens_never_exist(heads):
    with LargestTensor() as seen:
        chunked(*heads)
    assert seen.values == VOCABULARY * 32 < 33 * VOCABULARY  # the teacher's matrix
    with LargestTensor() as seen:
        chunked(*heads, chunk_tokens=33)
    assert seen.values == 33 * VOCABULARY


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_logits_that_no_exponential_could_take_give_the_right_loss(recipe):
    """Probabilities of 1 and of e^-400 on either side; the matrices are the identity, so hidden states are logits."""
    spread = torch.tensor([[[200.0, -200.0, 0.0, 3.0], [-200.0, 200.0, 1.0, 0.0], [200.0, 199.0, -200.0, -200.0]]])
    student, teacher, everything = Head(spread, torch.eye(4)), Head(spread.roll(1, -1), torch.eye(4)), torch.ones(1, 3, dtype=torch.bool)
    labels = torch.tensor([[1, 1, PADDING]])
    sums, *gradients = chunked(student, teacher, recipe, labels_BT=labels)
    expected = reference(student, teacher, recipe, everything, labels)
    assert relative(sums.loss, expected[0]) < 1e-6
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


# Masks and normalisers.


def test_what_is_masked_out_takes_no_part(heads, rows):
    """Not even where it is nan: it is left out, not multiplied by zero."""
    mask = rows != PADDING
    student, teacher = (replace(head, hidden_BTD=head.hidden_BTD.masked_fill(~mask[..., None], float("nan"))) for head in heads)
    expected, hidden_gradient, weight_gradient = chunked(*heads, mask_BT=mask)
    sums, other_hidden_gradient, other_weight_gradient = chunked(student, teacher, mask_BT=mask)
    assert torch.equal(sums.loss, expected.loss) and torch.equal(other_weight_gradient, weight_gradient)
    assert torch.equal(other_hidden_gradient, hidden_gradient) and not hidden_gradient[~mask].any() and hidden_gradient[mask].all(-1).any()
    assert not torch.equal(chunked(*heads)[0].loss, expected.loss)


def test_parts_over_the_number_of_all_tokens_add_up_to_the_whole(heads, rows):
    """What accumulation and several processes do; a mean of means would weigh short rows too much."""
    mask = rows != PADDING
    whole, *gradients = chunked(*heads, mask_BT=mask)
    weight_gradient, loss, mean_of_means = 0, 0, 0
    for row in range(3):
        parts = [replace(head, hidden_BTD=head.hidden_BTD[row]) for head in heads]
        sums, _, gradient = chunked(*parts, mask_BT=mask[row], num_tokens=int(mask.sum()))
        loss, weight_gradient = loss + sums.loss, weight_gradient + gradient
        mean_of_means += chunked(*parts, mask_BT=mask[row])[0].loss / 3
    assert relative(loss, whole.loss.double()) < 1e-6 and relative(weight_gradient, gradients[1].double()) < 1e-6
    assert relative(mean_of_means, whole.loss.double()) > 1e-3


def test_a_batch_with_nothing_to_learn_gives_zero(heads):
    sums, *gradients = chunked(*heads, mask_BT=torch.zeros(3, 11, dtype=torch.bool))
    assert sums.loss.item() == 0.0 == sums.num_tokens and all(not gradient.any() for gradient in gradients)


def test_the_sums_are_of_the_tokens_that_count(heads, rows):
    mask, labels = rows != PADDING, next_token_labels(rows)
    recipe = LossRecipe(temperature=3.0)
    sums = chunked(*heads, recipe, mask_BT=mask, labels_BT=labels, count_agreement=True)[0]
    student, teacher = (logits_of(in_double(head))[mask] for head in heads)
    assert relative(sums.divergence_nats, reference_divergence(student, teacher, recipe)) < 1e-6
    assert relative(sums.cross_entropy_nats, F.cross_entropy(student, labels[mask], ignore_index=PADDING, reduction="sum")) < 1e-6
    assert (sums.num_tokens, sums.num_labels) == (22, 19)
    assert sums.num_agreeing == (student.argmax(-1) == teacher.argmax(-1)).sum()
    assert chunked(heads[1], heads[1], mask_BT=mask, count_agreement=True)[0].num_agreeing == 22
    assert chunked(*heads, mask_BT=mask)[0].num_labels == 0


def test_labels_are_the_following_tokens(rows):
    labels = next_token_labels(rows)
    assert torch.equal(labels[:, :-1], rows[:, 1:]) and (labels[:, -1] == PADDING).all() and labels[1, 3] == PADDING


# What is computed, and in which numbers.


def test_bfloat16_is_multiplied_and_summed_in_float32(heads):
    """Against float64 on the same rounded inputs: logits rounded to bfloat16 would be off by 1e-3, a sum in it by more."""
    student, teacher = (Head(head.hidden_BTD.bfloat16(), head.weight_VD.bfloat16()) for head in heads)
    everything = torch.ones(3, 11, dtype=torch.bool)
    sums, hidden_gradient, weight_gradient = chunked(student, teacher)
    loss, expected_hidden, expected_weight = reference(student, teacher, LossRecipe(), everything, everything.long())
    assert sums.loss.dtype == torch.float32 and relative(sums.loss, loss) < 1e-6
    for gradient, expected in ((hidden_gradient, expected_hidden), (weight_gradient, expected_weight)):
        assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, expected.to(torch.bfloat16)) or relative(gradient, expected) < 2e-3
    rounded = F.kl_div(logits_of(student).log_softmax(-1).double(), logits_of(teacher).log_softmax(-1).double(), log_target=True, reduction="sum") / 33
    assert relative(rounded, loss) > 1e-5


def test_a_float32_matrix_under_autocast_gets_a_float32_gradient(heads):
    student, teacher = learnable(heads[0]), heads[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_BTD = F.linear(student.hidden_BTD, torch.eye(24))
        assert hidden_BTD.dtype == torch.bfloat16
        sums = chunked_loss(replace(student, hidden_BTD=hidden_BTD), teacher)
    sums.loss.backward()
    rounded = Head(heads[0].hidden_BTD.bfloat16().float(), heads[0].weight_VD)
    expected, _, weight_gradient = chunked(rounded, teacher)
    assert relative(sums.loss, expected.loss.double()) < 1e-6 and relative(student.weight_VD.grad, weight_gradient.double()) < 1e-6


@pytest.mark.parametrize("learning", ["hidden_BTD", "weight_VD"])
def test_what_is_frozen_gets_no_gradient(heads, learning):
    student = replace(heads[0], **{learning: getattr(heads[0], learning).clone().requires_grad_()})
    chunked_loss(student, heads[1]).loss.backward()
    _, hidden_gradient, weight_gradient = chunked(*heads)
    gradients = {"hidden_BTD": hidden_gradient, "weight_VD": weight_gradient}
    assert relative(getattr(student, learning).grad, gradients.pop(learning).double()) < 1e-6
    assert all(getattr(student, name).grad is None for name in gradients)


def test_the_teacher_gets_no_gradient(heads):
    teacher = learnable(heads[1])
    chunked(heads[0], teacher)
    assert teacher.hidden_BTD.grad is None and teacher.weight_VD.grad is None


def test_no_gradient_is_made_where_none_is_recorded(heads):
    with torch.no_grad():
        loss = chunked_loss(learnable(heads[0]), heads[1]).loss
    assert not loss.requires_grad and torch.equal(loss, chunked(*heads, chunk_tokens=None)[0].loss)


def test_a_second_backward_pass_is_refused_rather_than_wrong(heads):
    loss = chunked_loss(learnable(heads[0]), heads[1]).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        loss.backward()


def test_a_loss_that_is_scaled_has_scaled_gradients(heads):
    student, expected = learnable(heads[0]), chunked(*heads)
    (chunked_loss(student, heads[1]).loss * 3).backward()
    assert relative(student.weight_VD.grad / 3, expected[2].double()) < 1e-6 and relative(student.hidden_BTD.grad / 3, expected[1].double()) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_the_same(heads, rows, dtype):
    mask, labels = rows != PADDING, next_token_labels(rows)
    on_cpu, on_gpu = ([Head(head.hidden_BTD.to(device, dtype), head.weight_VD.to(device, dtype)) for head in heads] for device in ("cpu", "cuda"))
    expected = chunked(*on_cpu, LossRecipe(cross_entropy_weight=0.4), mask_BT=mask, labels_BT=labels)
    found = chunked(*on_gpu, LossRecipe(cross_entropy_weight=0.4), mask_BT=mask.cuda(), labels_BT=labels.cuda())
    assert relative(found[0].loss.cpu(), expected[0].loss.double()) < 1e-5
    for gradient, other in zip(found[1:], expected[1:], strict=True):
        assert relative(gradient.cpu().float(), other.double()) < (1e-5 if dtype == torch.float32 else 1e-2)


# The teacher's top k.


@pytest.mark.parametrize("k", [1, 16, VOCABULARY])
def test_a_teachers_top_k_gives_what_it_gives_on_whole_logits(heads, rows, k):
    mask, teacher = rows != PADDING, top_k_of_logits(logits_of(heads[1]), k)
    whole = learnable(heads[0])
    loss = forward_kl_top_k(logits_of(whole), teacher, mask_BT=mask)
    loss.backward()
    sums, *gradients = chunked(heads[0], teacher, mask_BT=mask, count_agreement=True)
    for value, expected in zip((sums.loss, *gradients), (loss, whole.hidden_BTD.grad, whole.weight_VD.grad), strict=True):
        assert relative(value, expected.double()) < 2e-6
    assert sums.num_agreeing == chunked(*heads, mask_BT=mask, count_agreement=True)[0].num_agreeing
    assert relative(chunked(heads[0], top_k_of_logits(logits_of(heads[1]), 100), mask_BT=mask)[0].loss, loss.double()) > 1e-3


def test_a_top_k_of_the_whole_vocabulary_is_the_whole_teacher(heads):
    expected, found = chunked(*heads), chunked(heads[0], top_k_of_logits(logits_of(heads[1]), VOCABULARY))
    assert relative(found[0].loss, expected[0].loss.double()) < 1e-6 and relative(found[2], expected[2].double()) < 1e-6


def test_a_top_k_mixes_with_a_cross_entropy(heads, rows):
    teacher, labels = top_k_of_logits(logits_of(heads[1]), VOCABULARY), next_token_labels(rows)
    recipe = LossRecipe(cross_entropy_weight=0.4)
    expected, found = chunked(*heads, recipe, labels_BT=labels), chunked(heads[0], teacher, recipe, labels_BT=labels)
    assert relative(found[0].loss, expected[0].loss.double()) < 1e-6 and relative(found[2], expected[2].double()) < 1e-6


@pytest.mark.parametrize("recipe", [LossRecipe("reverse_kl"), LossRecipe("jsd"), LossRecipe(temperature=2.0)], ids=str)
def test_a_top_k_serves_forward_kl_at_temperature_1_only(heads, recipe):
    with pytest.raises(ValueError, match="a teacher cache holds what forward_kl at temperature 1 needs"):
        chunked(heads[0], top_k_of_logits(logits_of(heads[1]), 4), recipe)


def test_a_top_k_stands_a_tail_of_nothing_and_a_student_that_is_sure():
    student = Head(torch.tensor([[[80.0, 60.0, -40.0, -90.0]]]), torch.eye(4))
    teacher = top_k_of_logits(torch.tensor([[[200.0, 199.0, -200.0, -200.0]]]), 2)
    sums, hidden_gradient, _ = chunked(student, teacher)
    assert relative(sums.loss, forward_kl_top_k(logits_of(student), teacher).double()) < 1e-6
    assert torch.isfinite(hidden_gradient).all() and hidden_gradient.any()


# Bad input.

WRONG = [
    ({"divergence": "kl"}, "loss.divergence is kl; it must be one of forward_kl, reverse_kl, jsd"),
    ({"beta": 0.0}, "loss.beta is 0.0; it must be between 0"),
    ({"beta": 1.0}, "loss.beta is 1.0; it must be between 0"),
    ({"temperature": 0.0}, "loss.temperature is 0.0; it must be above 0"),
    ({"temperature": float("nan")}, "loss.temperature is nan; it must be above 0"),
    ({"cross_entropy_weight": 1.5}, "loss.cross_entropy_weight is 1.5; it must be from 0 to 1"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LossRecipe(**settings)


def test_another_vocabulary_is_refused(heads):
    with pytest.raises(ValueError, match="the student's vocabulary has 301 tokens, the teacher's 300; they must be the same"):
        chunked(heads[0], replace(heads[1], weight_VD=heads[1].weight_VD[:300]))


def test_cross_entropy_alone_is_that_of_whole_logits_in_float64(heads, rows, monkeypatch):
    labels = next_token_labels(rows)
    double = learnable(in_double(heads[0]))
    expected = F.cross_entropy(logits_of(double).flatten(0, 1), labels.flatten(), ignore_index=PADDING)
    expected.backward()
    for chunk_tokens in (4, 256):
        monkeypatch.setattr(chunk_sizes, "CPU_CHUNK_TOKENS", chunk_tokens)
        monkeypatch.setattr(chunk_sizes, "CPU_CHUNK_VALUES", 1)
        student = learnable(heads[0])
        loss = chunked_cross_entropy(student, labels)
        loss.backward()
        pairs = ((loss, expected), (student.hidden_BTD.grad, double.hidden_BTD.grad), (student.weight_VD.grad, double.weight_VD.grad))
        assert all(relative(value, other.detach()) < 1e-6 for value, other in pairs)
        with torch.no_grad():
            assert relative(chunked_cross_entropy(heads[0], labels), expected.detach()) < 1e-6
    assert relative(chunked_cross_entropy(heads[0], labels.clamp(min=0)), expected.detach()) > 1e-2  # padding taken for tokens
