"""Gated short convolutions (LFM2, arXiv 2511.23404): y = C ⊙ conv(B ⊙ x). A convolution is all their memory. Letters: D hidden."""

from dataclasses import dataclass
from typing import ClassVar

from memory_budget.parts.part import LayerParameters, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConv(Part):
    """in_proj 3·D × D (B, C and x), a convolution over the D channels, out_proj D × D; `bias`: of all three."""

    kind: ClassVar[str] = "mamba"
    letter: ClassVar[str] = "C"

    hidden: int
    conv_kernel: int
    bias: bool = False

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        return LayerParameters(
            matrices=((1, 3 * self.hidden, self.hidden), (1, self.hidden, self.hidden)),
            others=self.hidden * (self.conv_kernel + 5 * int(self.bias)),
        )

    @property
    def conv_numbers(self) -> int:
        """D·(kernel − 1)."""
        return self.hidden * (self.conv_kernel - 1)

    def activation_bytes(self, tokens: int, number: int) -> int:
        """3·D out of in_proj, D into the convolution and D out of it."""
        return tokens * 5 * self.hidden * number
