"""Parameter counts of an architecture, kind by kind, from formulas: no model is built.

Plain arithmetic only, so sizes that are numpy integer arrays pass through and broadcast. The counts equal the
number of elements of transformers' parameters (5.23, `AutoModelForCausalLM.from_config` on the meta device);
tests/memory_budget/test_parameters.py holds them to it. Buffers are not counted: the MoE router's
`e_score_correction_bias`, one number per expert, is a buffer there.

Letters: D hidden · F ffn · V vocabulary · Q query heads, K KV heads, H head dim · M Mamba heads, P head dim,
G groups, N state · E experts.
"""

from dataclasses import dataclass

from memory_budget.architecture import LAYER_KINDS, WINDOWED, Architecture


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Parameters of one layer without the norm in front of it.

    matrices: (copies, outputs, inputs) of each linear projection and of the experts: what a quantiser packs.
    others: the number of all remaining parameters (biases, conv1d, per-head vectors, inner norms, router).
    """

    matrices: tuple[tuple[int, int, int], ...]
    others: int

    @property
    def total(self) -> int:
        return self.others + sum(copies * outputs * inputs for copies, outputs, inputs in self.matrices)


def count_parameters(architecture: Architecture, *, active_only: bool = False) -> dict[str, int]:
    """Parameters by kind: embedding, head, mamba, attention, ffn, moe, norm.

    norm holds the norm in front of every sublayer, the one behind it where there are such, and the final one: (sublayers + 1)·D or
    (2·sublayers + 1)·D. Norms inside a mixer (Mamba's gated norm, attention's q and k norms) count with their mixer. A tied head
    counts 0. With active_only, of the routed experts only those that one token passes through count.
    """
    counts = {
        "embedding": architecture.vocab * architecture.hidden,
        "head": 0 if architecture.tied_embeddings else architecture.vocab * architecture.hidden,
    }
    for letter, kind in LAYER_KINDS.items():
        layer = layer_parameters(architecture, letter, active_only=active_only)
        counts[kind] = architecture.num_layers_of(letter) * layer.total
    counts["norm"] = ((1 + architecture.post_norms) * architecture.num_sublayers + 1) * architecture.hidden
    return counts


def count_total_parameters(architecture: Architecture) -> int:
    """All parameters, each once."""
    return sum(count_parameters(architecture).values())


def count_active_parameters(architecture: Architecture) -> int:
    """Parameters that one token passes through: all but the routed experts it is not sent to. Embedding and head count whole."""
    return sum(count_parameters(architecture, active_only=True).values())


def layer_parameters(architecture: Architecture, letter: str, *, active_only: bool = False) -> LayerParameters:
    """Parameters of one layer of the kind that a letter of a pattern names; of W they are those of *."""
    if letter == "M":
        return _mamba_layer(architecture)
    if letter in ("*", WINDOWED):
        return _attention_layer(architecture)
    if letter == "-":
        return _ffn_layer(architecture)
    assert letter == "E", f"{letter} is no letter of a pattern"
    return _moe_layer(architecture, active_only=active_only)


def _mamba_layer(architecture: Architecture) -> LayerParameters:
    """Mamba-2 mixer (SSD, section 7): in_proj rows z M·P, x M·P, B G·N, C G·N, dt M."""
    heads, inner, channels = architecture.mamba_num_heads, architecture.mamba_inner, architecture.mamba_conv_channels
    projected = inner + channels + heads
    conv = channels * (architecture.mamba_conv_kernel + int(architecture.mamba_conv_bias))
    head_vectors = 3 * heads  # dt_bias, A_log, D
    biases = (projected + architecture.hidden) * int(architecture.mamba_projection_bias)
    return LayerParameters(
        matrices=((1, projected, architecture.hidden), (1, architecture.hidden, inner)),
        others=conv + head_vectors + inner + biases,  # inner: the gated norm's weight
    )


def _attention_layer(architecture: Architecture) -> LayerParameters:
    """Grouped-query attention: q Q·H × D, k and v K·H × D, o D × Q·H."""
    queries = architecture.num_attention_heads * architecture.attention_head_dim
    keys = architecture.num_key_value_heads * architecture.attention_head_dim
    biases = (queries + 2 * keys) * int(architecture.attention_input_bias) + architecture.hidden * int(architecture.attention_output_bias)
    qk_norms = 2 * architecture.attention_head_dim * int(architecture.attention_qk_norm)
    return LayerParameters(
        matrices=((1, queries, architecture.hidden), (2, keys, architecture.hidden), (1, architecture.hidden, queries)),
        others=biases + qk_norms,
    )


def _ffn_layer(architecture: Architecture) -> LayerParameters:
    """Up (and gate) F × D, down D × F."""
    num_inputs = 2 if architecture.ffn_gated else 1
    biases = (num_inputs * architecture.ffn + architecture.hidden) * int(architecture.ffn_bias)
    return LayerParameters(
        matrices=((num_inputs, architecture.ffn, architecture.hidden), (1, architecture.hidden, architecture.ffn)),
        others=biases,
    )


def _moe_layer(architecture: Architecture, *, active_only: bool) -> LayerParameters:
    """NemotronH's MoE: ungated routed experts without bias, in the latent width if there is one; a shared expert; a router E × D.

    The shared expert and the two latent projections have biases where the FFN has them.
    """
    hidden, latent, shared = architecture.hidden, architecture.moe_latent, architecture.moe_shared_ffn
    has_latent = latent > 0
    expert_width = latent * has_latent + hidden * (1 - has_latent)
    experts = architecture.moe_experts_per_token if active_only else architecture.moe_num_experts
    has_shared = shared > 0
    biases = (shared + hidden * has_shared + latent + hidden * has_latent) * int(architecture.ffn_bias)
    return LayerParameters(
        matrices=(
            (experts, architecture.moe_ffn, expert_width),
            (experts, expert_width, architecture.moe_ffn),
            (1, shared, hidden),
            (1, hidden, shared),
            (1, latent, hidden),
            (1, hidden, latent),
        ),
        others=architecture.moe_num_experts * hidden + biases,
    )
