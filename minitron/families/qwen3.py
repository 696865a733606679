"""Qwen3, dense: Llama's blocks with a norm over every query's and key's channels before they are turned (transformers' models/qwen3).

The norm of queries and keys has one weight of head_dim for all heads, so heads are cut without it; head_dim is a number of its own and no axis.
"""

from memory_budget.architecture import Architecture
from minitron.families.blocks import block_family


def config(teacher: dict, architecture: Architecture) -> dict:
    """`layer_types` has an entry for every layer; without a window all are alike."""
    types = {"layer_types": ["full_attention"] * architecture.num_layers} if "layer_types" in teacher else {}
    return {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False, "max_window_layers": architecture.num_layers, **types}


def refused(config: dict) -> str | None:
    """Windows are by a layer's number, which a cut changes."""
    if config.get("use_sliding_window") and config.get("sliding_window"):
        return f"use_sliding_window is true with a window of {config['sliding_window']} tokens in layers from max_window_layers on, which cannot be cut yet"
    return None


FAMILY = block_family("qwen3", classes="Qwen3", config=config, refused=refused)
