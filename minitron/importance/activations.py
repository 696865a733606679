"""Width importance from activations, and block influence: one walk through the layers, every axis at once.

Reduced inside the hooks in float32, so memory is O(width). What is kept are sums over samples, so results of
blocks of batches and of processes simply add up.

Letters: B samples of a batch, T tokens, W width of a tap, D hidden.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from minitron.families.base import HIDDEN, Tap
from minitron.importance.placement import PlacedModel, ids_and_mask
from minitron.importance.scores import WidthSums


class _Accumulator:
    """Sums over samples for one tap, [4, W]: of the mean |a| over tokens, its square, the L2 over tokens, its square."""

    def __init__(self, tap: Tap):
        self.tap = tap
        self.sums = torch.zeros(4, tap.width, dtype=torch.float64)
        self.mask_BT: torch.Tensor | None = None

    def attach(self):
        module = self.tap.module
        if self.tap.side == "input":
            return module.register_forward_pre_hook(lambda _module, args: self.add(args[0]))
        return module.register_forward_hook(lambda _module, _args, output: self.add(output))

    def add(self, activation_BTW: torch.Tensor) -> None:
        part = activation_BTW[..., self.tap.start : self.tap.start + self.tap.width]
        tokens = part.shape[1] if self.mask_BT is None else self.mask_BT.sum(1, keepdim=True)
        size_BTW = part.abs().float() if self.mask_BT is None else part.abs().float() * self.mask_BT[..., None]
        means_BW = size_BTW.sum(1) / tokens  # sum and in-place square: a fifth of the time of torch's vector_norm along T
        both_2BW = torch.stack([means_BW, size_BTW.square_().sum(1).sqrt_()])
        self.sums += torch.stack([both_2BW.sum(1), both_2BW.square().sum(1)], dim=1).view(4, -1).cpu()


@torch.no_grad()
def measure_width(model: PlacedModel, batches: Sequence[torch.Tensor], on_layer=lambda: None) -> WidthSums:
    """Sums for every unit of every axis, and each layer's block influence, from batches of ids [B, T] (padding −1).

    All batches walk the layers together, so that each layer is loaded once. Block influence is Σ over tokens of
    1 − cos(residual before, residual after). Raises ValueError naming the layer whose activations are not finite.
    """
    architecture = model.architecture
    ids_and_masks = [ids_and_mask(batch) for batch in batches]
    masks = [mask for _, mask in ids_and_masks]
    hidden = model.embed([ids for ids, _ in ids_and_masks])
    sums: dict[tuple[str, int], np.ndarray] = {}
    squares = [_squares(batch_BTD) for batch_BTD in hidden]
    influence = np.zeros(architecture.num_layers)
    for layer, block in model.visit(range(architecture.num_layers)):
        taps = model.family.layer_taps(architecture, layer, block)
        for index, turned in enumerate(_run_tapped(block, taps, hidden, masks, sums)):
            squares_after = _squares(turned)
            influence[layer] += _turned_away(hidden[index], turned, squares[index] * squares_after, masks[index])
            hidden[index], squares[index] = turned, squares_after
        if not np.isfinite(influence[layer]):
            raise ValueError(f"scoring: layer {layer} gives activations that are not finite")
        on_layer()
    with model.open_head() as head:
        tap = Tap(HIDDEN, architecture.num_layers, head.norm, "output", 0, (architecture.hidden,))
        for _ in _run_tapped(head.norm, [tap], hidden, masks, sums):
            pass
    tokens = sum(ids.numel() if mask is None else int(mask.sum()) for ids, mask in ids_and_masks)
    return WidthSums(sums=sums, block_influence=influence, num_samples=sum(len(ids) for ids, _ in ids_and_masks), num_tokens=tokens)


def _run_tapped(module: nn.Module, taps: list[Tap], hidden: list[torch.Tensor], masks: list[torch.Tensor | None], sums: dict):
    """Outputs of the module for every batch, one at a time, while its taps accumulate into `sums`."""
    accumulators = [_Accumulator(tap) for tap in taps]
    handles = [accumulator.attach() for accumulator in accumulators]
    try:
        for batch_BTD, mask in zip(hidden, masks, strict=True):
            for accumulator in accumulators:
                accumulator.mask_BT = mask
            yield module(batch_BTD)
    finally:
        for handle in handles:
            handle.remove()
    for accumulator in accumulators:
        tap = accumulator.tap
        if not torch.isfinite(accumulator.sums).all():
            raise ValueError(f"scoring: the {tap.axis} activations of layer {tap.layer} are not finite")
        sums[tap.axis, tap.layer] = accumulator.sums.view(4, *tap.shape).numpy()


def _squares(hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Squared length of every token's residual, float32 [B, T]."""
    hidden = hidden_BTD.float()
    return torch.linalg.vecdot(hidden, hidden)


def _turned_away(before_BTD: torch.Tensor, after_BTD: torch.Tensor, squares_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> float:
    """Σ over tokens of 1 − cos(before, after), in float32 per token; `squares_BT` is the product of both squared lengths."""
    away_BT = 1 - torch.linalg.vecdot(before_BTD.float(), after_BTD.float()) * squares_BT.clamp_min(1e-30).rsqrt_()
    return (away_BT if mask_BT is None else away_BT * mask_BT).sum(dtype=torch.float64).item()
