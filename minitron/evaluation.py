"""How good a model is on held-out text, and how fast it decodes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from distill.batches import PADDING, split_padding


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over predicted tokens, `tokens` in number; padding is none. loss and KL(teacher ‖ model) in nats per token; agreement is a share."""

    loss_nats_per_token: float
    kl_to_teacher_nats_per_token: float
    top1_agreement: float
    tokens: int


def batches_of(rows_RT: np.ndarray, batch: int, device: torch.device | str) -> list[torch.Tensor]:
    """Rows int32 [R, T] as batches int64 [≤ B, T], padding included: see distill.batches.split_padding."""
    ids = torch.from_numpy(rows_RT.astype(np.int64))
    return [part.to(device) for part in ids.split(batch)]


def spread_rows(rows_RT: np.ndarray, number: int) -> np.ndarray:
    """At most `number` rows, evenly spread over all of them, so that every document has its chance."""
    if len(rows_RT) <= number:
        return rows_RT
    return rows_RT[np.linspace(0, len(rows_RT) - 1, number).astype(np.int64)]


def screening_rows(held_out_RT: np.ndarray) -> np.ndarray:
    """The held-out rows that choose a candidate: every other one."""
    return held_out_RT[0::2] if len(held_out_RT) > 1 else held_out_RT


def evaluation_rows(held_out_RT: np.ndarray) -> np.ndarray:
    """The held-out rows that grade it, none of which helped to choose it (where there is more than one)."""
    return held_out_RT[1::2] if len(held_out_RT) > 1 else held_out_RT


def longest_prompt(rows_RT: np.ndarray, number: int) -> torch.Tensor:
    """The first `number` ids, fewer where no row has them, of the first row with the most real tokens; int64 [≤ number]."""
    row = rows_RT[np.argmax((rows_RT != PADDING).sum(axis=1))]
    return torch.from_numpy(row[row != PADDING][:number].astype(np.int64))


@torch.no_grad()
def evaluate(model: nn.Module, teacher: nn.Module, batches: list[torch.Tensor], on_batch: Callable[[int], None] = lambda _: None) -> Evaluation:
    """Held-out loss of a model and its distance to the teacher, over batches of rows. `on_batch` hears the real tokens of each."""
    loss = kl = agree = 0.0
    tokens = 0
    for rows_BT in batches:
        ids_BT, mask_BT = split_padding(rows_BT)
        # Float32 for the sums; the last position predicts nothing that is in the row.
        own = F.log_softmax(model(ids_BT, use_cache=False).logits[:, :-1].float(), dim=-1)
        reference = own if model is teacher else F.log_softmax(teacher(ids_BT, use_cache=False).logits[:, :-1].float(), dim=-1)
        targets, predicted = ids_BT[:, 1:], mask_BT[:, 1:]
        loss += -own.gather(-1, targets[..., None])[..., 0][predicted].double().sum().item()
        kl += F.kl_div(own, reference, log_target=True, reduction="none").double().sum(-1)[predicted].sum().item()
        agree += (own.argmax(-1) == reference.argmax(-1))[predicted].sum().item()
        tokens += predicted.sum().item()
        on_batch(mask_BT.sum().item())
    return Evaluation(loss / tokens, kl / tokens, agree / tokens, tokens)


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: list[torch.Tensor]) -> float:
    """Next-token loss alone over batches of rows, nats per token; padding is not counted."""
    total, tokens = 0.0, 0
    for rows_BT in batches:
        logits = model(split_padding(rows_BT)[0], use_cache=False).logits[:, :-1].float()
        targets = rows_BT[:, 1:].reshape(-1)
        total += F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction="sum", ignore_index=PADDING).item()
        tokens += (targets != PADDING).sum().item()
    return total / tokens


@torch.no_grad()
def decode_tokens_per_second(model: nn.Module, prompt_T: torch.Tensor, new_tokens: int) -> float:
    """Greedy decoding speed with the model's own cache, batch 1, after the prompt [T] is read; best of three."""
    best = 0.0
    for _ in range(3):
        output = model(prompt_T[None], use_cache=True)
        started = time.perf_counter()
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
        output.logits.sum().item()  # waits for an accelerator to finish
        best = max(best, new_tokens / (time.perf_counter() - started))
    return best
