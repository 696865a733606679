"""What Qwen2 and Qwen3 say of windows: none, or one for some of the layers.

transformers takes the kind of every layer from `layer_types`; older versions, and other programs, know only the number of the first layer with a window,
`max_window_layers`. Both are written. Of layers whose windows come and go the number says the first one too: it must not be the number of layers, which vLLM
takes for no window at all.
"""

from memory_budget.architecture import WINDOWED, Architecture
from minitron.families.blocks import attention_types

COMPUTING = ("sliding_window",)  # None where use_sliding_window is false; which layers have it, layer_types says


def windows(teacher: dict, architecture: Architecture) -> dict:
    """The keys of a student's config.json that say which of its layers have a window."""
    types = attention_types(architecture)
    if WINDOWED not in architecture.pattern:
        listed = {"layer_types": types} if "layer_types" in teacher else {}
        return {"use_sliding_window": False, "max_window_layers": architecture.num_layers, **listed}
    return {"use_sliding_window": True, "sliding_window": architecture.window, "max_window_layers": types.index("sliding_attention"), "layer_types": types}
