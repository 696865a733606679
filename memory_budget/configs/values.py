"""Values out of a config.json, each with the key named where it is none."""

import json
from typing import Any

Config = dict[str, Any]

MOST_LAYERS = 2**14
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_nextn_predict_layers", "max_window_layers", "first_k_dense_replace",
                "num_kv_shared_layers", "sliding_window_pattern")  # fmt: skip


def integer(config: Config, key: str, *, default: int, null: int | None = None, least: int = 0) -> int:
    """The value of a size; default where the key is missing, null (if null may be said) where it is null. Raises ValueError."""
    value = config.get(key, default)
    if value is None and null is not None:
        return null
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**53:
        most = ", and below 2**53" if isinstance(value, int) and value >= 2**53 else ""
        raise ValueError(f"{key} ({json.dumps(value)[:80]}) must be a whole number of at least {least}{most}")
    return value


def boolean(config: Config, key: str, *, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} ({json.dumps(value)[:80]}) must be true or false")
    return value


def shown(value: Any) -> str:
    """A value of a config as a message shows it: on one line, in ASCII, not longer than 80 characters."""
    text = value if isinstance(value, str) and value.isascii() and value.isprintable() and value else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_layer_counts(config: Config) -> None:
    """Refuse numbers of layers that would take the memory they are to be weighed against. Raises ValueError naming the key."""
    for key in LAYER_COUNTS:
        if _is_above(config.get(key), MOST_LAYERS):
            raise ValueError(f"{key} ({shown(config[key])}) must be at most {MOST_LAYERS:,}")


def _is_above(value: Any, most: int) -> bool:
    return isinstance(value, int) and value > most
