"""Grouped-query attention before a feed-forward layer, block by block: gemma2, gemma3, granite, phi3, olmo2, smollm3, nemotron, cohere2.

Every type is a `Decoder`, its differences as data; mixtures of experts (mixtures.py) and latent attention (latent.py) are built of the same pieces. Numbers
and flags that config.json leaves out are those of transformers' (5.23) config class of the type.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from memory_budget.configs import windows
from memory_budget.configs.values import Config, boolean, integer
from memory_budget.hf_config import architecture_from_config
from memory_budget.model import Model, as_model
from memory_budget.parts.attention import Attention
from memory_budget.parts.feed_forward import FeedForward
from memory_budget.parts.part import Part

MOST_LAYERS = 100_000  # far above any model, and few enough to be listed one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """What a type is made of, and what its config class means by a key that is missing.

    key_value_heads, head_dim: None for as many as query heads, and for hidden / heads · bias: the key of the biases of q, k and v and its default;
    output_bias: whether o has one with them · ffn_bias: whether mlp_bias is read · qk_norm: "head" for a norm over each head ("flagged": where use_qk_norm
    says so), "all" for one over all of them at once · norms: vectors of norms around the mixers of a block; norm_biases: a norm has a bias too ·
    window: the default of sliding_window; flagged: there is none unless use_sliding_window · within: the layers that have it, where layer_types does not say.
    """

    hidden: int
    layers: int
    heads: int
    neurons: int
    vocab: int
    positions: int
    key_value_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    bias: tuple[str, bool] | None = ("attention_bias", False)
    output_bias: bool = True
    ffn_bias: bool = False
    gated: bool = True
    qk_norm: str = ""
    sinks: bool = False
    norms: int = 2
    norm_biases: bool = False
    window: int | None = None
    flagged: bool = False
    within: windows.Rule = windows.nowhere


def hidden_of(config: Config, decoder: Decoder) -> int:
    return integer(config, "hidden_size", default=decoder.hidden, least=1)


def layers_of(config: Config, default: int) -> int:
    """Number of blocks. Raises ValueError, also where there are more than any model has."""
    number = integer(config, "num_hidden_layers", default=default, least=1)
    if number > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers ({number}) must be at most {MOST_LAYERS}")
    return number


def heads_of(config: Config, decoder: Decoder) -> int:
    return integer(config, "num_attention_heads", default=decoder.heads, least=1)


def attention_layers(config: Config, decoder: Decoder) -> list[Part]:
    """The attention of every block. Raises ValueError for sizes that do not fit each other, and windows that are not said."""
    hidden, heads = hidden_of(config, decoder), heads_of(config, decoder)
    key_value_heads = integer(config, "num_key_value_heads", default=decoder.key_value_heads or heads, null=heads, least=1)
    if heads % key_value_heads:
        raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({key_value_heads})")
    per_head = hidden // heads
    head_dim = integer(config, "head_dim", default=decoder.head_dim or per_head, null=per_head)
    if head_dim < 1:
        raise ValueError(f"head_dim ({head_dim}; without the key hidden_size / num_attention_heads) must be at least 1")
    has_bias = decoder.bias is not None and boolean(config, decoder.bias[0], default=decoder.bias[1])
    full = Attention(hidden=hidden, query_heads=heads, key_value_heads=key_value_heads, head_dim=head_dim, sinks=decoder.sinks, input_bias=has_bias,
                     output_bias=has_bias and decoder.output_bias,
                     qk_norms=_norms_of_queries_and_keys(config, decoder.qk_norm, heads, key_value_heads) * head_dim)  # fmt: skip
    num_layers = layers_of(config, decoder.layers)
    window = 0 if decoder.flagged and not boolean(config, "use_sliding_window", default=False) else windows.window_of(config, default=decoder.window)
    has_always = decoder.window is not None and not decoder.flagged
    has_window = windows.windowed_layers(config, num_layers, decoder.within(config, num_layers) if window or has_always else [False] * num_layers)
    if any(has_window) and not window:
        off = ", use_sliding_window is not true" if decoder.flagged else ""
        raise ValueError(f"sliding_window ({json.dumps(config.get('sliding_window'))}{off}) must say a window: layers have sliding_attention by layer_types")
    windowed = replace(full, window=window)
    return [windowed if one else full for one in has_window]


def _norms_of_queries_and_keys(config: Config, qk_norm: str, heads: int, key_value_heads: int) -> int:
    """How many heads wide the two norms are together."""
    if qk_norm == "all":
        return heads + key_value_heads
    return 2 if qk_norm == "head" or (qk_norm == "flagged" and boolean(config, "use_qk_norm", default=False)) else 0


def feed_forward_of(config: Config, decoder: Decoder) -> FeedForward:
    """The feed-forward layer, without experts."""
    return FeedForward(hidden=hidden_of(config, decoder), neurons=integer(config, "intermediate_size", default=decoder.neurons, least=1),
                       gated=decoder.gated, bias=decoder.ffn_bias and boolean(config, "mlp_bias", default=False))  # fmt: skip


def model_of(config: Config, decoder: Decoder, mixers: Sequence[Part], notes: tuple[str, ...] = ()) -> Model:
    """The model that has these mixers, counted by kind, between embeddings, norms and head."""
    hidden, num_layers = hidden_of(config, decoder), layers_of(config, decoder.layers)
    return Model(
        model_type=config["model_type"],
        vocab=integer(config, "vocab_size", default=decoder.vocab, least=1),
        hidden=hidden,
        tied_embeddings=boolean(config, "tie_word_embeddings", default=decoder.tied),
        layers=tuple((number, part) for part, number in Counter(mixers).items()),
        num_layers=num_layers,
        norms=(decoder.norms * num_layers + 1) * hidden * (1 + decoder.norm_biases),
        positions=integer(config, "max_position_embeddings", default=decoder.positions, least=1),
        notes=notes,
    )


def _read(decoder: Decoder, config: Config) -> Model:
    attention = attention_layers(config, decoder)
    return model_of(config, decoder, [*attention, *[feed_forward_of(config, decoder)] * len(attention)])


def _gemma3(config: Config) -> Model:
    """The language model, whose sizes are in text_config. Whether its head is tied, the outer config says."""
    text = config.get("text_config")
    if text is None:
        text = {}
    if not isinstance(text, dict):
        raise ValueError(f"text_config ({json.dumps(text)[:80]}) must be an object with the sizes of the language model")
    layers_of(text, 26)  # before they are listed
    tied = boolean(config, "tie_word_embeddings", default=True)
    model = as_model(architecture_from_config({**text, "model_type": "gemma3_text", "tie_word_embeddings": tied}))
    return replace(model, model_type="gemma3", positions=integer(text, "max_position_embeddings", default=131072, least=1),
                   notes=("only the language model is counted: not the vision tower (vision_config) and its projector",))  # fmt: skip


DECODERS = {
    "gemma2": Decoder(hidden=2304, layers=26, heads=8, key_value_heads=4, head_dim=256, neurons=9216, vocab=256000, positions=8192, tied=True, norms=4,
                      window=4096, within=windows.every_other),
    "granite": Decoder(hidden=4096, layers=32, heads=32, neurons=11008, vocab=32000, positions=2048, ffn_bias=True),
    "phi3": Decoder(hidden=3072, layers=32, heads=32, neurons=8192, vocab=32064, positions=4096, bias=None, within=windows.everywhere),
    "olmo2": Decoder(hidden=4096, layers=32, heads=32, neurons=11008, vocab=50304, positions=2048, qk_norm="all"),
    "smollm3": Decoder(hidden=2048, layers=36, heads=16, key_value_heads=4, neurons=11008, vocab=128256, positions=32768, tied=True, ffn_bias=True,
                       within=windows.layers_without_rotation),
    "nemotron": Decoder(hidden=6144, layers=32, heads=48, neurons=24576, vocab=256000, positions=4096, ffn_bias=True, gated=False, norm_biases=True),
    "cohere2": Decoder(hidden=8192, layers=40, heads=64, neurons=22528, vocab=256000, positions=8192, tied=True, norms=1, window=4096,
                       within=windows.all_but_the_last_of_a_pattern),
}  # fmt: skip
MODELS: dict[str, Callable[[Config], Model]] = {**{name: partial(_read, decoder) for name, decoder in DECODERS.items()}, "gemma3": _gemma3}
