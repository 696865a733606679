"""A model as what its layers are made of: what the calculators count.

Where the search weighs many architectures of one pattern at once, sizes are numpy arrays; the patterns, windows and numbers of layers are plain.
"""

from dataclasses import dataclass, field

from memory_budget.architecture import LAYER_KINDS, WINDOWED, Architecture
from memory_budget.parts.attention import Attention
from memory_budget.parts.experts import Experts
from memory_budget.parts.feed_forward import FeedForward
from memory_budget.parts.mamba2 import Mamba2
from memory_budget.parts.part import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """layers: (how many, of what), every mixer of the model once · num_layers: as config.json counts them · norms: parameters of the norms around
    mixers and of the last one · embeddings: numbers of further tables of embeddings (positions, per-layer inputs) · positions: tokens that a sequence may have,
    where config.json says · cache_known: whether what its layers keep is; false only for a model_type that no reader knows ·
    notes: what of the config is not counted, a sentence each.
    """

    model_type: str
    vocab: int
    hidden: int
    tied_embeddings: bool
    layers: tuple[tuple[int, Part], ...]
    num_layers: int
    norms: int
    embeddings: int = 0
    positions: int | None = None
    cache_known: bool = True
    notes: tuple[str, ...] = field(default=())

    def count_of(self, kind: str) -> int:
        """Number of mixers that are counted under a kind."""
        return sum(count for count, part in self.layers if part.kind == kind)


def as_model(counted: Architecture | Model) -> Model:
    """An architecture of the search as such a model; a model as it is."""
    if isinstance(counted, Model):
        return counted
    letters = [letter for letter in (*LAYER_KINDS, WINDOWED) if letter in counted.pattern]
    return Model(
        model_type=counted.model_type,
        vocab=counted.vocab,
        hidden=counted.hidden,
        tied_embeddings=counted.tied_embeddings,
        layers=tuple((counted.pattern.count(letter), part_of(counted, letter)) for letter in letters),
        num_layers=counted.num_layers,
        norms=((1 + counted.post_norms) * counted.num_sublayers + 1) * counted.hidden,
    )


def part_of(architecture: Architecture, letter: str) -> Part:
    """The mixer that a letter of the pattern names, with the architecture's sizes."""
    if letter == "M":
        return Mamba2(hidden=architecture.hidden, heads=architecture.mamba_num_heads, head_dim=architecture.mamba_head_dim,
                      groups=architecture.mamba_num_groups, state=architecture.mamba_state_size, conv_kernel=architecture.mamba_conv_kernel,
                      conv_bias=architecture.mamba_conv_bias, projection_bias=architecture.mamba_projection_bias)  # fmt: skip
    if letter in ("*", WINDOWED):
        return Attention(hidden=architecture.hidden, query_heads=architecture.num_attention_heads, key_value_heads=architecture.num_key_value_heads,
                         head_dim=architecture.attention_head_dim, window=architecture.window if letter == WINDOWED else 0,
                         input_bias=architecture.attention_input_bias, output_bias=architecture.attention_output_bias,
                         qk_norms=2 * architecture.attention_head_dim * int(architecture.attention_qk_norm))  # fmt: skip
    if letter == "-":
        return FeedForward(hidden=architecture.hidden, neurons=architecture.ffn, gated=architecture.ffn_gated, bias=architecture.ffn_bias)
    return Experts(hidden=architecture.hidden, experts=architecture.moe_num_experts, experts_per_token=architecture.moe_experts_per_token,
                   neurons=architecture.moe_ffn, gated=architecture.ffn_gated, shared_neurons=architecture.moe_shared_ffn, shared_bias=architecture.ffn_bias,
                   latent=architecture.moe_latent)  # fmt: skip
