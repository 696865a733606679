"""Depth importance: which layer's removal moves the logits least, asked again after every removal.

One sweep serves all candidates of a round: the intact hidden state walks the layers together with one branch
per layer already skipped, so no prefix is computed twice and a layer's weights are touched once per batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from minitron.families.base import ModelParts


@dataclass(frozen=True, slots=True)
class Removal:
    """One round: the layer that went, its score, and every other layer's score in that round."""

    layer: int
    score: float
    scores: Mapping[int, float]

    def to_json(self) -> dict:
        return asdict(self)


@torch.no_grad()
def rank_by_removal(parts: ModelParts, pattern: str, batches: list[torch.Tensor], *, num_layers: int, floors: Mapping[str, int],
                    normalised: bool = True, on_round: Callable[[Removal], None] = lambda _: None) -> list[Removal]:  # fmt: skip
    """Remove layers one by one until `num_layers` are left; each round drops the one with the lowest score.

    Score of a layer: squared difference between the full model's logits and those without it (and without all
    removed before), summed over tokens and vocabulary; divided by Σ full² when normalised (EL, arXiv 2511.16664),
    else by the number of logits, the mean square (N2, arXiv 2508.14444). A layer of a kind at its floor stays.
    Raises ValueError where the floors forbid that depth or a layer's score is not finite.
    """
    kept, removals = list(range(len(pattern))), []
    while len(kept) > num_layers:
        removable = [layer for layer in kept if sum(pattern[other] == pattern[layer] for other in kept) > floors.get(pattern[layer], 0)]
        if not removable:
            raise ValueError(f"search.floors leaves no layer to remove at {len(kept)} layers; {num_layers} were asked for")
        scores = score_round(parts, kept, removable, batches, normalised=normalised)
        for layer, score in scores.items():
            if not np.isfinite(score):
                raise ValueError(f"scoring: without layer {layer} the logits are not finite")
        lowest = min(removable, key=lambda layer: scores[layer])
        kept.remove(lowest)
        removals.append(Removal(layer=lowest, score=scores[lowest], scores=scores))
        on_round(removals[-1])
    return removals


def score_round(parts: ModelParts, kept: list[int], removable: list[int], batches: list[torch.Tensor], *, normalised: bool) -> dict[int, float]:
    """Score of removing each of `removable` from the layers `kept`, over batches of ids [B, T]."""
    differences = dict.fromkeys(removable, 0.0)
    scale = 0.0
    for ids_BT in batches:
        full_BTV = full_logits(parts, ids_BT)
        scale += full_BTV.double().square().sum().item() if normalised else full_BTV.numel()
        for layer, hidden_BTD in _branches(parts, kept, removable, ids_BT):
            differences[layer] += (parts.logits(hidden_BTD) - full_BTV).double().square().sum().item()
    return {layer: difference / scale for layer, difference in differences.items()}


def full_logits(parts: ModelParts, ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits of the whole model, float32 [B, T, V]."""
    hidden = parts.embed_tokens(ids_BT)
    for layer in range(len(parts.layers)):
        hidden = parts.run_layer(layer, hidden)
    return parts.logits(hidden)


def _branches(parts: ModelParts, kept: list[int], removable: list[int], ids_BT: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Final hidden states [B, T, D] with each removable layer skipped in turn, from one sweep over the kept layers."""
    intact, skipped, branches = parts.embed_tokens(ids_BT), [], None
    for layer in kept:
        stack = intact if branches is None else torch.cat([intact, branches])
        moved = parts.run_layer(layer, stack)
        before, intact, after = intact, moved[: len(ids_BT)], moved[len(ids_BT) :]
        branches = after if skipped else None
        if layer in removable:
            branches = before if branches is None else torch.cat([branches, before])
            skipped.append(layer)
    return list(zip(skipped, branches.split(len(ids_BT)), strict=True))
