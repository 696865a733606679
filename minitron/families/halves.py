"""The two sublayers of a transformer block as modules of their own, of the block's modules: what a walk runs in a block's stead, bit for bit.

Where a second norm follows a mixer (`post_norm`), what it gives is added to the stream; where blocks multiply what they add by a number, by as much (`factor`).
Of Granite-4-H, whose model multiplies elsewhere too, the modules that do so in its stead: their tensors and names are as they were.

Letters: B batch, T tokens, N tokens of all rows, K experts of a token, D hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMoE, GraniteMoeHybridRMSNorm

from minitron.families.experts import unstacked


class Attention(nn.Module):
    """x + attention(norm(x)), causal, over positions 0 … T−1, within the mixer's window where it has one; [B, T, D] to [B, T, D].

    `make_rotary` makes the module of rotary positions, None where there are none; `by_type` says that it turns each kind of attention by frequencies of its
    own.
    """

    def __init__(self, norm: nn.Module, mixer: nn.Module, post_norm: nn.Module | None = None, *, make_rotary: Callable[[], nn.Module | None],
                 by_type: bool = False, factor: float = 1.0):  # fmt: skip
        super().__init__()
        self.norm, self.mixer, self.post_norm, self.factor = norm, mixer, post_norm, factor
        self._rotary: list[nn.Module | None] = []  # in a list: no submodule, so no part of the state, and never on the meta device
        self._make_rotary = make_rotary
        self._kind = {"layer_type": mixer.layer_type} if by_type else {}

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, D]."""
        if not self._rotary:
            self._rotary.append(self._make_rotary())
        positions_1T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
        embedded = self._rotary[0] and self._rotary[0](hidden_BTD, position_ids=positions_1T, **self._kind)
        mask = self._mask(hidden_BTD, positions_1T)
        mixed_BTD = self.mixer(hidden_states=self.norm(hidden_BTD), position_embeddings=embedded, attention_mask=mask)[0]
        return hidden_BTD + _times(mixed_BTD if self.post_norm is None else self.post_norm(mixed_BTD), self.factor)

    def _mask(self, hidden_BTD: torch.Tensor, positions_1T: torch.Tensor) -> torch.Tensor | None:
        """As the model makes it; None, which is causal, where the window holds all tokens."""
        config = self.mixer.config
        if getattr(self.mixer, "sliding_window", getattr(config, "sliding_window", None)) is None:
            return None
        return create_sliding_window_causal_mask(config, hidden_BTD, attention_mask=None, past_key_values=None, position_ids=positions_1T)


class FeedForward(nn.Module):
    """x + ffn(norm(x)), [B, T, D] to [B, T, D]; so too with a Mamba-2 mixer or experts in the FFN's place."""

    def __init__(self, norm: nn.Module, mixer: nn.Module, post_norm: nn.Module | None = None, *, factor: float = 1.0):
        super().__init__()
        self.norm, self.mixer, self.post_norm, self.factor = norm, mixer, post_norm, factor

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, D]."""
        mixed_BTD = self.mixer(self.norm(hidden_BTD))
        return hidden_BTD + _times(mixed_BTD if self.post_norm is None else self.post_norm(mixed_BTD), self.factor)


def _times(mixed_BTD: torch.Tensor, factor: float) -> torch.Tensor:
    return mixed_BTD if factor == 1 else mixed_BTD * factor


class MultiplyingEmbedding(nn.Embedding):
    """A table of embeddings whose rows are multiplied by a number once they are looked up."""

    multiplier: float

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """[B, T] to [B, T, D]."""
        return super().forward(ids_BT) * self.multiplier


class DividingNorm(GraniteMoeHybridRMSNorm):
    """The last norm, which divides what it gives by a number: whoever multiplies that by the output matrix has logits that are divided."""

    divisor: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[…, D] to […, D]."""
        return super().forward(hidden_states) / self.divisor


def multiplying(table: nn.Embedding, multiplier: float) -> nn.Embedding:
    """The table itself, which multiplies from here on."""
    if multiplier != 1:
        table.__class__, table.multiplier = MultiplyingEmbedding, multiplier
    return table


def dividing(norm: nn.Module, divisor: float) -> nn.Module:
    """The norm itself, which divides from here on."""
    if divisor != 1:
        norm.__class__, norm.divisor = DividingNorm, divisor
    return norm


def keeping_documents_apart(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """A forward pre-hook of the model without its head: packed rows, whose documents have numbers (`seq_idx`), are given the mask that their positions ask
    for, [B, 1, T, T]. Mamba-2 goes by the numbers."""
    if kwargs.get("seq_idx") is None or kwargs.get("attention_mask") is not None:
        return None
    ids_BT = args[0] if args else kwargs["input_ids"]
    shaped = torch.empty(*ids_BT.shape, 0, dtype=base.norm.weight.dtype, device=ids_BT.device)
    mask = create_causal_mask(base.config, shaped, attention_mask=None, past_key_values=None, position_ids=kwargs["position_ids"])
    return args, kwargs | {"attention_mask": {"full_attention": mask, "linear_attention": None}}


class GatedMixture(GraniteMoeHybridMoE):
    """Experts whose router is called `gate`, as all that look for one expect."""

    def forward(self, layer_input: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, D]."""
        hidden_ND = layer_input.flatten(0, -2)
        _, weights_NK, experts_NK = self.gate(hidden_ND)
        return self.experts(hidden_ND, experts_NK, weights_NK).view(layer_input.shape)


def gated_mixture(mixture: GraniteMoeHybridMoE) -> GatedMixture:
    """The mixture itself, with its experts one by one (experts.py)."""
    if not isinstance(mixture, GatedMixture):
        mixture.__class__, mixture.gate = GatedMixture, mixture._modules.pop("router")
        mixture.experts = unstacked(mixture.experts, gated=True)
    return mixture


class SharedAndExperts(nn.Module):
    """The feed-forward layer of a block, and beside it, where there are any, experts with their router (families/experts.py): modules of the block's."""

    def __init__(self, shared_mlp: nn.Module, mixture: GatedMixture | None):
        super().__init__()
        self.shared_mlp = shared_mlp
        if mixture is not None:
            self.gate, self.experts = mixture.gate, mixture.experts

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, D], added up in the order in which transformers does."""
        if not hasattr(self, "experts"):
            return self.shared_mlp(hidden_BTD)
        hidden_ND = hidden_BTD.flatten(0, -2)
        _, weights_NK, experts_NK = self.gate(hidden_ND)
        return self.experts(hidden_ND, experts_NK, weights_NK).view(hidden_BTD.shape) + self.shared_mlp(hidden_BTD)
