"""Mamba-2 (SSD, arXiv 2405.21060, section 7).

Letters: D hidden · M heads, P head dim, G groups, N state.
"""

from dataclasses import dataclass
from typing import ClassVar

from memory_budget.parts.part import SCAN_CHUNK_TOKENS, LayerParameters, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2(Part):
    """in_proj rows z M·P, x M·P, B G·N, C G·N, dt M; a convolution over x, B and C; out_proj D × M·P. `gated_norm`: a norm of M·P channels before it.

    projection_bias: of in_proj · output_bias: of out_proj, None: as projection_bias.
    """

    kind: ClassVar[str] = "mamba"
    letter: ClassVar[str] = "M"

    hidden: int
    heads: int
    head_dim: int
    groups: int
    state: int
    conv_kernel: int
    conv_bias: bool = True
    projection_bias: bool = False
    output_bias: bool | None = None
    gated_norm: bool = True

    @property
    def inner(self) -> int:
        """Channels of the mixer, M·P."""
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution, x | B | C."""
        return self.inner + 2 * self.groups * self.state

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        projected = self.inner + self.conv_channels + self.heads
        conv = self.conv_channels * (self.conv_kernel + int(self.conv_bias))
        head_vectors = 3 * self.heads  # dt_bias, A_log, D
        output_bias = self.projection_bias if self.output_bias is None else self.output_bias
        biases = projected * int(self.projection_bias) + self.hidden * int(output_bias)
        return LayerParameters(
            matrices=((1, projected, self.hidden), (1, self.hidden, self.inner)),
            others=conv + head_vectors + self.inner * int(self.gated_norm) + biases,
        )

    @property
    def state_numbers(self) -> int:
        """M·P·N."""
        return self.inner * self.state

    @property
    def conv_numbers(self) -> int:
        return self.conv_channels * (self.conv_kernel - 1)

    def activation_bytes(self, tokens: int, number: int) -> int:
        """2·M·P + 2·G·N + M out of in_proj, M·P + 2·G·N out of the convolution, M·P out of the scan, and in float32 one state M·P·N per chunk of 128 tokens."""
        projected, chunks = self.inner + self.conv_channels + self.heads, -(-tokens // SCAN_CHUNK_TOKENS)
        return tokens * (projected + self.conv_channels + self.inner) * number + chunks * self.inner * self.state * 4
