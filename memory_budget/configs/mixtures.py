"""Grouped-query attention before a mixture of experts: mixtral, qwen2_moe, olmoe, gpt_oss, glm4_moe. Qwen3-MoE, which can be cut, is in blocks.py.

Numbers and flags that config.json leaves out are those of transformers' (5.23) config class of the type. Buffers are not parameters there: the correction
bias of GLM's and DeepSeek-V3's routers, a number an expert, is not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from memory_budget.configs import windows
from memory_budget.configs.blocks import sparse_blocks
from memory_budget.configs.dense import Decoder, attention_layers, feed_forward_of, hidden_of, layers_of, model_of
from memory_budget.configs.prediction import prediction_notes
from memory_budget.configs.values import Config, boolean, integer
from memory_budget.model import Model
from memory_budget.parts.experts import Experts
from memory_budget.parts.part import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Experts of a type: the keys of its config, and what the class means where they are missing.

    number_keys: keys of the number of experts, the class's own and what other versions of transformers write · neurons: the key of an expert's width and
    its default · shared: of the shared experts' width in all, or with `shared_number` of how many of an expert's width they are · dense: how the layers
    without experts are said: "listed" (mlp_only_layers and decoder_sparse_step) or by first_k_dense_replace, whose default it then is; None: there are none.
    """

    number_keys: tuple[str, ...]
    number: int
    per_token: int | None
    neurons: tuple[str, int]
    shared: tuple[str, int] | None = None
    shared_number: tuple[str, int] | None = None
    shared_gate: bool = False
    bias: bool = False
    router_bias: bool = False
    dense: str | int | None = None


def experts_of(config: Config, mixture: Mixture, *, hidden: int, shared_bias: bool = False) -> Experts:
    """One layer of experts. Raises ValueError where a token would go to more of them than there are."""
    key = number_key(config, mixture)
    number = integer(config, key, default=mixture.number, least=1)
    per_token = integer(config, "num_experts_per_tok", default=mixture.per_token, least=1)
    if per_token > number:
        raise ValueError(f"num_experts_per_tok ({per_token}) must be at most {key} ({number})")
    neurons = integer(config, mixture.neurons[0], default=mixture.neurons[1], least=1)
    shared = 0
    if mixture.shared is not None:
        shared = integer(config, mixture.shared[0], default=mixture.shared[1])
    if mixture.shared_number is not None:
        shared = neurons * integer(config, mixture.shared_number[0], default=mixture.shared_number[1])
    return Experts(hidden=hidden, experts=number, experts_per_token=per_token, neurons=neurons, bias=mixture.bias, router_bias=mixture.router_bias,
                   shared_neurons=shared, shared_gate=mixture.shared_gate, shared_bias=shared_bias)  # fmt: skip


def number_key(config: Config, mixture: Mixture) -> str:
    """The key that says how many experts there are: where both are there, transformers takes the second."""
    return next((key for key in reversed(mixture.number_keys) if key in config), mixture.number_keys[0])


def feed_forward_layers(config: Config, decoder: Decoder, mixture: Mixture) -> list[Part]:
    """Of every block its experts, or the feed-forward layer in their place."""
    has_experts, hidden = layers_with_experts(config, layers_of(config, decoder.layers), mixture), hidden_of(config, decoder)
    dense = None if all(has_experts) else feed_forward_of(config, decoder)
    bias = decoder.ffn_bias and boolean(config, "mlp_bias", default=False)
    experts = experts_of(config, mixture, hidden=hidden, shared_bias=bias) if any(has_experts) else None
    return [experts if one else dense for one in has_experts]


def layers_with_experts(config: Config, num_layers: int, mixture: Mixture) -> list[bool]:
    """Of every block whether it has experts."""
    if mixture.dense is None:
        return [True] * num_layers
    if isinstance(mixture.dense, int):
        first = integer(config, "first_k_dense_replace", default=mixture.dense)
        return [layer >= first for layer in range(num_layers)]
    has_any = config.get(number_key(config, mixture), mixture.number) != 0
    return [has_any and one for one in sparse_blocks(config, num_layers)]


def _read(decoder: Decoder, mixture: Mixture, config: Config) -> Model:
    mixers = [*attention_layers(config, decoder), *feed_forward_layers(config, decoder, mixture)]
    return model_of(config, decoder, mixers, prediction_notes(config))


KINDS = {
    "mixtral": (
        Decoder(hidden=4096, layers=32, heads=32, key_value_heads=8, neurons=14336, vocab=32000, positions=131072, bias=None, within=windows.everywhere),
        Mixture(number_keys=("num_local_experts", "num_experts"), number=8, per_token=2, neurons=("intermediate_size", 14336)),
    ),
    "qwen2_moe": (
        Decoder(hidden=2048, layers=24, heads=16, key_value_heads=16, neurons=5632, vocab=151936, positions=32768, bias=("qkv_bias", True), output_bias=False,
                window=4096, flagged=True, within=windows.every_other_of_the_first),
        Mixture(number_keys=("num_experts",), number=60, per_token=4, neurons=("moe_intermediate_size", 1408),
                shared=("shared_expert_intermediate_size", 5632), shared_gate=True, dense="listed"),
    ),
    "olmoe": (
        Decoder(hidden=2048, layers=16, heads=16, neurons=2048, vocab=50304, positions=4096, qk_norm="all"),
        Mixture(number_keys=("num_experts", "num_local_experts"), number=64, per_token=8, neurons=("intermediate_size", 2048)),
    ),
    "gpt_oss": (
        Decoder(hidden=2880, layers=36, heads=64, key_value_heads=8, head_dim=64, neurons=2880, vocab=201088, positions=131072, bias=("attention_bias", True),
                sinks=True, window=128, within=windows.every_other),
        Mixture(number_keys=("num_local_experts", "num_experts"), number=128, per_token=4, neurons=("intermediate_size", 2880), bias=True, router_bias=True),
    ),
    "glm4_moe": (
        Decoder(hidden=4096, layers=46, heads=96, key_value_heads=8, neurons=10944, vocab=151552, positions=131072, output_bias=False, qk_norm="flagged"),
        Mixture(number_keys=("n_routed_experts", "num_local_experts"), number=128, per_token=8, neurons=("moe_intermediate_size", 1408),
                shared_number=("n_shared_experts", 1), dense=1),
    ),
}  # fmt: skip
MODELS: dict[str, Callable[[Config], Model]] = {name: partial(_read, *kind) for name, kind in KINDS.items()}
