"""Architectures to and from the `export_config` of NVIDIA's Model-Optimizer: one JSON object of sizes under Megatron's names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_budget.architecture import LAYER_KINDS, WINDOWED, Architecture
from memory_budget.json_files import read_json

# Megatron's name → the architecture's field.
SIZES = {
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
}
# The same of experts, in the object of a model that has some.
EXPERT_SIZES = {"num_moe_experts": "moe_num_experts", "moe_ffn_hidden_size": "moe_ffn", "moe_shared_expert_intermediate_size": "moe_shared_ffn"}
PATTERNS = ("hybrid_override_pattern", "hybrid_layer_pattern")  # older and newer Megatron
STAGE_MARK, MTP_MARK = "|", "/"  # in a pattern: the next layer is on the next pipeline stage; what follows is of heads that foretell further tokens
MTP_NAMES = ("mtp_num_layers", "mtp_hybrid_override_pattern")  # of those heads, which students have none of


@dataclass(frozen=True, slots=True)
class Imported:
    """What a file asks of a student; what it leaves out is the teacher's.

    sizes: by the architecture's fields, for `replace(teacher, pattern=…, **sizes)` · pattern: None where only the depth is given,
    so which layers stay is the layer order's matter.
    """

    num_layers: int
    pattern: str | None
    sizes: Mapping[str, int]


def to_export_config(architecture: Architecture) -> dict[str, int | str]:
    """The object for an architecture, all names given."""
    sizes = {name: getattr(architecture, field) for name, field in _sizes_of(architecture).items()}
    pattern = {} if architecture.sublayers_per_layer > 1 else {"hybrid_override_pattern": architecture.pattern}
    return {"num_layers": architecture.num_layers, **sizes, **pattern}


def _sizes_of(architecture: Architecture) -> dict[str, str]:
    return SIZES | EXPERT_SIZES if "E" in architecture.pattern else SIZES


def from_export_config(config: Mapping[str, Any], teacher: Architecture) -> Imported:
    """Sizes, depth and pattern of an object with any of the names; either name of the pattern will do.

    Raises ValueError for a name that is not known, a value that is no size of a cut of the teacher, and a num_layers that
    contradicts the pattern.
    """
    names = _sizes_of(teacher)
    if unknown := sorted(set(config) - {"num_layers", *names, *PATTERNS, *MTP_NAMES}):
        raise ValueError(f"export_config has {', '.join(unknown)}; it may have num_layers, {', '.join((*names, *PATTERNS))}")
    sizes = {field: _size(config.get(name, getattr(teacher, field)), name, getattr(teacher, field)) for name, field in names.items()}
    pattern, per_layer = _pattern(config), teacher.sublayers_per_layer
    num_layers = teacher.num_layers if pattern is None else len(pattern) // per_layer
    if "num_layers" in config:
        num_layers = _size(config["num_layers"], "num_layers", teacher.num_layers)
        if pattern is not None and num_layers * per_layer != len(pattern):
            raise ValueError(f"num_layers ({num_layers}) contradicts the pattern {pattern}, which has {len(pattern) // per_layer} layers")
    if pattern is not None and WINDOWED in teacher.pattern and pattern == teacher.mixers[: len(pattern)]:
        pattern = None  # Megatron has no letter of its own for attention within a window: what is alike says the depth alone
    if pattern is None and num_layers == teacher.num_layers:
        pattern = teacher.pattern
    return Imported(num_layers, pattern, sizes)


def write_export_config(path: Path, architecture: Architecture) -> None:
    """The object as a JSON file."""
    path.write_text(json.dumps(to_export_config(architecture), indent=2) + "\n", encoding="utf-8")


def read_export_config(path: Path, teacher: Architecture) -> Imported:
    """`from_export_config` of a JSON file. Raises ValueError, also for a file that is not there or holds no JSON object."""
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"export_config {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"export_config {path} must be one JSON object of names and sizes")
    return from_export_config(config, teacher)


def _pattern(config: Mapping[str, Any]) -> str | None:
    """The pattern of the model's own layers, if given: without Megatron's marks of pipeline stages (|), which say nothing about the model, and without what
    each / begins, the layers of a head that foretells further tokens."""
    given = {name: config[name] for name in PATTERNS if config.get(name) is not None}
    if not given:
        return None
    layers = {name: value.partition(MTP_MARK)[0].replace(STAGE_MARK, "") if isinstance(value, str) else "" for name, value in given.items()}
    for name, pattern in layers.items():
        if not pattern or set(pattern) - set(LAYER_KINDS):
            raise ValueError(f"{name} ({given[name]}) must be a string of the layer letters {' '.join(LAYER_KINDS)}, before any {MTP_MARK}")
    if len(set(layers.values())) > 1:
        raise ValueError(f"{' and '.join(PATTERNS)} are both given and differ; give one")
    return next(iter(layers.values()))


def _size(value: Any, name: str, most: int) -> int:
    """A whole number from 1 to the teacher's; the teacher's own 0, of a kind of layer it lacks, stays."""
    if not isinstance(value, int) or isinstance(value, bool) or not min(1, most) <= value <= most:
        raise ValueError(f"{name} ({value}) must be a whole number of at least 1 and at most the teacher's {most}")
    return value
