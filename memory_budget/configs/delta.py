"""Gated delta nets, three layers of four, among gated attention: qwen3_next, qwen3_5, qwen3_5_moe and the text configs inside the latter two.

A missing key means what transformers' (5.23) config class of the model_type means by it.
"""

from collections.abc import Callable

from memory_budget.configs.stack import counted, experts_per_token, heads, indices, layer_number, layer_types, multiple, positions
from memory_budget.configs.values import Config, boolean, integer
from memory_budget.model import Model
from memory_budget.parts.attention import Attention
from memory_budget.parts.delta import GatedDelta
from memory_budget.parts.experts import Experts
from memory_budget.parts.feed_forward import FeedForward
from memory_budget.parts.part import Part

DELTA, ATTENTION = "linear_attention", "full_attention"
MTP_KEYS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")


def _qwen3_next(config: Config) -> Model:
    """Experts in every decoder_sparse_step-th layer but those of mlp_only_layers, which have a feed-forward layer."""
    hidden, num_layers = integer(config, "hidden_size", default=2048, least=1), layer_number(config, default=48)
    step, dense = integer(config, "decoder_sparse_step", default=1, least=1), set(indices(config, "mlp_only_layers", num_layers) or ())
    experts = integer(config, "num_experts", default=512)
    sparse = [experts > 0 and index not in dense and (index + 1) % step == 0 for index in range(num_layers)]
    forwards: dict[bool, Part] = {}
    if any(sparse):
        forwards[True] = _experts(config, hidden, experts=experts, chosen=10)
    if not all(sparse):
        forwards[False] = _feed_forward(config, hidden, default=5632)
    return _model(config, [forwards[one] for one in sparse], hidden=hidden, vocab=151936, key_value_heads=2, fused=True)


def _qwen3_5(config: Config) -> Model:
    config = _text(config)
    hidden, num_layers = integer(config, "hidden_size", default=4096, least=1), layer_number(config, default=32)
    forwards = [_feed_forward(config, hidden, default=12288)] * num_layers
    return _model(config, forwards, hidden=hidden, vocab=248320, key_value_heads=4)


def _qwen3_5_moe(config: Config) -> Model:
    config = _text(config)
    hidden, num_layers = integer(config, "hidden_size", default=2048, least=1), layer_number(config, default=40)
    experts = _experts(config, hidden, experts=integer(config, "num_experts", default=256, least=1), chosen=8)
    return _model(config, [experts] * num_layers, hidden=hidden, vocab=248320, key_value_heads=2)


def _text(config: Config) -> Config:
    """The sizes that may stand in a text_config; whether the embeddings are tied is said outside it, as transformers reads it, where it is said there."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    outer = {key: config[key] for key in ("model_type", "tie_word_embeddings") if key in config}
    return {**inner, **outer}


def _feed_forward(config: Config, hidden: int, *, default: int) -> FeedForward:
    return FeedForward(hidden=hidden, neurons=integer(config, "intermediate_size", default=default))


def _experts(config: Config, hidden: int, *, experts: int, chosen: int) -> Experts:
    """`chosen`: the default number of them that a token is sent to."""
    return Experts(hidden=hidden, experts=experts, experts_per_token=experts_per_token(config, default=chosen, experts=experts),
                   neurons=integer(config, "moe_intermediate_size", default=512),
                   shared_neurons=integer(config, "shared_expert_intermediate_size", default=512), shared_gate=True)  # fmt: skip


def _model(config: Config, forwards: list[Part], *, hidden: int, vocab: int, key_value_heads: int, fused: bool = False) -> Model:
    """A delta net or, by layer_types or in every full_attention_interval-th layer, attention; then the layer's experts or feed-forward layer."""
    num_layers, interval = len(forwards), 1
    if config.get("layer_types") is None:
        interval = integer(config, "full_attention_interval", default=4, least=1)
    types = layer_types(config, ("layer_types",), (DELTA, ATTENTION), num_layers=num_layers,
                        otherwise=lambda index: DELTA if (index + 1) % interval else ATTENTION)  # fmt: skip
    made: dict[str, Part] = {}
    if DELTA in types:
        made[DELTA] = _delta(config, hidden, fused)
    if ATTENTION in types:
        made[ATTENTION] = _attention(config, hidden, key_value_heads)
    is_more = any(integer(config, key, default=0, null=0) for key in MTP_KEYS)
    return Model(
        model_type=config["model_type"],
        vocab=integer(config, "vocab_size", default=vocab),
        hidden=hidden,
        tied_embeddings=boolean(config, "tie_word_embeddings", default=False),
        layers=counted([*(made[kind] for kind in types), *forwards]),
        num_layers=num_layers,
        norms=(2 * num_layers + 1) * hidden,
        positions=positions(config),
        notes=("multi-token prediction layers are not counted, as in transformers",) if is_more else (),
    )


def _delta(config: Config, hidden: int, fused: bool) -> GatedDelta:
    keys, values = integer(config, "linear_num_key_heads", default=16, least=1), integer(config, "linear_num_value_heads", default=32, least=1)
    multiple(config, ("linear_num_value_heads", values), ("linear_num_key_heads", keys))
    return GatedDelta(hidden=hidden, key_heads=keys, key_head_dim=integer(config, "linear_key_head_dim", default=128, least=1), value_heads=values,
                      value_head_dim=integer(config, "linear_value_head_dim", default=128, least=1),
                      conv_kernel=integer(config, "linear_conv_kernel_dim", default=4, least=1), fused=fused)  # fmt: skip


def _attention(config: Config, hidden: int, key_value_heads: int) -> Attention:
    """q gives a gate as wide as the output; norms of queries and keys share one weight over the heads."""
    queries, keys = heads(config, query_heads=16, key_value_heads=key_value_heads, may_be_null=False)
    head_dim, bias = integer(config, "head_dim", default=256, least=1), boolean(config, "attention_bias", default=False)
    return Attention(hidden=hidden, query_heads=queries, key_value_heads=keys, head_dim=head_dim, input_bias=bias, output_bias=bias, qk_norms=2 * head_dim,
                     output_gate=True)  # fmt: skip


MODELS: dict[str, Callable[[Config], Model]] = {
    "qwen3_next": _qwen3_next, "qwen3_5": _qwen3_5, "qwen3_5_text": _qwen3_5, "qwen3_5_moe": _qwen3_5_moe, "qwen3_5_moe_text": _qwen3_5_moe,
}  # fmt: skip
