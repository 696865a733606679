"""Architecture of a Hugging Face config.json of a model that can be cut: nemotron_h, mamba2, llama, mistral, qwen2, qwen3, qwen3_moe, gemma3_text,
granitemoehybrid.

A missing key means what transformers' (5.23) config class of that model_type means by it. How each type is read stands in configs/mamba.py,
configs/blocks.py and configs/granite.py.
"""

from pathlib import Path

from memory_budget.architecture import Architecture, check_architecture
from memory_budget.configs import blocks, granite, mamba
from memory_budget.configs.prediction import prediction_notes
from memory_budget.configs.values import Config, check_layer_counts, shown
from memory_budget.json_files import read_json

FAMILIES = {**mamba.FAMILIES, **blocks.FAMILIES, **granite.FAMILIES}


def read_config(path: str | Path) -> Config:
    """The config dict of a directory that holds config.json, or of a JSON file itself.

    Raises ValueError where there is no such file, or it is not a JSON object.
    """
    file = Path(path)
    try:
        file = file / "config.json" if file.is_dir() else file
        config = read_json(file)
    except FileNotFoundError:
        raise ValueError(f"config {file} not found; give a directory that holds config.json, or the file") from None
    except OSError as error:
        raise ValueError(f"config {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"config {file} must be JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"config {file} must be a JSON object, not {type(config).__name__}")
    return config


def architecture_from_config(config: Config) -> Architecture:
    """The architecture of a config dict.

    Raises ValueError for a missing or unsupported model_type, values that are no sizes, a pattern spelled in two ways that
    disagree, more layers than any model has, num_hidden_layers that is not the pattern's length, and what check_architecture refuses.
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise ValueError(f"model_type is missing from the config; supported: {', '.join(FAMILIES)}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type ({shown(model_type)}) is not supported; supported: {', '.join(FAMILIES)}")
    check_layer_counts(config)
    architecture = FAMILIES[model_type](config)
    check_architecture(architecture)
    return architecture


def unmodelled_settings(config: Config) -> list[str]:
    """What the config asks for that the calculator leaves out, a sentence each, for the reader of a report."""
    return list(prediction_notes(config)) if config.get("model_type") in FAMILIES else []
