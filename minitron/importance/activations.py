"""Width importance from activations, and block influence: one walk through the layers, every axis at once.

Reduced inside the hooks in float32, so memory is O(width). What is kept are sums over samples, or of experts over the tokens sent to
them, so results of blocks of batches and of processes simply add up.

Letters: B samples of a batch, T tokens, W width of a tap, D hidden; N tokens of all batches, n those sent to an expert, E experts, F neurons of one.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from minitron.checkpoints.placement import PlacedModel, ids_and_mask
from minitron.families.base import EXPERT, EXPERT_FFN, HIDDEN, Tap
from minitron.families.experts import Experts, Routed, experts_of
from minitron.importance.scores import Site, WidthSums


class _Accumulator:
    """Sums over samples for one tap, [4, W]: of the mean |a| over tokens, its square, the L2 over tokens, its square."""

    def __init__(self, tap: Tap, device: torch.device):
        self.tap = tap
        self.sums = torch.zeros(4, tap.width, dtype=torch.float64, device=device)
        self.mask_BT: torch.Tensor | None = None

    def attach(self):
        module = self.tap.module
        if self.tap.side == "input":
            return module.register_forward_pre_hook(lambda _module, args: self.add(args[0]))
        return module.register_forward_hook(lambda _module, _args, output: self.add(output))

    def add(self, activation_BTW: torch.Tensor) -> None:
        size_BTW = activation_BTW[..., self.tap.start : self.tap.start + self.tap.width].abs().float()
        counted_BT = size_BTW.new_ones(size_BTW.shape[:2]) if self.mask_BT is None else self.mask_BT.float()
        # A product with the mask sums over tokens without a copy: a fifth of the time of torch's vector_norm along T.
        means_BW = torch.bmm(counted_BT[:, None], size_BTW)[:, 0] / counted_BT.sum(1, keepdim=True)
        lengths_BW = torch.bmm(counted_BT[:, None], size_BTW.square_())[:, 0].sqrt_()
        both_2BW = torch.stack([means_BW, lengths_BW])
        self.sums += torch.stack([both_2BW.sum(1), both_2BW.square().sum(1)], dim=1).view(4, -1)


class _Watch:
    """Sums over the tokens sent to each expert of a layer: EXPERT_ROWS and NEURON_ROWS of scores.py. What an expert's output is multiplied by is taken as it
    reaches the experts, so it is right for every router."""

    def __init__(self, layer: int, experts: Experts, neurons: int, mask_N: torch.Tensor | None, device: torch.device):
        self.layer, self.experts, self.mask_N = layer, experts, mask_N
        self.sums_3E = torch.zeros(3, len(experts), dtype=torch.float64, device=device)
        self.sums_2EF = torch.zeros(2, len(experts), neurons, dtype=torch.float64, device=device)

    def __enter__(self) -> None:
        self.experts.watch = self.hear

    def __exit__(self, *_) -> None:
        self.experts.watch = None

    def hear(self, routed: Routed) -> None:
        inner_nF, output_nD, weights_n = routed.inner_nF, routed.output_nD, routed.weights_n
        if self.mask_N is not None:
            real_n = self.mask_N[routed.tokens_n]
            inner_nF, output_nD, weights_n = inner_nF[real_n], output_nD[real_n], weights_n[real_n]
        lengths_n = _lengths(output_nD).double()
        self.sums_3E[:, routed.expert] += torch.stack([lengths_n.new_tensor(len(lengths_n)), weights_n.double() @ lengths_n, lengths_n.sum()])
        sizes_nF = inner_nF.abs().float()
        self.sums_2EF[0, routed.expert] += sizes_nF.sum(0)
        self.sums_2EF[1, routed.expert] += sizes_nF.square_().sum(0)

    def add_to(self, found: "_Found") -> None:
        found.add(f"the experts' outputs in layer {self.layer}", (EXPERT, self.layer), self.sums_3E)
        found.add(f"the experts' neurons in layer {self.layer}", (EXPERT_FFN, self.layer), self.sums_2EF)


@torch.no_grad()
def measure_width(model: PlacedModel, batches: Sequence[torch.Tensor], on_layer=lambda: None) -> WidthSums:
    """Sums for every unit of every axis, and each layer's block influence, from batches of ids [B, T] (padding −1).

    All batches walk the layers together, so that each layer is loaded once, and through one with experts as one, so that each expert is. Block influence
    is Σ over tokens of 1 − cos(residual before, residual after), of a layer as config.json counts them. Raises ValueError naming the layer whose
    activations are not finite.
    """
    architecture = model.architecture
    ids_and_masks = [ids_and_mask(batch) for batch in batches]
    masks = [mask for _, mask in ids_and_masks]
    hidden = model.embed([ids for ids, _ in ids_and_masks])
    found = _Found()
    lengths = [_lengths(batch_BTD) for batch_BTD in hidden]
    entered: list[torch.Tensor | None] = []  # what the layer at work was given, of which this may be the second sublayer
    for sublayer, block in model.visit(range(architecture.num_sublayers)):
        layer, part = divmod(sublayer, architecture.sublayers_per_layer)
        entered, is_last = list(hidden) if part == 0 else entered, part == architecture.sublayers_per_layer - 1
        taps, away = model.family.layer_taps(architecture, sublayer, block), torch.zeros((), dtype=torch.float64, device=model.device)
        for index, turned in enumerate(_run_layer(model, sublayer, block, taps, hidden, masks, found)):
            hidden[index] = turned
            if is_last:
                lengths_after = _lengths(turned)
                away += _turned_away(_lengths(turned.float() - entered[index]), lengths[index], lengths_after, masks[index])
                lengths[index], entered[index] = lengths_after, None
        if is_last:
            found.add(f"layer {layer} gives activations that", None, away)
        on_layer()
    with model.open_head() as head:
        tap = Tap(HIDDEN, architecture.num_sublayers, head.norm, "output", 0, (architecture.hidden,))
        for _ in _run_tapped(head.norm, [tap], hidden, masks, found):
            pass
    sums, influence = found.read()
    tokens = sum(ids.numel() if mask is None else int(mask.sum()) for ids, mask in ids_and_masks)
    return WidthSums(sums=sums, block_influence=influence, num_samples=sum(len(ids) for ids, _ in ids_and_masks), num_tokens=tokens)


class _Found:
    """What a walk has summed up, by site, and of each layer how far it turns the residual; on the device until the walk ends, since each look waits for it."""

    def __init__(self):
        self.entries: list[tuple[str, Site | None, torch.Tensor]] = []  # no taps: they would keep streamed layers in memory

    def add(self, title: str, site: Site | None, sums: torch.Tensor) -> None:
        """`title` is said where the sums are not finite; on a CPU, where a look costs nothing, at once."""
        if sums.device.type == "cpu":
            _check_finite(title, sums)
        self.entries.append((title, site, sums))

    def read(self) -> tuple[dict[Site, np.ndarray], np.ndarray]:
        """Sums by site, and block influence [L]."""
        flat = torch.cat([sums.flatten() for _, _, sums in self.entries]).cpu().split([sums.numel() for _, _, sums in self.entries])
        sites, influence = {}, []
        for (title, site, sums), values in zip(self.entries, flat, strict=True):
            _check_finite(title, values)
            if site is None:
                influence.append(values.item())
            else:
                sites[site] = values.view(sums.shape).numpy()
        return sites, np.array(influence)


def _check_finite(title: str, values: torch.Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"scoring: {title} are not finite")


def _run_layer(model: PlacedModel, sublayer: int, block: nn.Module, taps: list[Tap], hidden: list[torch.Tensor], masks: list[torch.Tensor | None],
               found: _Found) -> Iterator[torch.Tensor]:  # fmt: skip
    """Outputs of a layer for every batch, one at a time, while its taps accumulate and its experts are watched; see placement.run_layer."""
    experts = experts_of(block)
    if experts is None:
        yield from _run_tapped(block, taps, hidden, masks, found)
        return
    mask_BT = None
    if any(mask is not None for mask in masks):
        mask_BT = torch.cat([batch.new_ones(batch.shape[:2], dtype=torch.bool) if mask is None else mask for batch, mask in zip(hidden, masks, strict=True)])
    watch = _Watch(sublayer, experts, model.architecture.moe_ffn, None if mask_BT is None else mask_BT.flatten(), model.device)
    with watch:
        (together_BTD,) = _run_tapped(block, taps, [torch.cat(hidden)], [mask_BT], found)
    watch.add_to(found)
    yield from together_BTD.split([len(batch) for batch in hidden])


def _run_tapped(module: nn.Module, taps: list[Tap], hidden: list[torch.Tensor], masks: list[torch.Tensor | None], found: _Found):
    """Outputs of the module for every batch, one at a time, while its taps accumulate."""
    accumulators = [_Accumulator(tap, hidden[0].device) for tap in taps]
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
        found.add(f"the {tap.axis} activations of layer {tap.layer}", (tap.axis, tap.layer), accumulator.sums.view(4, *tap.shape))


def _lengths(vectors_BTD: torch.Tensor) -> torch.Tensor:
    """Length of every token's vector, float32 [B, T]."""
    return torch.linalg.vector_norm(vectors_BTD, dim=-1, dtype=torch.float32)


def _turned_away(step_BT: torch.Tensor, before_BT: torch.Tensor, after_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """Σ over tokens of 1 − cos(before, after), from the lengths of the residual before, after and of the step between.

    1 − cos = (step² − (before − after)²) / (2 · before · after), the law of cosines without its cancellation near cos = 1.
    """
    away_BT = (step_BT.square() - (before_BT - after_BT).square()) / (2 * before_BT * after_BT).clamp_min(1e-30)
    return (away_BT if mask_BT is None else away_BT * mask_BT).sum(dtype=torch.float64)
