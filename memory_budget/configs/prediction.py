"""Multi-token prediction: the layers behind a model's last that guess tokens further ahead, as a model of their own.

A layer is a block like the model's, with what joins the stream and the embedding of the token before it: a matrix 2·D → D, which no published format packs, and
norms of both and of the output. transformers (5.23) loads none of it; the tensors are those of vLLM 0.32.0 (vllm/model_executor/models: deepseek_mtp.py,
glm4_moe_mtp.py, qwen3_next_mtp.py, qwen3_5_mtp.py, nemotron_h_mtp.py), for GLM-4.5 held to the checkpoint's published sum.
"""

from memory_budget.configs.values import Config, integer, shown
from memory_budget.model import Model
from memory_budget.parts.part import Part

KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
MOST_LAYERS = 64
OWN_TABLES = ("deepseek_v3", "glm4_moe")  # each layer is stored with an embedding, a head and what joins them
JOINED_ONCE = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")  # the layers follow one another; tables are the model's
KNOWN = (*OWN_TABLES, *JOINED_ONCE, "nemotron_h")


def prediction_notes(config: Config) -> tuple[str, ...]:
    """What is said of layers that predict tokens further ahead, where the config has some."""
    number = next((config[key] for key in KEYS if config.get(key)), 0)
    return (f"multi-token prediction layers ({shown(number)[:20]}) are not counted, as in transformers",) if number else ()


def prediction_model(config: Config, model: Model, *, shared_tables: bool) -> Model:
    """The prediction layers of a config, whose model is given, as a model.

    shared_tables: embedding and head are the model's even where the checkpoint has them once more, as in vLLM. Raises ValueError where the config names no such
    layers or what they are made of is not known.
    """
    key = next((name for name in KEYS if config.get(name) is not None), None)
    number = integer(config, key, default=0) if key else int(model.model_type == "qwen3_next")  # whose config says none; vLLM takes one
    if not 1 <= number <= MOST_LAYERS:
        said = f"{key} ({shown(config[key])}) must be 1 to {MOST_LAYERS}" if key else f"the config names none ({', '.join(KEYS)})"
        raise ValueError(f"--mtp: {said} multi-token prediction layers" if key else f"--mtp: multi-token prediction layers: {said}")
    if model.model_type not in KNOWN:
        raise ValueError(f"--mtp: what the multi-token prediction layers of model_type {model.model_type} hold is not known; known: {', '.join(KNOWN)}")
    block = _block(config, key, number, model)
    joints = 1 if model.model_type in JOINED_ONCE else number
    return Model(
        model_type=model.model_type,
        vocab=model.vocab * number * (model.model_type in OWN_TABLES and not shared_tables),
        hidden=model.hidden,
        tied_embeddings=False,
        layers=tuple((number, part) for part in block),
        num_layers=number,
        norms=number * len(block) * model.hidden + joints * (3 * model.hidden + 2 * model.hidden**2),
        positions=model.positions,
    )


def _block(config: Config, key: str, number: int, model: Model) -> list[Part]:
    """The mixers of one layer: attention over all tokens, and experts where the model has them."""
    attention = next((part for _, part in model.layers if part.kind == "attention" and part.kept_tokens is None), None)
    experts = next((part for _, part in model.layers if part.kind == "moe"), None)
    if model.model_type == "nemotron_h":
        pattern = config.get("mtp_hybrid_override_pattern")
        if number != 1 or not isinstance(pattern, str) or not 1 <= len(pattern) <= MOST_LAYERS or set(pattern) - {"*", "E"}:
            raise ValueError(f"--mtp: {key} ({number}) must be 1 and mtp_hybrid_override_pattern ({shown(pattern)}) must be of the letters * and E")
        block = [attention if letter == "*" else experts for letter in pattern]
    else:
        feed_forward = next((part for _, part in model.layers if part.kind == "ffn"), None)
        block = [attention, experts or feed_forward]
    if any(part is None for part in block):
        raise ValueError(f"--mtp: the model of model_type {model.model_type} must have the kinds of layers that its prediction layers repeat")
    return block
