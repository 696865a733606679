"""What is known of a model whose type no reader knows: the shapes of its tensors, and what its config says of its cache."""

from dataclasses import dataclass
from typing import ClassVar

from memory_budget.parts.part import LayerParameters, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors(Part):
    """Parameters by the shapes that the headers of safetensors files give; `matrices` as in `LayerParameters`."""

    kind: ClassVar[str] = "other"
    letter: ClassVar[str] = "?"

    matrices: tuple[tuple[int, int, int], ...]
    others: int

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        return LayerParameters(matrices=self.matrices, others=self.others)

    def activation_bytes(self, tokens: int, number: int) -> int:
        """Not known; nothing is counted."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AssumedCache(Part):
    """The cache of one layer if its attention is grouped-query attention that keeps every token: 2·K·H a token. It has no parameters of its own here."""

    kind: ClassVar[str] = "other"
    letter: ClassVar[str] = "?"

    key_value_heads: int
    head_dim: int

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        return LayerParameters(matrices=(), others=0)

    @property
    def kept_tokens(self) -> None:
        """All."""
        return

    @property
    def cache_numbers_per_token(self) -> int:
        return 2 * self.key_value_heads * self.head_dim

    def activation_bytes(self, tokens: int, number: int) -> int:
        return 0
