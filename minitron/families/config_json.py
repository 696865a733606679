"""A config.json as transformers reads it, the models that it makes of one, and what of a teacher's a student's keeps: all but what speaks of other files,
other code, or another form of the weights.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

# Code beside the weights, which is never run here nor copied: every family that can be cut is built into transformers.
CODE_KEYS = ("auto_map", "custom_pipelines")
# Where a folder lay, what wrote it, and which of its files the weights were in.
PLACE_KEYS = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "transformers_weights")
# Of weights in another form: a quantised checkpoint is refused, an empty entry says nothing.
FORM_KEYS = ("quantization_config", "compression_config")
# Layers behind the last that foretell further tokens; transformers leaves their tensors out, so a student has none.
MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern")


def kept_config(teacher: dict) -> dict:
    """The teacher's config.json without those, with plain numbers; the number format by both of its names, `dtype` and the older `torch_dtype`."""
    dropped = {*CODE_KEYS, *PLACE_KEYS, *FORM_KEYS, *MTP_KEYS}
    config = {key: _plain(value) for key, value in teacher.items() if key not in dropped}
    named = config.get("dtype") or config.get("torch_dtype")
    return config | ({"dtype": named, "torch_dtype": named} if named else {})


def _plain(value: Any) -> Any:
    """A copy of what JSON holds; transformers writes infinity as {"__float__": "Infinity"}, which other programs cannot read."""
    if isinstance(value, dict):
        return float(value["__float__"]) if set(value) == {"__float__"} else {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def transformers_config(config: dict) -> Any:
    """transformers' own object of a config.json; it checks sizes and types. Raises ValueError, a line, for what it refuses."""
    from transformers import CONFIG_MAPPING

    try:
        sizes = CONFIG_MAPPING[config["model_type"]](**_plain(config))  # a copy: it fills in what rope_scaling leaves out, in place
    except Exception as error:  # huggingface_hub's StrictDataclass errors are no ValueError
        reason = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")
        raise ValueError(f"config.json is refused by transformers: {reason}") from error
    if hasattr(type(sizes), "num_attention_heads"):  # of which Mamba-2 has none
        sizes._attn_implementation = "sdpa"  # what from_pretrained chooses
    return sizes


def load(folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """A checkpoint as transformers' own model, in eval mode; dtype None keeps the stored one."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar a stage is enough
    here = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}  # no network, no pickles, no code of theirs
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", **here).to(device).eval()


def build(config: dict) -> nn.Module:
    """A freshly initialised float32 model of a config.json dict; on the meta device there is nothing to initialise."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights() if torch.get_default_device().type == "meta" else nullcontext():
        return AutoModelForCausalLM.from_config(transformers_config(config), dtype=torch.float32)
