"""How good a model is on held-out text, by position and by source."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from distill.batches import PADDING, split_padding
from distill.chunked_loss import Head
from distill.losses import next_token_labels
from distill.objectives import head_of, next_token_objective
from distill.products import logits_of
from minitron.text.samples import check_predicted

MOST_SOURCES = 20
CHUNK_TOKENS, CPU_CHUNK_TOKENS = 1024, 256  # whose logits are there at once on a GPU, on a CPU
REMEMBERED_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over predicted tokens that count, `tokens` in number; padding is none. loss and KL(teacher ‖ model) in nats per token; agreement is a share."""

    loss_nats_per_token: float
    kl_to_teacher_nats_per_token: float
    top1_agreement: float
    tokens: int


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Sums over predicted tokens that count, float64; along the first axis loss, KL, agreement and how many: by position [4, T - 1] and by row [4, R]."""

    by_position: np.ndarray
    by_row: np.ndarray

    def means(self) -> Evaluation:
        """Raises ValueError where there are no such tokens."""
        check_predicted(self.by_row[-1].sum())
        return _means(self.by_row.sum(1))


class Reference:
    """A teacher whose last hidden states of the same rows are computed once, for every model that is held against it, as far as they are
    REMEMBERED_BYTES of host memory. `teacher` is asked for it whenever it is needed: it may be let go in between."""

    def __init__(self, teacher: Callable[[], nn.Module]):
        self.teacher = teacher
        self._known: dict[bytes, torch.Tensor] = {}
        self._room = REMEMBERED_BYTES

    def head(self, ids_BT: torch.Tensor) -> Head:
        name = ids_BT.cpu().numpy().tobytes()
        if name in self._known:
            return Head(self._known[name].to(ids_BT.device), self.teacher().get_output_embeddings().weight)
        head = head_of(self.teacher(), ids_BT)
        if head.hidden_BTD.nbytes <= self._room:
            self._known[name] = head.hidden_BTD.cpu()
            self._room -= head.hidden_BTD.nbytes
        return head


@torch.no_grad()
def token_sums(model: nn.Module, teacher: nn.Module | Reference, batches: list[torch.Tensor],
               on_batch: Callable[[int], None] = lambda _: None) -> TokenSums:  # fmt: skip
    """Held-out loss of a model and its distance to the teacher, over batches of rows. `on_batch` hears the real tokens of each."""
    by_position, by_row = np.zeros((4, max(rows.shape[1] for rows in batches) - 1)), []
    reference = teacher if isinstance(teacher, Reference) else Reference(lambda: teacher)
    for rows_BT in batches:
        ids_BT, mask_BT = split_padding(rows_BT)
        measured = _by_chunks(model, reference, ids_BT)
        values = torch.stack([*measured, torch.ones_like(measured[0])]) * (next_token_labels(rows_BT)[:, :-1] != PADDING)
        by_position[:, : values.shape[2]] += values.sum(1).cpu().numpy()
        by_row.append(values.sum(2).cpu().numpy())
        on_batch(mask_BT.sum().item())
    return TokenSums(by_position, np.concatenate(by_row, axis=1))


def _by_chunks(model: nn.Module, reference: Reference, ids_BT: torch.Tensor) -> torch.Tensor:
    """Loss, KL and agreement of every token but a row's first, float64 [3, B, T - 1]. Logits are there for some tokens at a time, in float32: of one long row
    the whole ones would be larger than the models."""
    heads = [reference.head(ids_BT)]
    if model is not reference.teacher():
        heads.insert(0, head_of(model, ids_BT))
    targets_N, parts = ids_BT[:, 1:].flatten(), []  # the last position predicts nothing that is in the row
    hidden, at_once = [head.hidden_BTD[:, :-1].flatten(0, 1) for head in heads], CHUNK_TOKENS if ids_BT.device.type == "cuda" else CPU_CHUNK_TOKENS
    for first in range(0, len(targets_N), at_once):
        chunk = slice(first, first + at_once)
        logs = [F.log_softmax(logits_of(some_ND[chunk], head.weight_VD), dim=-1) for some_ND, head in zip(hidden, heads, strict=True)]
        parts.append(_compared(logs[0], logs[-1], targets_N[chunk]))
    return torch.cat(parts, dim=1).unflatten(1, ids_BT[:, 1:].shape)


def _compared(own: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of log-probabilities [..., V] of model and teacher: loss, KL and agreement, float64 [3, ...]."""
    loss = -own.gather(-1, targets[..., None])[..., 0]
    kl = F.kl_div(own, reference, log_target=True, reduction="none").sum(-1, dtype=torch.float64)
    return torch.stack([loss.double(), kl, (own.argmax(-1) == reference.argmax(-1)).double()])


def evaluate(model: nn.Module, teacher: nn.Module, batches: list[torch.Tensor], on_batch: Callable[[int], None] = lambda _: None) -> Evaluation:
    """The means of token_sums."""
    return token_sums(model, teacher, batches, on_batch).means()


def by_position(sums: TokenSums) -> list[dict[str, Any]]:
    """Means by the number of tokens of the row that stand before the predicted one, in powers of two: 1, 2–3, 4–7, … (`from`, `to`)."""
    last, found, first = sums.by_position.shape[1], [], 1
    while first <= last:
        after = min(2 * first, last + 1)
        bucket = sums.by_position[:, first - 1 : after - 1].sum(1)
        if bucket[-1]:  # else all rows are padded there, or nothing counts
            found.append({"from": first, "to": after - 1, **asdict(_means(bucket))})
        first = after
    return found


def by_source(sums: TokenSums, sources: Sequence[str]) -> list[dict[str, Any]]:
    """Means by where a row comes from (`source`), most tokens first; `sources` names each row's. Beyond 20 sources the smallest are one; one of which
    no token counts is left out.
    """
    total: dict[str, np.ndarray] = {}
    for source, sums_of_row in zip(sources, sums.by_row.T, strict=True):
        total[source] = total.get(source, 0) + sums_of_row
    total = {source: sums_4 for source, sums_4 in total.items() if sums_4[-1]}
    largest = sorted(total, key=lambda source: (-total[source][-1], source))
    if len(largest) > MOST_SOURCES:
        rest = largest[MOST_SOURCES - 1 :]
        largest = [*largest[: MOST_SOURCES - 1], f"{len(rest):,} others"]
        total[largest[-1]] = sum(total[source] for source in rest)
    return [{"source": source, **asdict(_means(total[source]))} for source in largest]


def by_row(sums: TokenSums) -> dict[str, list[float]]:
    """Of each row the loss summed over its tokens that count, in nats, and their number: what two models are held against each other by."""
    loss_R, _, _, tokens_R = sums.by_row
    return {"loss": loss_R.tolist(), "tokens": tokens_R.astype(int).tolist()}


def _means(sums_4: np.ndarray) -> Evaluation:
    loss, kl, agree, tokens = sums_4.tolist()
    return Evaluation(loss / tokens, kl / tokens, agree / tokens, int(tokens))


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: list[torch.Tensor]) -> float:
    """Next-token loss alone over batches of rows, nats per predicted token that counts. Raises ValueError where there is none."""
    total, tokens = 0.0, 0
    for rows_BT in batches:
        number = int((next_token_labels(rows_BT) != PADDING).sum())
        total += next_token_objective(model, rows_BT).item() * number
        tokens += number
    check_predicted(tokens)
    return total / tokens
