"""Architecture of a Hugging Face config.json: nemotron_h, mamba2, llama, mistral, qwen2, qwen3, gemma3_text.

A missing key means what transformers' (5.23) config class of that model_type means by it. What transformers builds
decides: NemotronH's attention has no biases and its embeddings are never tied, whatever the config says. One thing
is read though transformers does not: `attention_head_dim` of older Nemotron-H configs, where head_dim is missing.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from memory_budget.architecture import LAYER_KINDS, WINDOWED, Architecture, check_architecture

Config = dict[str, Any]

BLOCK_TYPE_LETTERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}
ATTENTION_TYPES = ("full_attention", "sliding_attention")


def read_config(path: str | Path) -> Config:
    """The config dict of a directory that holds config.json, or of a JSON file itself.

    Raises ValueError where there is no such file, or it is not a JSON object.
    """
    file = Path(path)
    try:
        file = file / "config.json" if file.is_dir() else file
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config {file} not found; give a directory that holds config.json, or the file") from None
    except OSError as error:
        raise ValueError(f"config {file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise ValueError(f"config {file} must be JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"config {file} must be a JSON object, not {type(config).__name__}")
    return config


def architecture_from_config(config: Config) -> Architecture:
    """The architecture of a config dict.

    Raises ValueError for a missing or unsupported model_type, values that are no sizes, a pattern spelled in two ways that
    disagree, num_hidden_layers that is not the pattern's length, and what check_architecture refuses.
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise ValueError(f"model_type is missing from the config; supported: {', '.join(FAMILIES)}")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type ({model_type}) is not supported; supported: {', '.join(FAMILIES)}")
    architecture = FAMILIES[model_type](config)
    check_architecture(architecture)
    return architecture


def unmodelled_settings(config: Config) -> list[str]:
    """What the config asks for that the calculator leaves out, a sentence each, for the reader of a report."""
    notes = []
    if config.get("model_type") == "nemotron_h" and config.get("num_nextn_predict_layers"):
        notes.append("multi-token prediction layers are not counted, as in transformers")
    return notes


def _nemotron_h(config: Config) -> Architecture:
    num_heads = _integer(config, "num_attention_heads", default=32)
    ffn = _integer(config, "intermediate_size", default=21504)
    pattern = _nemotron_h_pattern(config)
    return Architecture(
        model_type="nemotron_h",
        pattern=pattern,
        hidden=_integer(config, "hidden_size", default=4096),
        vocab=_integer(config, "vocab_size", default=131072),
        ffn=ffn,
        ffn_bias=_boolean(config, "mlp_bias", default=False),
        num_attention_heads=num_heads,
        num_key_value_heads=_integer(config, "num_key_value_heads", default=8, null=num_heads),
        attention_head_dim=_nemotron_h_head_dim(config),
        mamba_num_heads=_integer(config, "mamba_num_heads", default=128),
        mamba_head_dim=_integer(config, "mamba_head_dim", default=64),
        mamba_num_groups=_integer(config, "mamba_n_groups" if "mamba_n_groups" in config else "n_groups", default=8),
        mamba_state_size=_integer(config, "ssm_state_size", default=128),
        mamba_conv_kernel=_integer(config, "mamba_d_conv" if "mamba_d_conv" in config else "conv_kernel", default=4),
        mamba_conv_bias=_boolean(config, "mamba_conv_bias" if "mamba_conv_bias" in config else "use_conv_bias", default=True),
        mamba_projection_bias=_boolean(config, "use_bias", default=False),
        **(_nemotron_h_moe(config, ffn) if "E" in pattern else {}),
    )


def _nemotron_h_moe(config: Config, ffn: int) -> dict[str, int]:
    """Sizes of the MoE layers; a dense model has none, whatever its config says."""
    return {
        "moe_num_experts": _integer(config, "num_local_experts" if "num_local_experts" in config else "n_routed_experts", default=8),
        "moe_experts_per_token": _integer(config, "num_experts_per_tok", default=2),
        "moe_ffn": _integer(config, "moe_intermediate_size", default=7688),
        "moe_shared_ffn": _integer(config, "moe_shared_expert_intermediate_size", default=7688) or ffn,  # 0 means the FFN's there
        "moe_latent": _integer(config, "moe_latent_size", default=0, null=0),
        "moe_groups": _integer(config, "n_group", default=1),
        "moe_groups_per_token": _integer(config, "topk_group", default=1),
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
    old = _integer(config, "attention_head_dim", default=128)
    new = _integer(config, "head_dim", default=old)
    if "attention_head_dim" in config and new != old:
        raise ValueError(f"head_dim ({new}) and attention_head_dim ({old}) must agree")
    return new


def _mamba2(config: Config) -> Architecture:
    hidden = _integer(config, "hidden_size", default=4096)
    expand = config.get("expand", 2)
    architecture = Architecture(
        model_type="mamba2",
        pattern="M" * _integer(config, "num_hidden_layers", default=64),
        hidden=hidden,
        vocab=_integer(config, "vocab_size", default=32768),
        tied_embeddings=_boolean(config, "tie_word_embeddings", default=False),
        mamba_num_heads=_integer(config, "num_heads", default=128),
        mamba_head_dim=_integer(config, "head_dim", default=64),
        mamba_num_groups=_integer(config, "n_groups", default=8),
        mamba_state_size=_integer(config, "state_size", default=128),
        mamba_conv_kernel=_integer(config, "conv_kernel", default=4),
        mamba_conv_bias=_boolean(config, "use_conv_bias", default=True),
        mamba_projection_bias=_boolean(config, "use_bias", default=False),
    )
    if not isinstance(expand, (int, float)) or hidden * expand != architecture.mamba_inner:
        raise ValueError(f"expand ({expand}) times hidden_size ({hidden}) must equal num_heads times head_dim ({architecture.mamba_inner})")
    return architecture


def _llama(config: Config) -> Architecture:
    has_bias = _boolean(config, "attention_bias", default=False)
    return _transformer(config, vocab=32000, ffn=11008, key_value_heads=None, input_bias=has_bias, output_bias=has_bias,
                        ffn_bias=_boolean(config, "mlp_bias", default=False))


def _mistral(config: Config) -> Architecture:
    """One window for all layers, or none."""
    window = _window(config, default=4096)
    return _transformer(config, vocab=32000, ffn=14336, key_value_heads=8, windowed=[window > 0] * _num_blocks(config, default=32), window=window)


def _qwen2(config: Config) -> Architecture:
    return _transformer(config, vocab=151936, ffn=22016, key_value_heads=32, input_bias=True, **_qwen_windows(config))


def _qwen3(config: Config) -> Architecture:
    has_bias = _boolean(config, "attention_bias", default=False)
    return _transformer(config, vocab=151936, ffn=22016, key_value_heads=32, head_dim=128, input_bias=has_bias, output_bias=has_bias,
                        qk_norm=True, **_qwen_windows(config))


def _qwen3_moe(config: Config) -> Architecture:
    """Experts in every block, but where mlp_only_layers and decoder_sparse_step say otherwise. A window, where there is one, is that of all layers."""
    has_bias, num_blocks = _boolean(config, "attention_bias", default=False), _num_blocks(config, default=24)
    window = _window(config, default=4096) if _boolean(config, "use_sliding_window", default=False) else 0
    listed, step = config.get("mlp_only_layers") or [], _integer(config, "decoder_sparse_step", default=1)
    if not isinstance(listed, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in listed):
        raise ValueError(f"mlp_only_layers ({json.dumps(listed)[:80]}) must be a list of layers by number")
    if step < 1:
        raise ValueError(f"decoder_sparse_step ({step}) must be at least 1")
    number = _integer(config, "num_local_experts" if "num_local_experts" in config else "num_experts", default=128)
    with_experts = [number > 0 and block not in listed and (block + 1) % step == 0 for block in range(num_blocks)]
    architecture = _transformer(config, hidden=2048, vocab=151936, ffn=6144, key_value_heads=4, input_bias=has_bias, output_bias=has_bias, qk_norm=True,
                                windowed=[window > 0] * num_blocks, window=window, with_experts=with_experts)
    experts = {"moe_num_experts": number, "moe_experts_per_token": _integer(config, "num_experts_per_tok", default=8),
               "moe_ffn": _integer(config, "moe_intermediate_size", default=768)}
    return replace(architecture, **experts if any(with_experts) else {})


def _qwen_windows(config: Config) -> dict[str, Any]:
    """By layer_types, else in the layers from max_window_layers on; none at all unless use_sliding_window says so."""
    window = _window(config, default=4096) if _boolean(config, "use_sliding_window", default=False) else 0
    first, num_blocks = _integer(config, "max_window_layers", default=28), _num_blocks(config, default=32)
    return {"windowed": _windowed(config, num_blocks, [window > 0 and block >= first for block in range(num_blocks)]), "window": window}


def _gemma3_text(config: Config) -> Architecture:
    """Windows in five layers of six, or as layer_types says; a norm before and one behind every mixer."""
    has_bias, num_blocks = _boolean(config, "attention_bias", default=False), _num_blocks(config, default=26)
    period = _integer(config, "sliding_window_pattern", default=6, null=6 if config.get("layer_types") is None else 1)
    if period < 1:
        raise ValueError(f"sliding_window_pattern ({period}) must be at least 1")
    windowed = _windowed(config, num_blocks, [(block + 1) % period > 0 for block in range(num_blocks)])
    return _transformer(config, hidden=2304, num_heads=8, num_blocks=26, vocab=262208, ffn=9216, key_value_heads=4, head_dim=256, tied=True,
                        input_bias=has_bias, output_bias=has_bias, qk_norm=True, windowed=windowed, window=_window(config, default=4096), post_norms=True)


def _num_blocks(config: Config, *, default: int) -> int:
    return _integer(config, "num_hidden_layers", default=default)


def _window(config: Config, *, default: int) -> int:
    """Tokens that a query sees in a layer with a window; 0 for none. Raises ValueError for a window of no tokens, or of 1.

    Of the tokens before it transformers' cache keeps `[-window + 1 :]`, which under a window of 1 is all of them.
    """
    window = _integer(config, "sliding_window", default=default, null=0)
    if window < 2 and config.get("sliding_window", default) is not None:
        raise ValueError(f"sliding_window ({window}) must be at least 2 tokens, or null for no window")
    return window


def _windowed(config: Config, num_blocks: int, otherwise: list[bool]) -> list[bool]:
    """Of every block, whether its attention is within the window: as layer_types says. Raises ValueError where that does not fit the layers."""
    types = config.get("layer_types")
    if types is None:
        return otherwise
    if not isinstance(types, list) or len(types) != num_blocks:
        entries = f"{len(types)} entries" if isinstance(types, list) else json.dumps(types)
        raise ValueError(f"layer_types ({entries}) must have an entry for each of the {num_blocks} layers that num_hidden_layers says")
    if unknown := [one for one in types if one not in ATTENTION_TYPES]:
        raise ValueError(f"layer_types holds {json.dumps(unknown[0])}; kinds of attention are {' and '.join(ATTENTION_TYPES)}")
    return [one == "sliding_attention" for one in types]


def _transformer(
    config: Config,
    *,
    hidden: int = 4096,
    num_heads: int = 32,
    num_blocks: int = 32,
    vocab: int,
    ffn: int,
    key_value_heads: int | None,
    head_dim: int | None = None,
    input_bias: bool = False,
    output_bias: bool = False,
    ffn_bias: bool = False,
    qk_norm: bool = False,
    tied: bool = False,
    windowed: list[bool] | None = None,
    window: int = 0,
    post_norms: bool = False,
    with_experts: list[bool] | None = None,
) -> Architecture:
    """Llama's kind: attention and gated FFN in turn. The numbers are the family's defaults; None means derived as below.

    `windowed` says of every block whether its attention is within the window, `with_experts` whether it has experts in place of an FFN; None: none is, none has.
    """
    hidden = _integer(config, "hidden_size", default=hidden)
    num_heads = _integer(config, "num_attention_heads", default=num_heads)
    if num_heads < 1:
        raise ValueError(f"num_attention_heads ({num_heads}) must be at least 1")
    num_blocks = _num_blocks(config, default=num_blocks)
    per_head, windowed, with_experts = hidden // num_heads, windowed or [False] * num_blocks, with_experts or [False] * num_blocks
    if any(windowed) and not window:
        raise ValueError("layer_types holds sliding_attention, but there is no window: sliding_window, and with Qwen use_sliding_window, must say one")
    return Architecture(
        model_type=config["model_type"],
        pattern="".join((WINDOWED if near else "*") + ("E" if moe else "-") for near, moe in zip(windowed, with_experts, strict=True)),
        hidden=hidden,
        vocab=_integer(config, "vocab_size", default=vocab),
        tied_embeddings=_boolean(config, "tie_word_embeddings", default=tied),
        ffn=_integer(config, "intermediate_size", default=ffn),
        ffn_gated=True,
        ffn_bias=ffn_bias,
        num_attention_heads=num_heads,
        num_key_value_heads=_integer(config, "num_key_value_heads", default=key_value_heads or num_heads, null=num_heads),
        attention_head_dim=_integer(config, "head_dim", default=head_dim or per_head, null=per_head),
        attention_input_bias=input_bias,
        attention_output_bias=output_bias,
        attention_qk_norm=qk_norm,
        window=window if any(windowed) else 0,
        post_norms=post_norms,
    )


def _integer(config: Config, key: str, *, default: int, null: int | None = None) -> int:
    """The value of a size; default where the key is missing, null (if null may be said) where it is null."""
    value = config.get(key, default)
    if value is None and null is not None:
        return null
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise ValueError(f"{key} ({json.dumps(value)[:80]}) must be a whole number of at least 0, and below 2**53")
    return value


def _boolean(config: Config, key: str, *, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} ({json.dumps(value)}) must be true or false")
    return value


FAMILIES = {
    "nemotron_h": _nemotron_h, "mamba2": _mamba2, "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe,
    "gemma3_text": _gemma3_text,
}  # fmt: skip
