"""Mamba or short convolutions among attention: falcon_h1, bamba, jamba, zamba2, lfm2, lfm2_moe. How Mamba-2 is read, granitemoehybrid shares (granite.py).

A missing key means what transformers' (5.23) config class of the model_type means by it, and what its model builds decides.
"""

import json
from collections.abc import Callable
from dataclasses import replace

from memory_budget.configs.stack import counted, experts_per_token, heads, indices, layer_number, layer_types, multiple, plain_attention, positions
from memory_budget.configs.values import Config, boolean, integer
from memory_budget.model import Model
from memory_budget.parts.experts import Experts
from memory_budget.parts.feed_forward import FeedForward
from memory_budget.parts.mamba1 import Mamba1
from memory_budget.parts.mamba2 import Mamba2
from memory_budget.parts.part import Part
from memory_budget.parts.shared import SharedAttention, SharedFeedForward
from memory_budget.parts.short_conv import ShortConv

MAMBA, ATTENTION, HYBRID, CONV = "linear_attention", "full_attention", "hybrid", "conv"
UNTIED_BLOCKS = "shared blocks are counted once; where tie_word_embeddings is false, transformers (5.23) ties none of them and holds one for every use"
# Zamba2-2.7B's layers, which a config that names none has.
ZAMBA2_TYPES = [MAMBA, *[*[MAMBA] * 5, HYBRID] * 7, *[MAMBA] * 4, HYBRID, *[MAMBA] * 3, HYBRID, *[MAMBA] * 2]


def _model(config: Config, parts: list[Part], *, hidden: int, vocab: int, num_layers: int, tied: bool = False, norms: int | None = None) -> Model:
    """By default two norms a layer and one at the end."""
    return Model(
        model_type=config["model_type"],
        vocab=integer(config, "vocab_size", default=vocab),
        hidden=hidden,
        tied_embeddings=boolean(config, "tie_word_embeddings", default=tied),
        layers=counted(parts),
        num_layers=num_layers,
        norms=(2 * num_layers + 1) * hidden if norms is None else norms,
        positions=positions(config),
    )


def mamba2(config: Config, hidden: int, inner: int, says: str, *, gated_norm: bool = True, output_bias: bool | None = None) -> Mamba2:
    """Granite's, Bamba's and Falcon's keys. `inner`: its channels as `says` says; heads times their dim must be as many."""
    num_heads = integer(config, "mamba_n_heads", default=128, least=1)
    multiple(config, (says, inner), ("mamba_n_heads", num_heads))
    given = config.get("mamba_d_head", "auto")
    head_dim = inner // num_heads if given == "auto" else integer(config, "mamba_d_head", default=0, least=1)
    if head_dim * num_heads != inner:
        raise ValueError(f"mamba_n_heads ({num_heads}) times mamba_d_head ({head_dim}) must be {says} ({inner})")
    groups = integer(config, "mamba_n_groups", default=1, least=1)
    multiple(config, ("mamba_n_heads", num_heads), ("mamba_n_groups", groups))
    return Mamba2(hidden=hidden, heads=num_heads, head_dim=head_dim, groups=groups, state=integer(config, "mamba_d_state", default=256, least=1),
                  conv_kernel=integer(config, "mamba_d_conv", default=4, least=1), conv_bias=boolean(config, "mamba_conv_bias", default=True),
                  projection_bias=boolean(config, "mamba_proj_bias", default=False), gated_norm=gated_norm, output_bias=output_bias)  # fmt: skip


def expanded(config: Config, hidden: int) -> int:
    return integer(config, "mamba_expand", default=2, least=1) * hidden


def _mixers(types: list[str], made: dict[str, Callable[[], Part]]) -> list[Part]:
    """The mixer of every layer; of a kind that no layer has, no size is read."""
    parts = {kind: made[kind]() for kind in set(types)}
    return [parts[kind] for kind in types]


def _falcon_h1(config: Config) -> Model:
    """Attention and Mamba-2 in parallel from one norm in every layer, then a feed-forward layer."""
    hidden, num_layers = integer(config, "hidden_size", default=4096, least=1), layer_number(config, default=32)
    expands = config.get("mamba_d_ssm", 1024) is None
    inner = expanded(config, hidden) if expands else integer(config, "mamba_d_ssm", default=1024, least=1)
    mamba = mamba2(config, hidden, inner, "mamba_expand times hidden_size" if expands else "mamba_d_ssm",
                    gated_norm=boolean(config, "mamba_rms_norm", default=False), output_bias=boolean(config, "projectors_bias", default=False))  # fmt: skip
    attention = plain_attention(config, hidden, key_value_heads=8, bias_key="attention_bias")
    parts = [mamba, attention, _feed_forward(config, hidden)]
    return _model(config, parts * num_layers, hidden=hidden, vocab=128000, num_layers=num_layers)


def _feed_forward(config: Config, hidden: int) -> FeedForward:
    return FeedForward(hidden=hidden, neurons=integer(config, "intermediate_size", default=14336), bias=boolean(config, "mlp_bias", default=False))


def _bamba(config: Config) -> Model:
    """Mamba-2, in the layers of attn_layer_indices attention, then a feed-forward layer."""
    hidden, num_layers = integer(config, "hidden_size", default=4096, least=1), layer_number(config, default=32)
    attending = set(indices(config, "attn_layer_indices", num_layers) or ())
    types = [ATTENTION if index in attending else MAMBA for index in range(num_layers)]
    mixers = _mixers(types, {MAMBA: lambda: mamba2(config, hidden, expanded(config, hidden), "mamba_expand times hidden_size"),
                             ATTENTION: lambda: plain_attention(config, hidden, key_value_heads=8, bias_key="attention_bias")})  # fmt: skip
    return _model(config, [*mixers, *[_feed_forward(config, hidden)] * num_layers], hidden=hidden, vocab=128000, num_layers=num_layers)


def _jamba(config: Config) -> Model:
    """Mamba-1, once a period attention; then, once a period of its own, experts, else a feed-forward layer."""
    hidden, num_layers = integer(config, "hidden_size", default=4096, least=1), layer_number(config, default=32)
    neurons = integer(config, "intermediate_size", default=14336)
    attends, has_experts = _periodic(config, "attn_layer", period=8, offset=4), _periodic(config, "expert_layer", period=2, offset=1)
    mixers = _mixers([ATTENTION if attends(index) else MAMBA for index in range(num_layers)],
                     {MAMBA: lambda: _mamba1(config, hidden), ATTENTION: lambda: plain_attention(config, hidden, key_value_heads=8)})  # fmt: skip
    experts = integer(config, "num_local_experts" if "num_local_experts" in config else "num_experts", default=16)
    forward: Part = FeedForward(hidden=hidden, neurons=neurons)
    mixture = forward
    if experts > 1:
        mixture = Experts(hidden=hidden, experts=experts, experts_per_token=experts_per_token(config, default=2, experts=experts), neurons=neurons)
    forwards = [mixture if has_experts(index) else forward for index in range(num_layers)]
    return _model(config, [*mixers, *forwards], hidden=hidden, vocab=65536, num_layers=num_layers)


def _periodic(config: Config, name: str, *, period: int, offset: int) -> Callable[[int], bool]:
    """Whether a layer is one of those that come once a period, from the offset on."""
    period = integer(config, f"{name}_period", default=period, least=1)
    offset = integer(config, f"{name}_offset", default=offset)
    if offset >= period:
        raise ValueError(f"{name}_offset ({offset}) must be below {name}_period ({period})")
    return lambda index: index % period == offset


def _mamba1(config: Config, hidden: int) -> Mamba1:
    rank = -(-hidden // 16) if config.get("mamba_dt_rank", "auto") == "auto" else integer(config, "mamba_dt_rank", default=0)
    return Mamba1(hidden=hidden, inner=expanded(config, hidden), state=integer(config, "mamba_d_state", default=16, least=1), rank=rank,
                  conv_kernel=integer(config, "mamba_d_conv", default=4, least=1), conv_bias=boolean(config, "mamba_conv_bias", default=True),
                  projection_bias=boolean(config, "mamba_proj_bias", default=False))  # fmt: skip


def _zamba2(config: Config) -> Model:
    """Mamba-2 in every layer; in front of it, in hybrid ones, a use of one of num_mem_blocks shared transformer blocks, in turn."""
    hidden, num_layers = integer(config, "hidden_size", default=2560, least=1), layer_number(config, default=54)
    if num_layers != len(ZAMBA2_TYPES) and all(config.get(key) is None for key in ("layers_block_type", "layer_types")):
        raise ValueError(f"num_hidden_layers ({num_layers}) must be {len(ZAMBA2_TYPES)} unless layers_block_type says what they are")
    types = layer_types(config, ("layers_block_type", "layer_types"), (MAMBA, HYBRID), num_layers=num_layers, otherwise=lambda index: ZAMBA2_TYPES[index])
    uses = [index for index, kind in enumerate(types) if kind == HYBRID]
    if indices(config, "hybrid_layer_ids", num_layers) not in (None, uses):
        raise ValueError("hybrid_layer_ids must be the layers that layers_block_type calls hybrid")
    blocks = min(integer(config, "num_mem_blocks", default=1, least=1), len(uses))
    bias = boolean(config, "add_bias_linear", default=False)
    parts: list[Part] = [_zamba2_mamba(config, hidden, bias)] * num_layers
    if uses:
        for reused in [False] * blocks + [True] * (len(uses) - blocks):
            parts += _zamba2_use(config, hidden, bias, reused)
    norms = (num_layers + 3 * blocks + 1) * hidden  # a block's norms are of its inputs, 2·D, and in front of its feed-forward layer, D
    model = _model(config, parts, hidden=hidden, vocab=32000, num_layers=num_layers, tied=True, norms=norms)
    return model if model.tied_embeddings or blocks == len(uses) else replace(model, notes=(UNTIED_BLOCKS,))


def _zamba2_mamba(config: Config, hidden: int, bias: bool) -> Mamba2:
    """Its convolution has a bias whatever use_conv_bias says."""
    num_heads, inner = integer(config, "n_mamba_heads", default=8, least=1), expanded(config, hidden)
    head_dim = integer(config, "mamba_headdim", default=inner // num_heads, least=1)
    if num_heads * head_dim != inner:
        raise ValueError(f"n_mamba_heads ({num_heads}) times mamba_headdim ({head_dim}) must be mamba_expand times hidden_size ({inner})")
    groups = integer(config, "mamba_ngroups", default=1, least=1)
    multiple(config, ("n_mamba_heads", num_heads), ("mamba_ngroups", groups))
    return Mamba2(hidden=hidden, heads=num_heads, head_dim=head_dim, groups=groups, state=integer(config, "mamba_d_state", default=64, least=1),
                  conv_kernel=integer(config, "mamba_d_conv", default=4, least=1), projection_bias=bias)  # fmt: skip


def _zamba2_use(config: Config, hidden: int, bias: bool, reused: bool) -> tuple[SharedAttention, SharedFeedForward]:
    """Attention 2·D wide by default; adapters of q, k and v where asked for, of the feed-forward layer always."""
    queries, keys = heads(config, query_heads=32, key_value_heads=0)
    width = integer(config, "attention_hidden_size", default=2 * hidden)
    if width != 2 * hidden:
        raise ValueError(f"attention_hidden_size ({width}) must be twice hidden_size ({hidden}): the blocks read the stream and the embedding side by side")
    head_dim = integer(config, "head_dim" if "head_dim" in config else "attention_head_dim", default=width // queries, least=1)
    rank = integer(config, "adapter_rank", default=128)
    has_adapters = boolean(config, "use_shared_attention_adapter", default=False)
    neurons = integer(config, "intermediate_size", default=0, null=0) or 4 * hidden
    return (
        SharedAttention(hidden=hidden, query_heads=queries, key_value_heads=keys, head_dim=head_dim, adapter_rank=rank if has_adapters else 0, reused=reused),
        SharedFeedForward(hidden=hidden, neurons=neurons, bias=bias, adapter_rank=rank, reused=reused),
    )


def _lfm2(config: Config) -> Model:
    """Short convolutions, in some layers attention, by layer_types or full_attn_idxs (all); then a feed-forward layer."""
    hidden, num_layers = integer(config, "hidden_size", default=2560, least=1), layer_number(config, default=32)
    attending = indices(config, "full_attn_idxs", num_layers)
    types = layer_types(config, ("layer_types",), (CONV, ATTENTION), num_layers=num_layers,
                        otherwise=lambda index: ATTENTION if attending is None or index in attending else CONV)  # fmt: skip
    forward = FeedForward(hidden=hidden, neurons=_lfm2_neurons(config))
    return _lfm2_model(config, types, [forward] * num_layers, hidden)


def _lfm2_moe(config: Config) -> Model:
    """The same with experts from layer num_dense_layers on. Its router's bias is a buffer, which does not count."""
    hidden, num_layers = integer(config, "hidden_size", default=2048, least=1), layer_number(config, default=32)
    if config.get("layer_types") is None:
        raise ValueError("layer_types is missing from the config: lfm2_moe has no layers by default")
    types = layer_types(config, ("layer_types",), (CONV, ATTENTION), num_layers=num_layers, otherwise=lambda index: CONV)
    dense = min(integer(config, "num_dense_layers", default=2), num_layers)
    forwards: list[Part] = [FeedForward(hidden=hidden, neurons=integer(config, "intermediate_size", default=7168))] * dense
    if dense < num_layers:
        experts = integer(config, "num_experts", default=32, least=1)
        forwards += [Experts(hidden=hidden, experts=experts, experts_per_token=experts_per_token(config, default=4, experts=experts),
                             neurons=integer(config, "moe_intermediate_size", default=1792))] * (num_layers - dense)  # fmt: skip
    return _lfm2_model(config, types, forwards, hidden)


def _lfm2_model(config: Config, types: list[str], forwards: list[Part], hidden: int) -> Model:
    mixers = _mixers(types, {CONV: lambda: ShortConv(hidden=hidden, conv_kernel=integer(config, "conv_L_cache", default=3, least=2),
                                                     bias=boolean(config, "conv_bias", default=False)),
                             ATTENTION: lambda: plain_attention(config, hidden, key_value_heads=8, qk_norm=True)})  # fmt: skip
    tied = boolean(config, "tie_embedding" if "tie_embedding" in config else "tie_word_embeddings", default=True)
    return _model({**config, "tie_word_embeddings": tied}, [*mixers, *forwards], hidden=hidden, vocab=65536, num_layers=len(types))


def _lfm2_neurons(config: Config) -> int:
    """Two thirds of intermediate_size (also block_ff_dim), times block_ffn_dim_multiplier, up to a multiple of block_multiple_of, unless this is turned off."""
    neurons = integer(config, "block_ff_dim" if "block_ff_dim" in config else "intermediate_size", default=12288)
    if not boolean(config, "block_auto_adjust_ff_dim", default=True):
        return neurons
    neurons, factor = int(2 * neurons / 3), config.get("block_ffn_dim_multiplier", 1.0)
    if factor is None:
        return neurons
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 <= factor <= 2**20:
        raise ValueError(f"block_ffn_dim_multiplier ({json.dumps(factor)[:80]}) must be a number from 0 to {2**20:,}")
    step = integer(config, "block_multiple_of", default=256, least=1)
    return -(-int(factor * neurons) // step) * step


MODELS: dict[str, Callable[[Config], Model]] = {
    "falcon_h1": _falcon_h1, "bamba": _bamba, "jamba": _jamba, "zamba2": _zamba2, "lfm2": _lfm2, "lfm2_moe": _lfm2_moe,
}  # fmt: skip
