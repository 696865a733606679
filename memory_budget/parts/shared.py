"""Zamba2's transformer blocks (arXiv 2411.15242): a few are used in turn by many layers, each use with adapters and a cache of its own.

A use of a block is a mixer. The first use of each has the block's parameters, `reused` ones only what is theirs alone: parameters count once, caches every
time.
Letters: D hidden · Q query heads, K KV heads, H head dim · F neurons · R rank of the adapters.
"""

from dataclasses import dataclass

from memory_budget.parts.attention import Attention
from memory_budget.parts.feed_forward import FeedForward
from memory_budget.parts.part import LayerParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedAttention(Attention):
    """Attention that reads the stream and the token's embedding side by side, 2·D, and writes D. Each use has adapters R × 2·D and 2·D × R on q, k and v,
    or none (adapter_rank 0)."""

    adapter_rank: int = 0
    reused: bool = False

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        inputs, queries, keys = 2 * self.hidden, self.query_heads * self.head_dim, self.key_value_heads * self.head_dim
        block = () if self.reused else ((1, queries, inputs), (2, keys, inputs), (1, self.hidden, queries))
        return LayerParameters(matrices=(*block, (3, self.adapter_rank, inputs), (3, inputs, self.adapter_rank)), others=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFeedForward(FeedForward):
    """A gated feed-forward layer. Each use has an adapter R × D and 2·F × R on gate and up, and a matrix D × D behind."""

    adapter_rank: int
    reused: bool = False

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        own = ((1, self.adapter_rank, self.hidden), (1, 2 * self.neurons, self.adapter_rank), (1, self.hidden, self.hidden))
        if self.reused:
            return LayerParameters(matrices=own, others=0)
        block = FeedForward.parameters(self)
        return LayerParameters(matrices=(*block.matrices, *own), others=block.others)
