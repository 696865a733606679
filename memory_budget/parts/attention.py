"""Grouped-query attention: every K query heads share a key and a value head. Windows, chunks, sinks, norms of queries and keys, a gate on the output.

Letters: D hidden · Q query heads, K KV heads, H head dim, V the value heads' own dim.
"""

from dataclasses import dataclass
from typing import ClassVar

from memory_budget.parts.part import LayerParameters, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(Part):
    """q Q·H × D, k and v K·H × D, o D × Q·H.

    window: tokens that a query sees, its own among them (0: all) · shares_cache: keys and values are another layer's; it has no k and v of its own ·
    keys_are_values: one projection makes both · output_gate: q gives a gate for every channel of the output too · qk_norms: parameters of norms of queries
    and keys in all · sinks: one number a query head.
    """

    kind: ClassVar[str] = "attention"
    letter: ClassVar[str] = "*"

    hidden: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    window: int = 0
    input_bias: bool = False
    output_bias: bool = False
    qk_norms: int = 0
    sinks: bool = False
    output_gate: bool = False
    shares_cache: bool = False
    keys_are_values: bool = False

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        queries, keys = self.query_heads * self.head_dim, self.key_value_heads * self.head_dim
        read = queries * (1 + self.output_gate)
        copies = 0 if self.shares_cache else 2 - self.keys_are_values
        biases = (read + copies * keys) * int(self.input_bias) + self.hidden * int(self.output_bias)
        return LayerParameters(
            matrices=((1, read, self.hidden), (copies, keys, self.hidden), (1, self.hidden, queries)),
            others=biases + self.qk_norms + self.query_heads * int(self.sinks),
        )

    @property
    def kept_tokens(self) -> int | None:
        """Within a window the last window − 1, which with the next one are those that it sees: so do the tensors of transformers' (5.23) DynamicCache."""
        if self.shares_cache:
            return 0
        return self.window - 1 if self.window else None

    @property
    def cache_numbers_per_token(self) -> int:
        """Keys and values: 2·K·H."""
        return 0 if self.shares_cache else 2 * self.key_value_heads * self.head_dim

    def activation_bytes(self, tokens: int, number: int) -> int:
        """(Q + 2·K)·H from q, k, v and Q·H out of the attention, whose scores are never whole."""
        return tokens * (2 * self.query_heads + 2 * self.key_value_heads) * self.head_dim * number
