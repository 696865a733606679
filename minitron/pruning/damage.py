"""What a cut costs before any training, measured on a model that need not be whole in memory."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from distill.batches import PADDING, split_padding
from distill.losses import next_token_labels
from minitron.checkpoints.placement import PlacedModel, run_layer
from minitron.text.samples import check_predicted


@torch.no_grad()
def walked_loss(model: PlacedModel, batches: Sequence[torch.Tensor]) -> float:
    """Next-token loss over batches of rows [B, T], nats per predicted token that counts; the logits of one row exist at a time.

    Raises ValueError where no token counts.
    """
    residuals = model.embed([split_padding(rows_BT)[0] for rows_BT in batches])
    for _, block in model.visit(range(model.architecture.num_sublayers)):
        residuals = run_layer(block, residuals)
    total, tokens = 0.0, 0
    with model.open_head() as head:
        for residual_BTD, rows_BT in zip(residuals, batches, strict=True):
            for residual_TD, labels_T in zip(residual_BTD, next_token_labels(rows_BT)[:, :-1], strict=True):
                total += F.cross_entropy(head.logits(residual_TD[:-1]), labels_T, reduction="sum", ignore_index=PADDING).item()
                tokens += int((labels_T != PADDING).sum())
    check_predicted(tokens)
    return total / tokens
