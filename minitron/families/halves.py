"""The two sublayers of a transformer block as modules of their own, of the block's modules: what a walk runs in a block's stead, bit for bit."""

from collections.abc import Callable

import torch
from torch import nn


class Attention(nn.Module):
    """x + attention(norm(x)), causal, over positions 0 … T−1; [B, T, D] to [B, T, D]."""

    def __init__(self, norm: nn.Module, mixer: nn.Module, make_rotary: Callable[[], nn.Module]):
        super().__init__()
        self.norm, self.mixer = norm, mixer
        self._rotary: list[nn.Module] = []  # in a list: no submodule, so no part of the state, and never on the meta device
        self._make_rotary = make_rotary

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, D]."""
        if not self._rotary:
            self._rotary.append(self._make_rotary())
        positions_1T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
        embedded = self._rotary[0](hidden_BTD, position_ids=positions_1T)
        return hidden_BTD + self.mixer(hidden_states=self.norm(hidden_BTD), position_embeddings=embedded, attention_mask=None)[0]


class FeedForward(nn.Module):
    """x + ffn(norm(x)), [B, T, D] to [B, T, D]."""

    def __init__(self, norm: nn.Module, mixer: nn.Module):
        super().__init__()
        self.norm, self.mixer = norm, mixer

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, D]."""
        return hidden_BTD + self.mixer(self.norm(hidden_BTD))
