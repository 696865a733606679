"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values of all heads are read out of one latent of a token.

Letters: D hidden · Q heads · R rank of queries, L of the latent · N and P dims of a head's key without and with positions, V of its values.
"""

from dataclasses import dataclass
from typing import ClassVar

from memory_budget.parts.part import LayerParameters, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention(Part):
    """q R × D and Q·(N + P) × R, or Q·(N + P) × D where query_rank is 0; latent and shared key with positions (L + P) × D; keys and values Q·(N + V) × L;
    o D × Q·V. A norm over R and one over L. input_bias: of what reads D but for a q without a rank.
    """

    kind: ClassVar[str] = "attention"
    letter: ClassVar[str] = "*"

    hidden: int
    heads: int
    query_rank: int
    latent: int
    plain_dim: int
    rotated_dim: int
    value_dim: int
    input_bias: bool = False
    output_bias: bool = False

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        queries, kept, rank = self.heads * (self.plain_dim + self.rotated_dim), self.latent + self.rotated_dim, self.query_rank
        reading = ((1, rank, self.hidden), (1, queries, rank)) if rank else ((1, queries, self.hidden),)
        return LayerParameters(
            matrices=(
                *reading,
                (1, kept, self.hidden),
                (1, self.heads * (self.plain_dim + self.value_dim), self.latent),
                (1, self.hidden, self.heads * self.value_dim),
            ),
            others=rank + self.latent + (rank + kept) * int(self.input_bias) + self.hidden * int(self.output_bias),
        )

    @property
    def kept_tokens(self) -> int | None:
        return None

    @property
    def cache_numbers_per_token(self) -> int:
        """L + P: the latent after its norm and the shared key with positions, once for all heads. So keep transformers (5.23: the latent is the layer's
        `keys`, the shared key its `values`) and engines that read it without spreading it, such as vLLM."""
        return self.latent + self.rotated_dim

    @property
    def spread_numbers_per_token(self) -> int:
        """Q·(N + P + V): whole keys and values of every head, what software keeps that has no form of this attention for the latent itself."""
        return self.heads * (self.plain_dim + self.rotated_dim + self.value_dim)

    def activation_bytes(self, tokens: int, number: int) -> int:
        """R + Q·(N + P) of queries, L + P that is kept, Q·(N + V) spread out of it, Q·(N + P) keys put together, Q·V out of the attention, whose scores are
        never whole."""
        made = self.query_rank + self.latent + self.rotated_dim
        return tokens * (made + self.heads * (3 * self.plain_dim + 2 * self.rotated_dim + 2 * self.value_dim)) * number
