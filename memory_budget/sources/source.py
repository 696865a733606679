"""What the command's argument names: a folder, a config.json, or a model on the Hub."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from memory_budget.configs.values import Config, shown
from memory_budget.hf_config import read_config
from memory_budget.json_files import parse_json
from memory_budget.sources.hub import HUB_ID, HubModel
from memory_budget.sources.safetensors import Entry, tensors_of_folder


@dataclass(frozen=True, slots=True)
class Source:
    """A config, and what gives the shapes of the tensors that lie beside it: read only where they are asked for."""

    name: str
    config: Config
    tensors: Callable[[], dict[str, Entry]]


def open_source(argument: str) -> Source:
    """Raises ValueError where there is no such thing, or no config in it."""
    path = Path(argument)
    try:
        is_here = path.exists()
    except (OSError, ValueError):
        raise ValueError(f"config {shown(argument)} is no name of a file") from None
    if not is_here and HUB_ID.fullmatch(argument) and not argument.endswith(".json"):
        model = HubModel(argument)
        return Source(argument, _object(model.config(), argument), model.tensors)
    folder = path if path.is_dir() else path.parent
    return Source(argument, read_config(path), lambda: tensors_of_folder(folder))


def _object(content: bytes, name: str) -> Config:
    try:
        config = parse_json(content)
    except ValueError as error:
        raise ValueError(f"config.json of {name} must be JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"config.json of {name} must be a JSON object, not {type(config).__name__}")
    return config
