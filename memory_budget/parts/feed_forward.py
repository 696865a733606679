"""Feed-forward layers, gated or not. Letters: D hidden · F neurons."""

from dataclasses import dataclass
from typing import ClassVar

from memory_budget.parts.part import LayerParameters, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward(Part):
    """Up (and gate) F × D, down D × F."""

    kind: ClassVar[str] = "ffn"
    letter: ClassVar[str] = "-"

    hidden: int
    neurons: int
    gated: bool = True
    bias: bool = False

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        inputs = 2 if self.gated else 1
        biases = (inputs * self.neurons + self.hidden) * int(self.bias)
        return LayerParameters(matrices=((inputs, self.neurons, self.hidden), (1, self.hidden, self.neurons)), others=biases)

    def activation_bytes(self, tokens: int, number: int) -> int:
        """2·F: before and after the activation function; gated 3·F, gate and up before it."""
        return tokens * (3 if self.gated else 2) * self.neurons * number
