"""Gated delta nets (arXiv 2412.06464) as Qwen3-Next and Qwen3.5 have them.

Letters: D hidden · J key heads (also of the queries), K their dim · Y value heads, V their dim; every key head serves Y / J value heads.
"""

from dataclasses import dataclass
from typing import ClassVar

from memory_budget.parts.part import LayerParameters, Part

CHUNK_TOKENS = 64  # of the chunked form: transformers' and flash-linear-attention's


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDelta(Part):
    """Rows q J·K, k J·K, v Y·V, z Y·V, b Y, a Y; a convolution without bias over q, k and v; A_log and dt_bias Y each; a norm of V; out_proj D × Y·V.

    `fused`: q, k, v and z come of one matrix and b and a of another (Qwen3-Next); else q, k and v of one and z, b and a of one each (Qwen3.5).
    """

    kind: ClassVar[str] = "mamba"
    letter: ClassVar[str] = "D"

    hidden: int
    key_heads: int
    key_head_dim: int
    value_heads: int
    value_head_dim: int
    conv_kernel: int
    fused: bool = False

    @property
    def values(self) -> int:
        """Channels of the values, Y·V."""
        return self.value_heads * self.value_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution, q | k | v."""
        return 2 * self.key_heads * self.key_head_dim + self.values

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        channels, values, heads = self.conv_channels, self.values, self.value_heads
        rows = ((1, channels + values), (1, 2 * heads)) if self.fused else ((1, channels), (1, values), (2, heads))
        return LayerParameters(
            matrices=(*((copies, outputs, self.hidden) for copies, outputs in rows), (1, self.hidden, values)),
            others=channels * self.conv_kernel + 2 * heads + self.value_head_dim,
        )

    @property
    def state_numbers(self) -> int:
        """Y·K·V."""
        return self.value_heads * self.key_head_dim * self.value_head_dim

    @property
    def conv_numbers(self) -> int:
        """(2·J·K + Y·V)·(kernel − 1)."""
        return self.conv_channels * (self.conv_kernel - 1)

    def activation_bytes(self, tokens: int, number: int) -> int:
        """2·J·K + 2·Y·V + 2·Y out of the projections, 2·J·K + Y·V out of the convolution, Y·(K + 2·V) of the chunked form (the keys and values with the rule's
        inverse applied, and the new values) and Y·V out of it, and one state Y·K·V per chunk of 64 tokens."""
        projected = self.conv_channels + self.values + 2 * self.value_heads
        chunked = self.value_heads * (self.key_head_dim + 2 * self.value_head_dim) + self.values
        chunks = -(-tokens // CHUNK_TOKENS)
        return (tokens * (projected + self.conv_channels + chunked) + chunks * self.state_numbers) * number
