"""The families of models that can be cut, by their model_type."""

from minitron.families.base import Family
from minitron.families.nemotron_h import FAMILY as NEMOTRON_H

FAMILIES = {family.model_type: family for family in (NEMOTRON_H,)}


def family_of(config: dict) -> Family:
    """The family of a parsed config.json. Raises ValueError listing the supported ones."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} cannot be pruned; supported: {', '.join(FAMILIES)}")
    if "E" in str(config.get("hybrid_override_pattern", "")) or "moe" in config.get("layers_block_type", []):
        raise ValueError("pattern has MoE layers (E), which cannot be pruned yet; supported layers: M (Mamba-2), * (attention), - (FFN)")
    return FAMILIES[model_type]
