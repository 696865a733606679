"""Architecture of Granite-4-H (granitemoehybrid), which can be cut: blocks of Mamba-2 or attention, then a feed-forward layer or experts with a shared one.

What transformers (5.23) builds decides. Sizes of a kind of mixer that no layer has are not read: hidden size decides what they must be.
"""

from typing import Any

from memory_budget.architecture import Architecture
from memory_budget.configs.hybrids import ATTENTION, MAMBA, expanded, mamba2
from memory_budget.configs.stack import experts_per_token, heads, layer_number, layer_types, plain_attention
from memory_budget.configs.values import Config, boolean, integer


def _granite(config: Config) -> Architecture:
    """Without experts the shared one alone is the feed-forward layer."""
    hidden, num_layers = integer(config, "hidden_size", default=4096, least=1), layer_number(config, default=32)
    types = layer_types(config, ("layer_types", "layers_block_type"), (MAMBA, ATTENTION), num_layers=num_layers, otherwise=lambda _index: MAMBA)
    shared, experts = integer(config, "shared_intermediate_size", default=1024), integer(config, "num_local_experts", default=8, null=0)
    return Architecture(
        model_type="granitemoehybrid",
        pattern="".join(("M" if kind == MAMBA else "*") + ("E" if experts else "-") for kind in types),
        hidden=hidden,
        vocab=integer(config, "vocab_size", default=32000),
        tied_embeddings=boolean(config, "tie_word_embeddings", default=False),
        ffn=0 if experts else shared,
        ffn_gated=True,
        **_attention(config, hidden, some=ATTENTION in types),
        **(_mamba(config, hidden) if MAMBA in types else {}),
        **(_experts(config, experts, shared) if experts else {}),
    )


def _attention(config: Config, hidden: int, *, some: bool) -> dict[str, Any]:
    """Checked where there is any."""
    if not some:
        queries = integer(config, "num_attention_heads", default=32, least=1)
        keys = integer(config, "num_key_value_heads", default=queries, null=queries)
        return {"num_attention_heads": queries, "num_key_value_heads": keys, "attention_head_dim": hidden // queries}
    queries, keys = heads(config, query_heads=32, key_value_heads=0)
    part = plain_attention(config, hidden, key_value_heads=0, bias_key="attention_bias")
    return {"num_attention_heads": queries, "num_key_value_heads": keys, "attention_head_dim": part.head_dim, "attention_input_bias": part.input_bias,
            "attention_output_bias": part.output_bias}  # fmt: skip


def _mamba(config: Config, hidden: int) -> dict[str, Any]:
    part = mamba2(config, hidden, expanded(config, hidden), "mamba_expand times hidden_size")
    return {"mamba_num_heads": part.heads, "mamba_head_dim": part.head_dim, "mamba_num_groups": part.groups, "mamba_state_size": part.state,
            "mamba_conv_kernel": part.conv_kernel, "mamba_conv_bias": part.conv_bias, "mamba_projection_bias": part.projection_bias}  # fmt: skip


def _experts(config: Config, experts: int, shared: int) -> dict[str, int]:
    return {"moe_num_experts": experts, "moe_experts_per_token": experts_per_token(config, default=2, experts=experts),
            "moe_ffn": integer(config, "intermediate_size", default=11008), "moe_shared_ffn": shared}  # fmt: skip


FAMILIES = {"granitemoehybrid": _granite}
