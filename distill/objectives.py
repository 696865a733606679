"""What a student is trained for: loss functions of a model and rows, made for distill.trainer.

R rows, B batch, T tokens, V vocabulary, D hidden.
"""

from collections.abc import Callable

import torch
from torch import nn

from distill.batches import split_padding
from distill.chunked_loss import Head, LossRecipe, chunked_loss
from distill.engine import place_teacher
from distill.launch import Launch
from distill.losses import next_token_labels
from distill.top_k import TopK

# Of a model and rows [B, T] that may end in padding: the mean loss per token, alone or as "loss" among further means to watch.
LossFunction = Callable[[nn.Module, torch.Tensor], torch.Tensor | dict[str, torch.Tensor]]


def distillation_loss(teacher: nn.Module, recipe: LossRecipe | None = None, *, launch: Launch = Launch()) -> LossFunction:  # noqa: B008
    """The recipe's loss against a frozen teacher (forward KL alone when None), and beside it what _means says.

    Logits exist for one chunk of tokens at a time. Raises ValueError on the first batch where the vocabularies differ.
    """
    placed, recipe = place_teacher(launch, teacher), recipe or LossRecipe()

    def loss(model: nn.Module, rows_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        ids_BT, _ = split_padding(rows_BT)
        with torch.no_grad():
            target = Head(*placed(_frozen_head, ids_BT))
        return _means(head_of(model, ids_BT), target, recipe, rows_BT)

    return loss


def head_of(model: nn.Module, ids_BT: torch.Tensor) -> Head:
    """The model's logits not yet multiplied out: its last hidden states [B, T, D] and its output matrix [V, D]."""
    output = model.get_output_embeddings()
    assert output.bias is None, "a Head has no bias"
    hidden_BTD = model.base_model(ids_BT, use_cache=False).last_hidden_state
    device = hidden_BTD.device.type
    if torch.is_autocast_enabled(device):  # as autocast would do for the output layer
        hidden_BTD = hidden_BTD.to(torch.get_autocast_dtype(device))
    return Head(hidden_BTD, output.weight)


def _frozen_head(teacher: nn.Module, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A Head's two, to be used after the teacher's forward call: ZeRO-3 then takes the data from the parameter, but not from who shares it."""
    head = head_of(teacher, ids_BT)
    return head.hidden_BTD, head.weight_VD.detach()


def _means(student: Head, teacher: Head | TopK, recipe: LossRecipe, rows_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and, to watch: cross-entropy per token that has a next one, the share of tokens whose likeliest next one is the teacher's too,
    and where the loss is not it already, the divergence. All are nats per token but the share.
    """
    _, mask_BT = split_padding(rows_BT)
    sums = chunked_loss(student, teacher, recipe, mask_BT=mask_BT, labels_BT=next_token_labels(rows_BT), count_agreement=True)
    num_tokens = sums.num_tokens.clamp(min=1)
    means = {"loss": sums.loss, "cross_entropy": sums.cross_entropy_nats / sums.num_labels.clamp(min=1), "top1_agreement": sums.num_agreeing / num_tokens}
    if recipe.cross_entropy_weight > 0 or recipe.temperature != 1:
        means["divergence"] = sums.divergence_nats / num_tokens
    return means
