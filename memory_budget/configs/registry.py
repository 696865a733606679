"""Which reader knows which model_type, and what stands around a language model's sizes."""

from collections.abc import Callable
from dataclasses import replace

from memory_budget.configs import delta, dense, hybrids, latent, mixtures
from memory_budget.configs.nested import language_part
from memory_budget.configs.quantisation import positions
from memory_budget.configs.unknown import unknown_model
from memory_budget.configs.values import Config, check_layer_counts, shown
from memory_budget.hf_config import FAMILIES, architecture_from_config
from memory_budget.model import Model, as_model
from memory_budget.parameters import count_total_parameters
from memory_budget.sources.safetensors import TensorSizes

# Beside those that can be cut.
READERS: dict[str, Callable[[Config], Model]] = {**dense.MODELS, **mixtures.MODELS, **latent.MODELS, **hybrids.MODELS, **delta.MODELS}


def model_types() -> tuple[str, ...]:
    """All that are read."""
    return (*FAMILIES, *READERS)


def model_from_config(config: Config, tensors: Callable[[], TensorSizes] = dict) -> Model:
    """The model of a config dict, or of the language model within it, with notes on what is left out.

    tensors: gives the shapes of the checkpoint's tensors; it is asked only for a model_type that no reader knows. Raises ValueError for such a
    model_type without tensors, for more layers than any model has, and as the readers do.
    """
    config, notes = language_part(config, frozenset(model_types()))
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        value = "is missing from the config" if model_type is None else f"({shown(model_type)}) must be a string"
        raise ValueError(f"model_type {value}; supported: {', '.join(model_types())}")
    check_layer_counts(config)
    model = _known_model(model_type, config)
    if model is None:
        found = tensors()
        if not found:
            raise ValueError(f"model_type ({shown(model_type)}) is not supported, and there are no safetensors files whose headers would give its parameters; "
                             f"supported: {', '.join(model_types())}")  # fmt: skip
        model = unknown_model(config, found)
    check_model(model)
    longest = model.positions if model.positions is not None else positions(config)
    return replace(model, positions=longest, notes=(*notes, *model.notes))


def language_config(config: Config) -> Config:
    """The config that the model is read from: the language part of one that nests it."""
    return language_part(config, frozenset(model_types()))[0]


def _known_model(model_type: str, config: Config) -> Model | None:
    if model_type in FAMILIES:
        return as_model(architecture_from_config(config))
    return READERS[model_type](config) if model_type in READERS else None


def check_model(model: Model) -> None:
    """Refuse sizes of nothing, which would divide by zero. Raises ValueError."""
    for _, part in model.layers:
        if part.kept_tokens != 0 and part.cache_numbers_per_token < 1:
            raise ValueError(f"the {part.kind} of model_type {model.model_type} has keys and values of 0 numbers: num_key_value_heads and head_dim "
                             "(else hidden_size / num_attention_heads) must be at least 1")  # fmt: skip
        if part.kind == "mamba" and part.state_numbers + part.conv_numbers < 1:
            raise ValueError(f"the recurrent layers of model_type {model.model_type} have states of 0 numbers: their heads and sizes must be at least 1")
    if count_total_parameters(model) < 1:
        raise ValueError(f"the model of model_type {model.model_type} has 0 parameters: its sizes must be at least 1")
