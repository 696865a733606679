"""Latent attention before a mixture of experts: deepseek_v2, deepseek_v3.

Numbers and flags that config.json leaves out are those of transformers' (5.23) config class of the type.
"""

from collections.abc import Callable
from functools import partial

from memory_budget.configs.dense import Decoder, heads_of, hidden_of, layers_of, model_of
from memory_budget.configs.mixtures import Mixture, feed_forward_layers
from memory_budget.configs.prediction import prediction_notes
from memory_budget.configs.values import Config, boolean, integer
from memory_budget.model import Model
from memory_budget.parts.latent import LatentAttention


def _latent_attention(config: Config, decoder: Decoder) -> LatentAttention:
    """The attention of a block; q_lora_rank null: queries are read from the stream by one matrix."""
    has_bias = boolean(config, "attention_bias", default=False)
    return LatentAttention(
        hidden=hidden_of(config, decoder),
        heads=heads_of(config, decoder),
        query_rank=integer(config, "q_lora_rank", default=1536, null=0, least=1),
        latent=integer(config, "kv_lora_rank", default=512, least=1),
        plain_dim=integer(config, "qk_nope_head_dim", default=128, least=1),
        rotated_dim=integer(config, "qk_rope_head_dim", default=64, least=1),
        value_dim=integer(config, "v_head_dim", default=128, least=1),
        input_bias=has_bias,
        output_bias=has_bias,
    )


def _read(decoder: Decoder, mixture: Mixture, config: Config) -> Model:
    mixers = [_latent_attention(config, decoder)] * layers_of(config, decoder.layers)
    return model_of(config, decoder, [*mixers, *feed_forward_layers(config, decoder, mixture)], prediction_notes(config))


KINDS = {
    "deepseek_v2": (
        Decoder(hidden=4096, layers=32, heads=32, neurons=11008, vocab=102400, positions=2048, ffn_bias=True),
        Mixture(number_keys=("n_routed_experts", "num_experts"), number=64, per_token=None, neurons=("moe_intermediate_size", 1407),
                shared_number=("n_shared_experts", 2), dense=0),
    ),
    "deepseek_v3": (
        Decoder(hidden=7168, layers=61, heads=128, neurons=18432, vocab=129280, positions=4096),
        Mixture(number_keys=("n_routed_experts", "num_local_experts"), number=256, per_token=8, neurons=("moe_intermediate_size", 2048),
                shared_number=("n_shared_experts", 1), dense=3),
    ),
}  # fmt: skip
MODELS: dict[str, Callable[[Config], Model]] = {name: partial(_read, *kind) for name, kind in KINDS.items()}
