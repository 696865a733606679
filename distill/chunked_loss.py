"""The distillation loss straight from hidden states and output matrices: logits exist for one chunk of tokens at a time.

One sweep over the chunks gives the loss and its gradients for the student's hidden states and output matrix, so nothing of size
[tokens × V] is kept for a backward pass. B batch, T tokens, N tokens that count, C of a chunk, R of a block of rows,
V vocabulary, D hidden, K tokens kept of a teacher.
"""

import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from distill.chunk_sizes import chunk_tokens
from distill.divergences import DIVERGENCES, Divergence, cross_entropy_rows, divergence_named, top_k_rows
from distill.products import multiply, multiply_add, operands
from distill.top_k import TopK

CPU_BLOCK_VALUES = 2**19  # logits passed over at once on a CPU: 2 MiB of each kind, so that the passes run in its cache


@dataclass(frozen=True, slots=True)
class Head:
    """Logits not yet multiplied out: hidden_BTD (any leading dimensions) times the transpose of weight_VD."""

    hidden_BTD: torch.Tensor
    weight_VD: torch.Tensor


@dataclass(frozen=True, slots=True)
class LossRecipe:
    """(1 − cross_entropy_weight)·temperature²·divergence(softmax(logits / temperature)) + cross_entropy_weight·cross-entropy.

    `divergence` is one of DIVERGENCES, `beta` in (0, 1) is jsd's. The defaults are forward KL alone at temperature 1, what
    recovered most in MT1 (arXiv 2407.14679, §4). Raises ValueError naming the setting that is out of its range.
    """

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"loss.divergence is {self.divergence}; it must be one of {', '.join(DIVERGENCES)}")
        if not 0 < self.beta < 1:
            raise ValueError(f"loss.beta is {self.beta}; it must be between 0 (forward_kl) and 1 (reverse_kl), both excluded")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"loss.temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.cross_entropy_weight <= 1:
            raise ValueError(f"loss.cross_entropy_weight is {self.cross_entropy_weight}; it must be from 0 to 1")


@dataclass(frozen=True, slots=True)
class LossSums:
    """`loss` carries the gradient; the rest are plain sums over this call's tokens, to be added up across calls and processes.

    divergence_nats is at the recipe's temperature, without its square; cross_entropy_nats is at temperature 1 over the
    num_labels tokens with a label; num_agreeing tokens have teacher and student put the same token first (0 unless counted).
    All are tensors without dimensions, so that reading none of them makes a GPU wait.
    """

    loss: torch.Tensor
    divergence_nats: torch.Tensor
    cross_entropy_nats: torch.Tensor
    num_agreeing: torch.Tensor
    num_tokens: torch.Tensor
    num_labels: torch.Tensor


def chunked_loss(
    student: Head,
    teacher: Head | TopK,
    recipe: LossRecipe | None = None,
    *,
    mask_BT: torch.Tensor | None = None,
    labels_BT: torch.Tensor | None = None,
    num_tokens: int | torch.Tensor | None = None,
    count_agreement: bool = False,
    chunk_tokens: int | None = None,
) -> LossSums:
    """The recipe's loss summed over the tokens of `mask_BT` (bool, best on a CPU; all when None), over `num_tokens` (the mask's own count when None).

    With accumulation or several processes `num_tokens` is the number of all their tokens, so that losses and gradients add up to the
    mean. `labels_BT` int64 holds the id that each position should predict, PADDING where there is none (see next_token_labels);
    a token without one adds nothing to the cross-entropy and still counts in the mean. Products are taken in the hidden state's dtype on a GPU
    and in float32 on a CPU; logits, sums and the matrix's gradient are float32. The teacher gets no gradient. The loss can be
    differentiated once. Raises ValueError where the vocabularies differ or the recipe needs what is not there.
    """
    recipe = recipe or LossRecipe()
    _check(student, teacher, recipe, labels_BT)
    places_N = None if mask_BT is None else mask_BT.flatten().nonzero()[:, 0].to(student.hidden_BTD.device)
    hidden_ND = _chosen(student.hidden_BTD, places_N, 1)
    labels_N = None if labels_BT is None else _chosen(labels_BT, places_N, 0)
    chunk = _chunk(hidden_ND, student.weight_VD, chunk_tokens)
    if isinstance(teacher, Head):
        source = _HeadTeacher(_chosen(teacher.hidden_BTD, places_N, 1), teacher.weight_VD, recipe, chunk)
    else:
        source = _TopKTeacher(*(_chosen(getattr(teacher, name), places_N, dimensions) for name, dimensions in zip(TopK.__slots__, (1, 1, 0), strict=True)))
    task = _Task(source, labels_N, recipe, count_agreement, chunk, torch.is_grad_enabled())
    loss, sums = _Sweep.apply(hidden_ND, student.weight_VD, task)
    counts = torch.tensor(len(hidden_ND)), torch.tensor(0) if labels_N is None else (labels_N >= 0).sum()
    return LossSums(loss / (max(len(hidden_ND), 1) if num_tokens is None else num_tokens), *sums.unbind(), *counts)


def chunked_cross_entropy(head: Head, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the positions of `labels_BT` (int64; PADDING where there is none), nats per token, a float32 scalar; as chunked_loss otherwise."""
    labels_N, hidden_ND = labels_BT.flatten(), _chosen(head.hidden_BTD, None, 1)
    task = _Task(None, labels_N, LossRecipe(cross_entropy_weight=1.0), False, _chunk(hidden_ND, head.weight_VD, None), torch.is_grad_enabled())
    return _Sweep.apply(hidden_ND, head.weight_VD, task)[0] / (labels_N >= 0).sum().clamp(min=1)


def _chunk(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, wanted: int | None) -> int:
    return min(wanted or chunk_tokens(len(weight_VD), on_cpu=hidden_ND.device.type == "cpu"), max(1, len(hidden_ND)))


def _check(student: Head, teacher: Head | TopK, recipe: LossRecipe, labels_BT: torch.Tensor | None) -> None:
    assert labels_BT is not None or recipe.cross_entropy_weight == 0, "a cross-entropy needs labels"
    vocabulary = len(student.weight_VD)
    if isinstance(teacher, Head) and len(teacher.weight_VD) != vocabulary:
        raise ValueError(f"the student's vocabulary has {vocabulary:,} tokens, the teacher's {len(teacher.weight_VD):,}; they must be the same")
    if isinstance(teacher, TopK) and (recipe.divergence, recipe.temperature) != ("forward_kl", 1.0):
        told = f"loss.divergence is {recipe.divergence} and loss.temperature {recipe.temperature:g}"
        raise ValueError(f"{told}; a teacher cache holds what forward_kl at temperature 1 needs, and no more")


def _chosen(values: torch.Tensor, places_N: torch.Tensor | None, dimensions: int) -> torch.Tensor:
    """Values [..., `dimensions` more] as one list of tokens, those at these places only; a mask would have a GPU waited for, to see how many they are."""
    values = values.reshape(-1, *values.shape[values.ndim - dimensions :])
    return values if places_N is None else values[places_N]


class _HeadTeacher:
    """The teacher's side of a sweep, from hidden states and output matrix."""

    def __init__(self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, recipe: LossRecipe, chunk_tokens: int):
        self.hidden_ND, self.weight_VD = operands(hidden_ND.detach(), weight_VD.detach())
        self.temperature = recipe.temperature
        self.divergence: Divergence = divergence_named(recipe.divergence, recipe.beta)
        self.logits_CV = torch.empty(chunk_tokens, len(weight_VD), device=hidden_ND.device)

    def start(self, first: int, end: int) -> None:
        """Get ready for a chunk of tokens; rows are counted from its first on."""
        multiply(self.hidden_ND[first:end], self.weight_VD.T, self.logits_CV[: end - first])

    def likeliest(self, rows: slice) -> torch.Tensor:
        """Ids [R]."""
        return self.logits_CV[rows].argmax(-1)

    def divergence_of(self, student_RV: torch.Tensor, rows: slice, scratch_RV: torch.Tensor) -> torch.Tensor:
        """Nats [R] at the recipe's temperature; the student's logits become their gradient."""
        teacher_RV = self.logits_CV[rows]
        if self.temperature != 1:
            student_RV /= self.temperature
            teacher_RV /= self.temperature
        return self.divergence(student_RV, teacher_RV, scratch_RV)


class _TopKTeacher:
    """The same from the teacher's top k."""

    def __init__(self, ids_NK: torch.Tensor, log_probabilities_NK: torch.Tensor, tail_log_mass_N: torch.Tensor):
        self.fields = ids_NK, log_probabilities_NK, tail_log_mass_N
        self.chunk = self.fields

    def start(self, first: int, end: int) -> None:
        self.chunk = tuple(field[first:end] for field in self.fields)

    def likeliest(self, rows: slice) -> torch.Tensor:
        ids_RK, log_probabilities_RK, _ = (field[rows] for field in self.chunk)
        return ids_RK.gather(-1, log_probabilities_RK.argmax(-1, keepdim=True))[:, 0]

    def divergence_of(self, student_RV: torch.Tensor, rows: slice, scratch_RV: torch.Tensor) -> torch.Tensor:
        return top_k_rows(student_RV, *(field[rows] for field in self.chunk))


@dataclass(frozen=True, slots=True)
class _Task:
    """What a sweep is given besides what it differentiates."""

    teacher: _HeadTeacher | _TopKTeacher | None  # none: cross-entropy alone
    labels_N: torch.Tensor | None
    recipe: LossRecipe
    count_agreement: bool
    chunk_tokens: int
    gradients_wanted: bool


class _Sweep(torch.autograd.Function):
    """(loss summed over tokens, [divergence, cross-entropy, agreeing tokens]); the forward pass has made the gradients already."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, task):
        needs = [task.gradients_wanted and needed for needed in ctx.needs_input_grad[:2]]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums, gradients = _sweep(hidden_ND, weight_VD, task, *needs)
        ctx.gradients = gradients
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(sums)
        recipe = task.recipe
        loss = (1 - recipe.cross_entropy_weight) * recipe.temperature**2 * sums[0] + recipe.cross_entropy_weight * sums[1]
        return loss.float(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient, _sums_gradient):
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss can be differentiated once: its gradients are scaled in place")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if value is None else value.mul_(loss_gradient).to(dtype) for value, dtype in zip(gradients, ctx.dtypes, strict=True)), None


def _sweep(hidden_ND, weight_VD, task: _Task, needs_hidden: bool, needs_weight: bool):
    """The three sums, float64, and the gradients of the summed loss, float32; None for one that is not needed."""
    (num_tokens, vocabulary), device = (len(hidden_ND), len(weight_VD)), hidden_ND.device
    hidden_gradient_ND = torch.empty(hidden_ND.shape, device=device) if needs_hidden else None
    weight_gradient_VD = torch.zeros(weight_VD.shape, device=device) if needs_weight else None
    hidden_ND, weight_VD = operands(hidden_ND, weight_VD)
    logits_CV = torch.empty(task.chunk_tokens, vocabulary, device=device)
    block = max(1, CPU_BLOCK_VALUES // vocabulary) if device.type == "cpu" else task.chunk_tokens
    scratch_RV = torch.empty(min(block, task.chunk_tokens), vocabulary, device=device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for first in range(0, num_tokens, task.chunk_tokens):
        end = min(first + task.chunk_tokens, num_tokens)
        chunk_CD, chunk_CV = hidden_ND[first:end], logits_CV[: end - first]
        multiply(chunk_CD, weight_VD.T, chunk_CV)
        if task.teacher:
            task.teacher.start(first, end)
        for row in range(0, end - first, block):
            rows = slice(row, min(row + block, end - first))
            sums += _row_losses(chunk_CV[rows], rows, first, task, scratch_RV[: rows.stop - row]).sum(-1, dtype=torch.float64)
        gradient_CV = chunk_CV.to(chunk_CD.dtype)
        if needs_hidden:
            multiply(gradient_CV, weight_VD, hidden_gradient_ND[first:end])
        if needs_weight:
            multiply_add(gradient_CV.T, chunk_CD, weight_gradient_VD)
    return sums, (hidden_gradient_ND, weight_gradient_VD)


def _row_losses(student_RV: torch.Tensor, rows: slice, first: int, task: _Task, scratch_RV: torch.Tensor) -> torch.Tensor:
    """[divergence, cross-entropy, agrees] of each row, float32 [3, R]; the student's logits become the loss's gradient."""
    recipe, zeros_R = task.recipe, student_RV.new_zeros(len(student_RV))
    if task.teacher is None:
        labels_R = task.labels_N[first + rows.start : first + rows.stop]
        return torch.stack([zeros_R, cross_entropy_rows(student_RV, labels_R, with_gradient=task.gradients_wanted), zeros_R])
    agrees_R = (student_RV.argmax(-1) == task.teacher.likeliest(rows)).float() if task.count_agreement else zeros_R
    cross_entropy_R, weight = zeros_R, recipe.cross_entropy_weight
    if task.labels_N is not None:
        cross_entropy_gradient_RV = student_RV.clone()
        cross_entropy_R = cross_entropy_rows(cross_entropy_gradient_RV, task.labels_N[first + rows.start : first + rows.stop])
    divergence_R = task.teacher.divergence_of(student_RV, rows, scratch_RV)
    if weight or recipe.temperature != 1:
        student_RV *= (1 - weight) * recipe.temperature
    if weight:
        student_RV.add_(cross_entropy_gradient_RV, alpha=weight)
    return torch.stack([divergence_R, cross_entropy_R, agrees_R])
