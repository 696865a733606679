"""What a student is trained for: loss functions of a model and rows, made for distill.trainer.

R rows, B batch, T tokens, V vocabulary, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from distill.batches import counted_positions, document_numbers, split_padding
from distill.chunked_loss import Head, LossRecipe, chunked_cross_entropy, chunked_loss
from distill.engines.engine import Unread
from distill.engines.launch import Launch
from distill.engines.opening import place_teacher
from distill.losses import hidden_state_loss, next_token_labels
from distill.products import as_head_takes
from distill.teacher_cache import TeacherCache
from distill.top_k import TopK

# Of a model and rows [B, T] that may end in padding, on the CPU, where what is to be known of them is known without a wait for a GPU: the mean loss per
# counted position (distill.batches.counted_positions; 0 where there is none), alone or as "loss" among further means to watch.
LossFunction = Callable[[nn.Module, torch.Tensor], torch.Tensor | dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class HiddenTerm:
    """`weight` times the mean square between the last normed hidden states, added to a loss: the student's D channels against those
    `channels_D` of the teacher's that they were cut from."""

    weight: float
    channels_D: torch.Tensor


def distillation_loss(teacher: nn.Module | Unread, recipe: LossRecipe | None = None, *, launch: Launch = Launch(),  # noqa: B008
                      hidden: HiddenTerm | None = None) -> LossFunction:  # fmt: skip
    """The recipe's loss against a frozen teacher (forward KL alone when None), and beside it what _means says.

    Logits exist for one chunk of tokens at a time. Raises ValueError on the first batch where the vocabularies differ.
    """
    placed, recipe = place_teacher(launch, teacher), recipe or LossRecipe()

    def loss(model: nn.Module, rows_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            target = Head(*placed(_frozen_head, rows_BT))
        student = head_of(model, rows_BT)
        means = _means(student, target, recipe, rows_BT)
        if hidden:
            device = target.hidden_BTD.device
            aligned_BTD = target.hidden_BTD[..., hidden.channels_D.to(device)]
            means["hidden_state"] = hidden_state_loss(student.hidden_BTD, aligned_BTD, mask_BT=counted_positions(rows_BT).to(device))
            means["loss"] = means["loss"] + hidden.weight * means["hidden_state"]
        return means

    return loss


def cached_loss(cache: TeacherCache, rows_RT: np.ndarray, recipe: LossRecipe | None = None) -> LossFunction:
    """The same from a teacher's cached outputs, without the teacher: of a model and numbers [B] of rows, `rows_RT` being all that the cache holds.

    Raises ValueError for a recipe that needs more than the cache has.
    """
    recipe = recipe or LossRecipe()

    def loss(model: nn.Module, numbers_B: torch.Tensor) -> dict[str, torch.Tensor]:
        numbers = numbers_B.cpu().numpy()
        rows_BT = torch.from_numpy(rows_RT[numbers].astype(np.int64))
        student = head_of(model, rows_BT)
        return _means(student, cache.rows(numbers).to(student.hidden_BTD.device), recipe, rows_BT)

    return loss


def next_token_objective(model: nn.Module, rows_BT: torch.Tensor) -> torch.Tensor:
    """A LossFunction of the text alone: mean cross-entropy of every next token, nats per token."""
    head = head_of(model, rows_BT)
    return chunked_cross_entropy(head, next_token_labels(rows_BT).to(head.hidden_BTD.device))


def head_of(model: nn.Module, rows_BT: torch.Tensor) -> Head:
    """The model's logits of rows not yet multiplied out: its last hidden states [B, T, D] and its output matrix [V, D].

    Documents of a packed row know nothing of each other: attention goes by their positions, Mamba layers by their numbers.
    """
    output = model.get_output_embeddings()
    assert output.bias is None, "a Head has no bias"
    (ids_BT, mask_BT), documents_BT, place = split_padding(rows_BT), document_numbers(rows_BT), output.weight.device
    if (loads := getattr(model, "loads", None)) is not None:  # of a mixture of experts that is trained
        loads.real_BT = None if mask_BT.all() else mask_BT
    packed = {} if documents_BT is None else {"position_ids": _positions(documents_BT).to(place), "seq_idx": documents_BT.to(place)}
    hidden_BTD = model.base_model(ids_BT.to(place), use_cache=False, **packed).last_hidden_state
    device = hidden_BTD.device.type
    if torch.is_autocast_enabled(device):  # as autocast would do for the output layer
        hidden_BTD = hidden_BTD.to(torch.get_autocast_dtype(device))
    return Head(as_head_takes(hidden_BTD, output.weight), output.weight)


def _positions(documents_BT: torch.Tensor) -> torch.Tensor:
    """Each token's place in its document, int64 [B, T], from 0 on."""
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    is_first_BT = documents_BT.diff(dim=1, prepend=documents_BT[:, :1] - 1) > 0
    return places_T - torch.where(is_first_BT, places_T, 0).cummax(dim=1).values


def _frozen_head(teacher: nn.Module, rows_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A Head's two, to be used after the teacher's forward call: ZeRO-3 then takes the data from the parameter, but not from who shares it."""
    head = head_of(teacher, rows_BT)
    return head.hidden_BTD, head.weight_VD.detach()


def _means(student: Head, teacher: Head | TopK, recipe: LossRecipe, rows_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and, to watch: cross-entropy per token that has a next one, the share of tokens whose likeliest next one is the teacher's too,
    and where the loss is not it already, the divergence. All are nats per token but the share, and all are of counted positions alone.
    """
    mask_BT = counted_positions(rows_BT)
    labels_BT = next_token_labels(rows_BT).to(student.hidden_BTD.device)
    sums = chunked_loss(student, teacher, recipe, mask_BT=mask_BT, labels_BT=labels_BT, count_agreement=True)
    num_tokens = sums.num_tokens.clamp(min=1)
    means = {"loss": sums.loss, "cross_entropy": sums.cross_entropy_nats / sums.num_labels.clamp(min=1), "top1_agreement": sums.num_agreeing / num_tokens}
    if recipe.cross_entropy_weight > 0 or recipe.temperature != 1:
        means["divergence"] = sums.divergence_nats / num_tokens
    return means
