"""Which reader knows which model_type, and what stands around a language model's sizes."""

from collections.abc import Callable

from memory_budget.configs.values import Config
from memory_budget.hf_config import FAMILIES, architecture_from_config
from memory_budget.model import Model, as_model

READERS: dict[str, Callable[[Config], Model]] = {}  # beside those that can be cut


def model_from_config(config: Config) -> Model:
    """The model of a config dict. Raises ValueError for a model_type that no reader knows, and as the readers do."""
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return as_model(architecture_from_config(config))
    if model_type in READERS:
        return READERS[model_type](config)
    raise ValueError(f"model_type ({model_type}) is not supported; supported: {', '.join((*FAMILIES, *READERS))}")
