"""Architectures of transformer blocks that can be cut, attention and FFN or experts: llama, mistral, qwen2, qwen3, qwen3_moe, gemma3_text."""

from dataclasses import replace
from typing import Any

from memory_budget.architecture import WINDOWED, Architecture
from memory_budget.configs.stack import indices
from memory_budget.configs.values import Config, boolean, integer
from memory_budget.configs.windows import window_of, windowed_layers


def _llama(config: Config) -> Architecture:
    has_bias = boolean(config, "attention_bias", default=False)
    return transformer(config, vocab=32000, ffn=11008, key_value_heads=None, input_bias=has_bias, output_bias=has_bias,
                       ffn_bias=boolean(config, "mlp_bias", default=False))


def _mistral(config: Config) -> Architecture:
    """One window for all layers, or none."""
    window = window_of(config, default=4096)
    return transformer(config, vocab=32000, ffn=14336, key_value_heads=8, windowed=[window > 0] * _num_blocks(config, default=32), window=window)


def _qwen2(config: Config) -> Architecture:
    return transformer(config, vocab=151936, ffn=22016, key_value_heads=32, input_bias=True, **_qwen_windows(config))


def _qwen3(config: Config) -> Architecture:
    has_bias = boolean(config, "attention_bias", default=False)
    return transformer(config, vocab=151936, ffn=22016, key_value_heads=32, head_dim=128, input_bias=has_bias, output_bias=has_bias,
                       qk_norm=True, **_qwen_windows(config))


def _qwen3_moe(config: Config) -> Architecture:
    """Experts in every block, but where mlp_only_layers and decoder_sparse_step say otherwise. A window, where there is one, is that of all layers."""
    has_bias, num_blocks = boolean(config, "attention_bias", default=False), _num_blocks(config, default=24)
    window = window_of(config, default=4096) if boolean(config, "use_sliding_window", default=False) else 0
    number = integer(config, "num_local_experts" if "num_local_experts" in config else "num_experts", default=128)
    with_experts = [number > 0 and one for one in sparse_blocks(config, num_blocks)]
    architecture = transformer(config, hidden=2048, vocab=151936, ffn=6144, key_value_heads=4, input_bias=has_bias, output_bias=has_bias, qk_norm=True,
                               windowed=[window > 0] * num_blocks, window=window, with_experts=with_experts)
    experts = {"moe_num_experts": number, "moe_experts_per_token": integer(config, "num_experts_per_tok", default=8),
               "moe_ffn": integer(config, "moe_intermediate_size", default=768)}
    return replace(architecture, **experts if any(with_experts) else {})


def sparse_blocks(config: Config, num_blocks: int) -> list[bool]:
    """Of every block whether it may have experts: every decoder_sparse_step-th, but for those that mlp_only_layers names. Raises ValueError."""
    step, dense = integer(config, "decoder_sparse_step", default=1, least=1), indices(config, "mlp_only_layers", num_blocks) or ()
    return [block not in dense and (block + 1) % step == 0 for block in range(num_blocks)]


def _qwen_windows(config: Config) -> dict[str, Any]:
    """By layer_types, else in the layers from max_window_layers on; none at all unless use_sliding_window says so."""
    window = window_of(config, default=4096) if boolean(config, "use_sliding_window", default=False) else 0
    first, num_blocks = integer(config, "max_window_layers", default=28), _num_blocks(config, default=32)
    return {"windowed": windowed_layers(config, num_blocks, [window > 0 and block >= first for block in range(num_blocks)]), "window": window}


def _gemma3_text(config: Config) -> Architecture:
    """Windows in five layers of six, or as layer_types says; a norm before and one behind every mixer."""
    has_bias, num_blocks = boolean(config, "attention_bias", default=False), _num_blocks(config, default=26)
    period = integer(config, "sliding_window_pattern", default=6, null=6 if config.get("layer_types") is None else 1, least=1)
    windowed = windowed_layers(config, num_blocks, [(block + 1) % period > 0 for block in range(num_blocks)])
    return transformer(config, hidden=2304, num_heads=8, num_blocks=26, vocab=262208, ffn=9216, key_value_heads=4, head_dim=256, tied=True,
                       input_bias=has_bias, output_bias=has_bias, qk_norm=True, windowed=windowed, window=window_of(config, default=4096), post_norms=True)


def _num_blocks(config: Config, *, default: int) -> int:
    return integer(config, "num_hidden_layers", default=default)


def transformer(
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

    `windowed` says of every block whether its attention is within the window, `with_experts` whether it has experts in place of an FFN; None: of none.
    """
    hidden = integer(config, "hidden_size", default=hidden)
    num_heads = integer(config, "num_attention_heads", default=num_heads, least=1)
    num_blocks = _num_blocks(config, default=num_blocks)
    per_head, windowed, with_experts = hidden // num_heads, windowed or [False] * num_blocks, with_experts or [False] * num_blocks
    if any(windowed) and not window:
        raise ValueError("layer_types holds sliding_attention, but there is no window: sliding_window, and with Qwen use_sliding_window, must say one")
    return Architecture(
        model_type=config["model_type"],
        pattern="".join((WINDOWED if near else "*") + ("E" if moe else "-") for near, moe in zip(windowed, with_experts, strict=True)),
        hidden=hidden,
        vocab=integer(config, "vocab_size", default=vocab),
        tied_embeddings=boolean(config, "tie_word_embeddings", default=tied),
        ffn=integer(config, "intermediate_size", default=ffn),
        ffn_gated=True,
        ffn_bias=ffn_bias,
        num_attention_heads=num_heads,
        num_key_value_heads=integer(config, "num_key_value_heads", default=key_value_heads or num_heads, null=num_heads),
        attention_head_dim=integer(config, "head_dim", default=head_dim or per_head, null=per_head),
        attention_input_bias=input_bias,
        attention_output_bias=output_bias,
        attention_qk_norm=qk_norm,
        window=window if any(windowed) else 0,
        post_norms=post_norms,
    )


FAMILIES = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe, "gemma3_text": _gemma3_text}
