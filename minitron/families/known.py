"""The families of models that can be cut, by their model_type."""

from memory_budget.hf_config import FAMILIES as COUNTED
from minitron.families.base import Family
from minitron.families.llama import FAMILY as LLAMA
from minitron.families.nemotron_h import FAMILY as NEMOTRON_H
from minitron.families.qwen3 import FAMILY as QWEN3

FAMILIES = {family.model_type: family for family in (NEMOTRON_H, LLAMA, QWEN3)}


def family_of(config: dict) -> Family:
    """The family of a parsed config.json. Raises ValueError for one that cannot be cut, or that a cut could not honour."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        counted = ", ".join(name for name in COUNTED if name not in FAMILIES)
        raise ValueError(f"model_type {model_type!r} cannot be pruned; supported: {', '.join(FAMILIES)} (only counted, by python -m memory_budget: {counted})")
    family = FAMILIES[model_type]
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown method")
        raise ValueError(f"quantization_config is there ({method}): stages cut and train plain weights; give the checkpoint before it was quantised")
    if reason := family.refused(config):
        raise ValueError(reason)
    return family
