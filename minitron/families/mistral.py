"""Mistral: Llama's blocks with one window for the attention of all layers, or with none (transformers' models/mistral).

Nothing in its configuration class ties sizes to each other. A config.json without sliding_window means 4,096 tokens; null means no window. `layer_types`
would be ignored by transformers and obeyed by vLLM, so a student's has none.
"""

from memory_budget.architecture import WINDOWED, Architecture
from minitron.families.blocks import Blocks, block_family


def config(_teacher: dict, architecture: Architecture) -> dict:
    return {"architectures": ["MistralForCausalLM"], "sliding_window": architecture.window if WINDOWED in architecture.pattern else None}


FAMILY = block_family("mistral", Blocks("mistral", "Mistral"), config=config, dropped=("layer_types",), computing_too=("sliding_window",))
