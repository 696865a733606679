"""Which layers attend within a window, and how wide it is, as transformers' (5.23) configs and caches say it."""

import json
from collections.abc import Callable

from memory_budget.configs.values import Config, boolean, integer

Rule = Callable[[Config, int], list[bool]]  # of every layer, where layer_types does not say it

FULL_TYPES = ("full_attention", "attention")  # the second is how older configs write it
WINDOWED_TYPE = "sliding_attention"


def window_of(config: Config, *, default: int | None = None) -> int:
    """Tokens that a query sees in a layer with a window, its own among them; 0 for none. Raises ValueError for a window of fewer than 2.

    Of the tokens before it transformers' cache keeps `[-window + 1 :]`, which under a window of 1 is all of them.
    """
    window = config.get("sliding_window", default)
    if window is None:
        return 0
    if integer(config, "sliding_window", default=window) < 2:
        raise ValueError(f"sliding_window ({window}) must be at least 2 tokens, or null for no window")
    return window


def windowed_layers(config: Config, num_layers: int, otherwise: list[bool]) -> list[bool]:
    """Of every layer whether it attends within the window: as layer_types says, otherwise where there is none. Raises ValueError where it does not fit."""
    types = config.get("layer_types")
    if types is None:
        return otherwise
    if not isinstance(types, list) or len(types) != num_layers:
        entries = f"{len(types)} entries" if isinstance(types, list) else json.dumps(types)[:80]
        raise ValueError(f"layer_types ({entries}) must have an entry for each of the {num_layers} layers that num_hidden_layers says")
    if unknown := [one for one in types if one not in (*FULL_TYPES, WINDOWED_TYPE)]:
        raise ValueError(f"layer_types holds {json.dumps(unknown[0])[:80]}; kinds of attention are {FULL_TYPES[0]} and {WINDOWED_TYPE}")
    return [one == WINDOWED_TYPE for one in types]


def nowhere(_: Config, num_layers: int) -> list[bool]:
    return [False] * num_layers


def everywhere(_: Config, num_layers: int) -> list[bool]:
    return [True] * num_layers


def every_other(_: Config, num_layers: int) -> list[bool]:
    """From the first on."""
    return [layer % 2 == 0 for layer in range(num_layers)]


def every_other_of_the_first(config: Config, num_layers: int) -> list[bool]:
    """Qwen2-MoE: of those below max_window_layers."""
    most = integer(config, "max_window_layers", default=28)
    return [layer % 2 == 0 and layer < most for layer in range(num_layers)]


def all_but_the_last_of_a_pattern(config: Config, num_layers: int) -> list[bool]:
    """Cohere 2: three of four, or as sliding_window_pattern says, which is not looked at where there are layer_types."""
    if config.get("layer_types") is not None:
        return nowhere(config, num_layers)
    period = integer(config, "sliding_window_pattern", default=4, least=1)
    return [layer % period != 0 for layer in range(1, num_layers + 1)]


def layers_without_rotation(config: Config, num_layers: int) -> list[bool]:
    """SmolLM3, where use_sliding_window is true: the layers that no_rope_layers has a 0 for, by default every fourth."""
    if not boolean(config, "use_sliding_window", default=False):
        return nowhere(config, num_layers)
    rotated = config.get("no_rope_layers")
    if rotated is None:
        interval = integer(config, "no_rope_layer_interval", default=4, least=1)
        return [layer % interval == 0 for layer in range(1, num_layers + 1)]
    if not isinstance(rotated, list) or len(rotated) < num_layers:
        raise ValueError(f"no_rope_layers ({json.dumps(rotated)[:80]}) must be a list with an entry for each of the {num_layers} layers")
    return [not one for one in rotated[:num_layers]]
