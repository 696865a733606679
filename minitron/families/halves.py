"""The two sublayers of a transformer block as modules of their own, of the block's modules: what a walk runs in a block's stead, bit for bit.

Where a second norm follows a mixer (`post_norm`), what it gives is added to the stream.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.masking_utils import create_sliding_window_causal_mask


class Attention(nn.Module):
    """x + attention(norm(x)), causal, over positions 0 … T−1, within the mixer's window where it has one; [B, T, D] to [B, T, D].

    `make_rotary` makes the module of rotary positions; `by_type` says that it turns each kind of attention by frequencies of its own.
    """

    def __init__(self, norm: nn.Module, mixer: nn.Module, post_norm: nn.Module | None = None, *, make_rotary: Callable[[], nn.Module], by_type: bool = False):
        super().__init__()
        self.norm, self.mixer, self.post_norm = norm, mixer, post_norm
        self._rotary: list[nn.Module] = []  # in a list: no submodule, so no part of the state, and never on the meta device
        self._make_rotary = make_rotary
        self._kind = {"layer_type": mixer.layer_type} if by_type else {}

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, D]."""
        if not self._rotary:
            self._rotary.append(self._make_rotary())
        positions_1T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
        embedded = self._rotary[0](hidden_BTD, position_ids=positions_1T, **self._kind)
        mask = self._mask(hidden_BTD, positions_1T)
        mixed_BTD = self.mixer(hidden_states=self.norm(hidden_BTD), position_embeddings=embedded, attention_mask=mask)[0]
        return hidden_BTD + (mixed_BTD if self.post_norm is None else self.post_norm(mixed_BTD))

    def _mask(self, hidden_BTD: torch.Tensor, positions_1T: torch.Tensor) -> torch.Tensor | None:
        """As the model makes it; None, which is causal, where the window holds all tokens."""
        config = self.mixer.config
        if getattr(self.mixer, "sliding_window", getattr(config, "sliding_window", None)) is None:
            return None
        return create_sliding_window_causal_mask(config, hidden_BTD, attention_mask=None, past_key_values=None, position_ids=positions_1T)


class FeedForward(nn.Module):
    """x + ffn(norm(x)), [B, T, D] to [B, T, D]."""

    def __init__(self, norm: nn.Module, mixer: nn.Module, post_norm: nn.Module | None = None):
        super().__init__()
        self.norm, self.mixer, self.post_norm = norm, mixer, post_norm

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, D]."""
        mixed_BTD = self.mixer(self.norm(hidden_BTD))
        return hidden_BTD + (mixed_BTD if self.post_norm is None else self.post_norm(mixed_BTD))
