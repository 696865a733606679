"""Depth importance: what the logits lose when a layer is left out, for every layer in one sweep.

The intact hidden state walks the layers together with one branch per layer already skipped, so no prefix is
computed twice, a layer's weights are touched once per block of batches, and branches run as one larger batch.
Logits are compared a few tokens at a time. After a removal, the next round goes on from the states saved
before the removed layer: what a removal did not change is not computed again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from distill.batches import PADDING, counted_positions, split_padding
from distill.losses import next_token_labels
from minitron.checkpoints.placement import Head, PlacedModel
from minitron.importance.routed import asked_once
from minitron.text.samples import check_predicted

CRITERIA = ("mse", "kl", "loss")


@dataclass(frozen=True, slots=True)
class SweepLimits:
    """Bounds on memory: tokens that a layer runs at once (at least one sequence), tokens whose logits exist at once, bytes of saved states."""

    branch_tokens: int = 16384
    logits_tokens: int = 256
    reuse_bytes: int = 2**30


@dataclass(slots=True)
class Block:
    """Batches that walk the layers together, and what is remembered of them between rounds.

    `saved` maps a layer to the branches before it: (layers skipped, per batch the states [1 + branches, B, T, D]).
    """

    batches: list[torch.Tensor]
    full: list[torch.Tensor] | None = None
    saved: dict[int, tuple[tuple[int, ...], list[torch.Tensor]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoundSums:
    """Numerators per layer, and the scale they are divided by; blocks and processes add up."""

    numerators: Mapping[int, float]
    full_squares: float
    logits: float
    tokens: float

    def __add__(self, other: "RoundSums") -> "RoundSums":
        numerators = {layer: value + other.numerators[layer] for layer, value in self.numerators.items()}
        return RoundSums(numerators, self.full_squares + other.full_squares, self.logits + other.logits, self.tokens + other.tokens)

    def scores(self, criterion: str, *, normalised: bool) -> dict[int, float]:
        """mse: Σ(full − ablated)² over Σ full² when normalised (EL, arXiv 2511.16664), else the mean over logits (N2, arXiv
        2508.14444); kl: KL(full ‖ ablated) in nats per token; loss: next-token loss without the layer, nats per token.

        Raises ValueError naming a layer whose score is not finite, and where no token counts.
        """
        check_predicted(self.tokens, "scoring")
        scale = self.tokens if criterion != "mse" else self.full_squares if normalised else self.logits
        found = {layer: value / scale for layer, value in self.numerators.items()}
        for layer, score in found.items():
            if not np.isfinite(score):
                raise ValueError(f"scoring: without layer {layer} the logits are not finite")
        return found


@torch.no_grad()
def measure_round(model: PlacedModel, block: Block, kept: Sequence[int], removable: Sequence[int], criterion: str, limits: SweepLimits) -> RoundSums:
    """What leaving out each of `removable` from the layers `kept` does to the full model's logits, on one block."""
    ids, masks = [split_padding(rows_BT)[0] for rows_BT in block.batches], [_counted(rows_BT, criterion) for rows_BT in block.batches]
    if block.full is None:
        block.full = run_sublayers(model, model.embed(ids), range(model.architecture.num_sublayers))
    skipped, states = _sweep(model, block, ids, list(kept), set(removable), limits)
    with model.open_head() as head:
        return _compare(head, block.full, states, skipped, ids, masks, criterion, limits)


def run_sublayers(model: PlacedModel, hidden: list[torch.Tensor], layers: Sequence[int]) -> list[torch.Tensor]:
    """Hidden states [B, T, D] of every batch after the given sublayers."""
    for _, block in model.visit(layers):
        with asked_once(block, hidden):
            hidden = [block(batch_BTD) for batch_BTD in hidden]
    return hidden


def _sweep(model: PlacedModel, block: Block, ids: list[torch.Tensor], kept: list[int], removable: set[int],
           limits: SweepLimits) -> tuple[list[int], list[torch.Tensor]]:  # fmt: skip
    """Walk the kept layers. Returns (layers skipped, per batch the states [1 + branches, B, T, D], the intact one first)."""
    start, skipped, states = _resume(model, block, ids, kept, removable)
    save_at = _layers_to_save(states, kept, removable, start, limits.reuse_bytes, already=len(block.saved))
    new = sum(layer in removable for layer in kept[start:])
    buffers = [torch.cat([state, state.new_empty(new, *state.shape[1:])]) for state in states]
    size = model.architecture.sublayers_per_layer
    for sublayer, module in model.visit(model.architecture.sublayers_of(kept[start:])):
        layer, part = divmod(sublayer, size)
        used = 1 + len(skipped)
        if part == 0 and layer in save_at:
            block.saved[layer] = (tuple(skipped), [buffer[:used].clone() for buffer in buffers])
        for buffer in buffers:
            if part == 0 and layer in removable:
                buffer[used] = buffer[0]
            for rows in buffer[:used].flatten(0, 1).split(max(1, limits.branch_tokens // buffer.shape[2])):
                rows.copy_(module(rows))
        if part == size - 1 and layer in removable:
            skipped.append(layer)
    return skipped, buffers


def _resume(model: PlacedModel, block: Block, ids: list[torch.Tensor], kept: list[int], removable: set[int]):
    """Position in `kept` to start from, the branches there, and their states: the deepest saved point that still holds.

    A saved point holds where every layer skipped before it is still kept and every one that is removable now was skipped.
    """

    def holds(layer: int) -> bool:
        if layer not in kept:
            return False
        skipped, before = set(block.saved[layer][0]), set(kept[: kept.index(layer)])
        return skipped <= before and before & removable <= skipped

    block.saved = {layer: point for layer, point in block.saved.items() if holds(layer)}
    if not block.saved:
        return 0, [], [state[None] for state in model.embed(ids)]
    deepest = max(block.saved)
    skipped, states = block.saved[deepest]
    rows = [0, *(1 + position for position, layer in enumerate(skipped) if layer in removable)]
    return kept.index(deepest), [layer for layer in skipped if layer in removable], [state[rows] for state in states]


def _layers_to_save(states: list[torch.Tensor], kept: list[int], removable: set[int], start: int, reuse_bytes: int, already: int) -> set[int]:
    """As many layers, evenly spread, as the states before them fit in the bytes given, with those `already` saved."""
    one = sum(state[:1].numel() * state.element_size() for state in states)
    most = one * (1 + len(removable))
    number = min(len(kept) - start, int(reuse_bytes // max(most, 1)) - already)
    if number <= 0:
        return set()
    return {kept[position] for position in np.linspace(start, len(kept) - 1, number + 1).round().astype(int)[1:]}


def _compare(head: Head, full: list[torch.Tensor], states: list[torch.Tensor], skipped: list[int], ids: list[torch.Tensor],
             masks: list[torch.Tensor | None], criterion: str, limits: SweepLimits) -> RoundSums:  # fmt: skip
    sums = torch.zeros(len(skipped) + 1, dtype=torch.float64, device=full[0].device)  # of every branch, and of the full logits' squares
    logits = tokens = 0.0
    for full_BTD, state, ids_BT, mask_BT in zip(full, states, ids, masks, strict=True):
        (rows, positions), targets = _compared(ids_BT, mask_BT, criterion)
        for first in range(0, len(rows), limits.logits_tokens):
            chunk = slice(first, first + limits.logits_tokens)
            full_NV = head.logits(full_BTD[rows[chunk], positions[chunk]])
            if criterion == "mse":
                sums[-1] += torch.linalg.vecdot(full_NV, full_NV).sum(dtype=torch.float64)
            logits += full_NV.numel()
            tokens += len(full_NV)
            log_full = F.log_softmax(full_NV, dim=-1) if criterion == "kl" else None
            branches = state[1:, rows[chunk], positions[chunk]]
            for branch in range(len(skipped)):
                sums[branch] += _distance(criterion, full_NV, log_full, head.logits(branches[branch]), targets[chunk])
    *numerators, squares = sums.tolist()  # the one look at the device
    return RoundSums(dict(zip(skipped, numerators, strict=True)), squares, logits, tokens)


def _counted(rows_BT: torch.Tensor, criterion: str) -> torch.Tensor | None:
    """Which positions' logits count, bool [B, T]: for loss those with a label; None where all tokens do, as far as they have a successor."""
    counted_BT = counted_positions(rows_BT)
    if bool(counted_BT.all()):
        return None
    return next_token_labels(rows_BT) != PADDING if criterion == "loss" else counted_BT


def _compared(ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, criterion: str) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Positions (rows, tokens) whose logits count, of a mask by _counted, and the ids that follow them."""
    following = torch.roll(ids_BT, -1, dims=1)
    if mask_BT is None:  # known without a look at the device
        num_rows, tokens = ids_BT.shape[0], ids_BT.shape[1] - (criterion == "loss")
        places = torch.arange(num_rows * tokens, device=ids_BT.device)
        rows, positions = places // tokens, places % tokens
    else:
        rows, positions = mask_BT.nonzero(as_tuple=True)
    return (rows, positions), following[rows, positions]


def _distance(criterion: str, full_NV, log_full, ablated_NV, targets) -> torch.Tensor:
    """A sum over the tokens, a float64 scalar on their device."""
    if criterion == "mse":
        difference_NV = ablated_NV.sub_(full_NV)
        return torch.linalg.vecdot(difference_NV, difference_NV).sum(dtype=torch.float64)
    log_ablated = F.log_softmax(ablated_NV, dim=-1)
    if criterion == "kl":
        return (log_full.exp() * (log_full - log_ablated)).sum(dtype=torch.float64)
    return -log_ablated.gather(1, targets[:, None]).sum(dtype=torch.float64)
