"""The families of models that can be cut, by their model_type."""

from collections.abc import Mapping
from typing import Any

from memory_budget.architecture import Architecture
from minitron.families.base import Family
from minitron.families.gemma3_text import FAMILY as GEMMA3_TEXT
from minitron.families.granite import FAMILY as GRANITE
from minitron.families.llama import LLAMA, MISTRAL
from minitron.families.mamba2 import FAMILY as MAMBA2
from minitron.families.nemotron_h import FAMILY as NEMOTRON_H
from minitron.families.qwen import QWEN3, QWEN3_MOE
from minitron.families.qwen2 import FAMILY as QWEN2

FAMILIES = {family.model_type: family for family in (NEMOTRON_H, LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA3_TEXT, MAMBA2, GRANITE)}


def family_of(config: dict) -> Family:
    """The family of a parsed config.json. Raises ValueError for one that cannot be cut, or that a cut could not honour."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} cannot be pruned; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    if quantised := quantised_by_config(config):
        raise ValueError(f"{quantised} in config.json: a quantised checkpoint, and stages cut, train and merge plain weights; give the bf16 one")
    if reason := family.refused(config):
        raise ValueError(reason)
    return family


def can_decode(architecture: Architecture) -> bool:
    """Whether transformers goes on from such a model's cache: most families' asks an attention layer how long it is."""
    return "*" in architecture.mixers or FAMILIES[architecture.model_type].decodes_without_attention


def quantised_by_config(config: Mapping[str, Any]) -> str | None:
    """What config.json says of quantised weights; None where it says nothing."""
    for key in ("quantization_config", "compression_config"):
        if said := config.get(key):
            return f"{key} is there ({method_of(said)})"
    return None


def method_of(said: Any) -> str:
    """The words by which a quantiser's settings tell its kind."""
    if not isinstance(said, Mapping):
        return "unknown method"
    kinds = [said.get(key) for key in ("quant_method", "quant_algo", "fmt", "format", "kv_cache_quant_algo")]
    kinds += [f"{said['bits']} bits"] if isinstance(said.get("bits"), int) else []
    return ", ".join(dict.fromkeys(str(kind) for kind in kinds if kind)) or "unknown method"
