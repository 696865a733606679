"""Mamba-1, the selective scan (arXiv 2312.00752, section 3), as Jamba has it (arXiv 2403.19887): with norms of dt, B and C.

Letters: D hidden · I inner channels · N state · R rank of dt.
"""

from dataclasses import dataclass
from typing import ClassVar

from memory_budget.parts.part import LayerParameters, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba1(Part):
    """in_proj 2·I × D (x and z); a convolution over x; x_proj (R + 2·N) × I; dt_proj I × R with a bias; out_proj D × I; A I × N; D a number a channel.

    `inner_norms`: norms of dt, B and C, R + 2·N parameters.
    """

    kind: ClassVar[str] = "mamba"
    letter: ClassVar[str] = "S"

    hidden: int
    inner: int
    state: int
    rank: int
    conv_kernel: int
    conv_bias: bool = True
    projection_bias: bool = False
    inner_norms: bool = True

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        selected = self.rank + 2 * self.state
        conv = self.inner * (self.conv_kernel + int(self.conv_bias))
        biases = self.inner + (2 * self.inner + self.hidden) * int(self.projection_bias)
        return LayerParameters(
            matrices=((1, 2 * self.inner, self.hidden), (1, selected, self.inner), (1, self.inner, self.rank), (1, self.hidden, self.inner)),
            others=conv + self.inner * (self.state + 1) + selected * int(self.inner_norms) + biases,
        )

    @property
    def state_numbers(self) -> int:
        """I·N."""
        return self.inner * self.state

    @property
    def conv_numbers(self) -> int:
        """I·(kernel − 1)."""
        return self.inner * (self.conv_kernel - 1)

    def activation_bytes(self, tokens: int, number: int) -> int:
        """2·I out of in_proj, R + 2·N out of x_proj, and I each out of the convolution, of dt_proj and of the scan, which keeps its states to itself."""
        return tokens * (5 * self.inner + self.rank + 2 * self.state) * number
