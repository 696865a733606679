"""A model_type that no reader knows: parameters from the headers of its safetensors files, the cache from the config's keys where they suffice."""

from memory_budget.configs.values import Config, integer, shown
from memory_budget.model import Model
from memory_budget.parts.unknown import AssumedCache, Tensors
from memory_budget.sources.safetensors import TensorSizes, sizes_of

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "embeddings.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")
# That say of a cache what grouped-query attention keeping every token does not.
OTHER_CACHES = ("kv_lora_rank", "sliding_window", "attention_chunk_size", "num_kv_shared_layers", "layer_types", "layers_block_type", "block_types",
                "hybrid_override_pattern", "ssm_state_size", "state_size", "mamba_d_state", "attn_layer_period", "linear_num_key_heads", "conv_L_cache",
                "num_key_value_heads_per_layer", "block_configs", "full_attention_interval", "is_encoder_decoder", "rescale_every", "attn_type_list",
                "time_mix_extra_dim", "num_global_layers", "global_attn_every_n_layers", "attention_window", "lru_width")  # fmt: skip


def unknown_model(config: Config, tensors: TensorSizes) -> Model:
    """The model as far as it is known; `Model.cache_known` says whether its cache is. Raises ValueError for values that are no sizes."""
    sizes, notes = sizes_of(tensors, config)
    embedding = next((size for name, size in sizes.items() if name.endswith(EMBEDDINGS) and len(size.shape) == 2), None)
    head = next((size for name, size in sizes.items() if name.endswith(HEADS) and len(size.shape) == 2 and size is not embedding), None)
    vocab, hidden = embedding.shape if embedding else (0, 0)
    tied = embedding is None or head is None or head.shape != embedding.shape
    rest = [size for size in sizes.values() if size is not embedding and (tied or size is not head)]
    matrices = tuple(size.matrix for size in rest if len(size.shape) in (2, 3))
    others = sum(size.numbers for size in rest if len(size.shape) not in (2, 3))
    layers, why = _cache(config)
    said = f"model_type ({shown(config.get('model_type'))}) is not known: parameters are counted from the headers of its safetensors files"
    return Model(
        model_type=shown(config.get("model_type")),
        vocab=vocab,
        hidden=hidden,
        tied_embeddings=tied,
        layers=((1, Tensors(matrices=matrices, others=others)), *layers),
        num_layers=layers[0][0] if layers else 0,
        norms=0,
        cache_known=bool(layers),
        notes=(said, *notes, why),
    )


def _cache(config: Config) -> tuple[tuple[tuple[int, AssumedCache], ...], str]:
    """Layers with an assumed cache and the assumption in words, or nothing and why."""
    odd = [key for key in OTHER_CACHES if config.get(key) not in (None, False, 0, "", [])]
    if odd:
        return (), f"the cache is not known: {odd[0]} ({shown(config[odd[0]])}) says of it what is not read for this model_type"
    needed = ("num_hidden_layers", "num_attention_heads") + (() if config.get("head_dim") is not None else ("hidden_size",))
    if missing := [key for key in needed if config.get(key) is None]:
        return (), f"the cache is not known: the config does not say {', '.join(missing)}"
    num_layers, heads = (integer(config, key, default=0, least=1) for key in ("num_hidden_layers", "num_attention_heads"))
    key_value_heads = integer(config, "num_key_value_heads", default=heads, null=heads, least=1)
    has_own = config.get("head_dim") is not None
    head_dim = integer(config, "head_dim", default=0, least=1) if has_own else integer(config, "hidden_size", default=0, least=1) // heads
    whence = "head_dim" if has_own else "hidden_size / num_attention_heads"
    cache = ((num_layers, AssumedCache(key_value_heads=key_value_heads, head_dim=head_dim)),)
    return cache, (f"the cache is an assumption: {num_layers:,} layers, all of them attention that keeps every token, "
                   f"{key_value_heads:,} key and value heads of {head_dim:,} ({whence})")  # fmt: skip
