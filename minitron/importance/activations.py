"""Width importance from activations: one forward pass, every axis at once.

Per sample the mean of |a| over tokens, then the L2 norm over samples: the aggregation that won Minitron's
ablation (MT1, arXiv 2407.14679, table 12). Reduced inside the hook in float32, so memory is O(width).
"""

from collections.abc import Iterable

import torch
from torch import nn

from memory_budget.architecture import Architecture
from minitron.families.base import Family, Tap
from minitron.importance.scores import ImportanceScores


class _Accumulator:
    """Sum over samples of (mean over tokens of |a|)², for one tap."""

    def __init__(self, tap: Tap):
        self.tap = tap
        self.squares = torch.zeros(tap.width, dtype=torch.float64)

    def on_input(self, _module: nn.Module, args: tuple) -> None:
        self.add(args[0])

    def on_output(self, _module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
        self.add(output)

    def add(self, activation_BTW: torch.Tensor) -> None:
        part = activation_BTW[..., self.tap.start : self.tap.start + self.tap.width]
        means_BW = part.abs().mean(dim=1, dtype=torch.float32)
        self.squares += means_BW.double().square().sum(0).cpu()

    def scores(self):
        return self.squares.sqrt().view(self.tap.shape).numpy()


@torch.no_grad()
def score_width(family: Family, model: nn.Module, architecture: Architecture, batches: Iterable[torch.Tensor]) -> ImportanceScores:
    """Importance of every unit of every axis, from batches of ids [B, T] (no padding; one row is one sample).

    Raises ValueError naming the layer whose activations are not finite.
    """
    accumulators = [_Accumulator(tap) for tap in family.taps(model, architecture)]
    handles = [
        item.tap.module.register_forward_pre_hook(item.on_input) if item.tap.side == "input" else item.tap.module.register_forward_hook(item.on_output)
        for item in accumulators
    ]
    model.eval()  # in training mode fused kernels skip some modules, and their hooks with them
    parts = family.parts(model)
    try:
        for ids_BT in batches:
            hidden = parts.embed_tokens(ids_BT)
            for layer in range(len(parts.layers)):
                hidden = parts.run_layer(layer, hidden)
            parts.norm(hidden)
    finally:
        for handle in handles:
            handle.remove()
    for item in accumulators:
        if not torch.isfinite(item.squares).all():
            raise ValueError(f"scoring: the {item.tap.axis} activations of layer {item.tap.layer} are not finite")
    return ImportanceScores(sites={(item.tap.axis, item.tap.layer): item.scores() for item in accumulators})
