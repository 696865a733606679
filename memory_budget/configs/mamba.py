"""Architectures of models with Mamba-2 layers that can be cut: nemotron_h, mamba2.

What transformers (5.23) builds decides: NemotronH's attention has no biases and its embeddings are never tied, whatever the config says. One thing
is read though transformers does not: `attention_head_dim` of older Nemotron-H configs, where head_dim is missing.
"""

from typing import Any

from memory_budget.architecture import LAYER_KINDS, Architecture
from memory_budget.configs.values import Config, boolean, integer

BLOCK_TYPE_LETTERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}


def _nemotron_h(config: Config) -> Architecture:
    num_heads = integer(config, "num_attention_heads", default=32)
    ffn = integer(config, "intermediate_size", default=21504)
    pattern = _nemotron_h_pattern(config)
    return Architecture(
        model_type="nemotron_h",
        pattern=pattern,
        hidden=integer(config, "hidden_size", default=4096),
        vocab=integer(config, "vocab_size", default=131072),
        ffn=ffn,
        ffn_bias=boolean(config, "mlp_bias", default=False),
        num_attention_heads=num_heads,
        num_key_value_heads=integer(config, "num_key_value_heads", default=8, null=num_heads),
        attention_head_dim=_nemotron_h_head_dim(config),
        mamba_num_heads=integer(config, "mamba_num_heads", default=128),
        mamba_head_dim=integer(config, "mamba_head_dim", default=64),
        mamba_num_groups=integer(config, "mamba_n_groups" if "mamba_n_groups" in config else "n_groups", default=8),
        mamba_state_size=integer(config, "ssm_state_size", default=128),
        mamba_conv_kernel=integer(config, "mamba_d_conv" if "mamba_d_conv" in config else "conv_kernel", default=4),
        mamba_conv_bias=boolean(config, "mamba_conv_bias" if "mamba_conv_bias" in config else "use_conv_bias", default=True),
        mamba_projection_bias=boolean(config, "use_bias", default=False),
        **(_nemotron_h_moe(config, ffn) if "E" in pattern else {}),
    )


def _nemotron_h_moe(config: Config, ffn: int) -> dict[str, int]:
    """Sizes of the MoE layers; a dense model has none, whatever its config says."""
    return {
        "moe_num_experts": integer(config, "num_local_experts" if "num_local_experts" in config else "n_routed_experts", default=8),
        "moe_experts_per_token": integer(config, "num_experts_per_tok", default=2),
        "moe_ffn": integer(config, "moe_intermediate_size", default=7688),
        "moe_shared_ffn": integer(config, "moe_shared_expert_intermediate_size", default=7688) or ffn,  # 0 means the FFN's there
        "moe_latent": integer(config, "moe_latent_size", default=0, null=0),
        "moe_groups": integer(config, "n_group", default=1),
        "moe_groups_per_token": integer(config, "topk_group", default=1),
    }


def _nemotron_h_pattern(config: Config) -> str:
    """The pattern string out of hybrid_override_pattern or layers_block_type (alias layer_types), new and old block names."""
    spellings = {}
    if config.get("hybrid_override_pattern") is not None:
        spellings["hybrid_override_pattern"] = str(config["hybrid_override_pattern"])
    for key in ("layers_block_type", "layer_types"):
        if config.get(key) is not None:
            spellings[key] = _pattern_from_block_types(key, config[key])
    if len(set(spellings.values())) > 1:
        said = "; ".join(f"{key} says {pattern}" for key, pattern in spellings.items())
        raise ValueError(f"{' and '.join(spellings)} must agree: {said}")
    pattern = next(iter(spellings.values()), "ME*-")
    num_layers = config.get("num_hidden_layers")
    if num_layers is not None and num_layers != len(pattern):
        raise ValueError(f"num_hidden_layers ({num_layers}) must be the length of the pattern {pattern} ({len(pattern)} layers)")
    return pattern


def _pattern_from_block_types(key: str, block_types: Any) -> str:
    if not isinstance(block_types, list):
        raise ValueError(f"{key} ({block_types!r}) must be a list of block types")
    for block_type in block_types:
        if not isinstance(block_type, str) or block_type not in BLOCK_TYPE_LETTERS:
            raise ValueError(f"{key} holds {block_type!r}; block types are {', '.join(BLOCK_TYPE_LETTERS)}")
    letters = "".join(BLOCK_TYPE_LETTERS[block_type] for block_type in block_types)
    assert set(letters) <= set(LAYER_KINDS)
    return letters


def _nemotron_h_head_dim(config: Config) -> int:
    old = integer(config, "attention_head_dim", default=128)
    new = integer(config, "head_dim", default=old)
    if "attention_head_dim" in config and new != old:
        raise ValueError(f"head_dim ({new}) and attention_head_dim ({old}) must agree")
    return new


def _mamba2(config: Config) -> Architecture:
    hidden = integer(config, "hidden_size", default=4096)
    expand = config.get("expand", 2)
    architecture = Architecture(
        model_type="mamba2",
        pattern="M" * integer(config, "num_hidden_layers", default=64),
        hidden=hidden,
        vocab=integer(config, "vocab_size", default=32768),
        tied_embeddings=boolean(config, "tie_word_embeddings", default=False),
        mamba_num_heads=integer(config, "num_heads", default=128),
        mamba_head_dim=integer(config, "head_dim", default=64),
        mamba_num_groups=integer(config, "n_groups", default=8),
        mamba_state_size=integer(config, "state_size", default=128),
        mamba_conv_kernel=integer(config, "conv_kernel", default=4),
        mamba_conv_bias=boolean(config, "use_conv_bias", default=True),
        mamba_projection_bias=boolean(config, "use_bias", default=False),
    )
    if not isinstance(expand, (int, float)) or hidden * expand != architecture.mamba_inner:
        raise ValueError(f"expand ({expand}) times hidden_size ({hidden}) must equal num_heads times head_dim ({architecture.mamba_inner})")
    return architecture


FAMILIES = {"nemotron_h": _nemotron_h, "mamba2": _mamba2}
