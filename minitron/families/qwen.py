"""What Qwen2 and Qwen3 say of windows: none, or one for some of the layers.

transformers takes the kind of every layer from `layer_types`; older versions, and other programs, know only the number of the first layer with a window,
`max_window_layers`. Both are written, and where kept layers are such that the number cannot say it, it says that no layer has one.
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
    first = types.index("sliding_attention")
    from_there_on = "full_attention" not in types[first:]
    return {"use_sliding_window": True, "sliding_window": architecture.window, "max_window_layers": first if from_there_on else architecture.num_layers,
            "layer_types": types}  # fmt: skip
