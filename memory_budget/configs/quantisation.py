"""quantization_config of a config.json: the number format that the weights are stored in."""

import math
import re
from typing import Any

from memory_budget.configs.values import Config, shown
from memory_budget.formats import CHOOSABLE_GROUPS, LARGEST_GROUP

KIND_WORDS = {"attention": ("self_attn", "attn", "attention"), "mamba": ("mamba", "mixer", "linear_attn"), "moe": ("expert", "block_sparse_moe"),
              "ffn": ("mlp", "feed_forward")}  # fmt: skip
SKIP_KEYS = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "llm_int8_skip_modules")


def stored_format(config: Config) -> tuple[str | None, list[str]]:
    """The format, as --weights takes it, and notes; None where the config has no quantization_config, or one that is not read (which a note then says)."""
    settings = config.get("quantization_config", config.get("compression_config"))
    if not settings:
        return None, []
    if not isinstance(settings, dict):
        return None, [f"quantization_config ({shown(settings)}) is no object and not read: weights are counted as bf16"]
    method = settings.get("quant_method", settings.get("quant_algo"))
    name, notes = _format_of(str(method).lower(), settings)
    if name is None:
        return None, [f"quantization_config of quant_method {shown(method)} is not read: weights are counted as bf16; --weights says another format"]
    kinds, single = _left_out(settings)
    if kinds:
        name += "".join(f"-{kind}" for kind in ("attention", "mamba", "ffn", "moe") if kind not in kinds)
    if single:
        notes.append(f"{single} modules of single layers that quantization_config leaves as they are count as packed")
    return name, [f"weights are counted as {name}, which quantization_config says (quant_method {shown(method)}); --weights says another format", *notes]


def _format_of(method: str, settings: dict[str, Any]) -> tuple[str | None, list[str]]:
    bits, group = settings.get("bits", settings.get("w_bit")), settings.get("group_size", settings.get("q_group_size"))
    if method in ("fp8", "fbgemm_fp8"):
        block = settings.get("weight_block_size")
        square = isinstance(block, list) and len(block) == 2 and block[0] == block[1]
        return _grouped("fp8", block[0] if square else None), []
    if method in ("gptq", "awq"):
        if bits == 8:
            return "int8", [f"{method}'s scales are counted per row"]
        if bits != 4:
            return None, []
        if group == -1:
            return _grouped("int4", LARGEST_GROUP - 1), [f"group_size -1 of {method} is a scale a row"]
        return _grouped("int4", group), [f"{method} also stores zero points, half a byte a group and row, which are not counted"]
    if method == "bitsandbytes":
        if settings.get("load_in_4bit"):
            return "int4-g64", ["bitsandbytes' 4-bit blocks are of 64; 2 bytes a block are counted for a scale (it is 4, or about 1 with double quantisation)"]
        return ("int8", []) if settings.get("load_in_8bit") else (None, [])
    if method == "mxfp4":
        return "mxfp4", []
    if method in ("modelopt", "nvfp4", "fp8_modelopt") or "quant_algo" in settings:
        algorithm = str(settings.get("quant_algo", method)).lower()
        return next((found for found in ("nvfp4", "mxfp4", "fp8") if found in algorithm), None), []
    if method == "compressed-tensors":
        return _compressed_tensors(settings)
    return None, []


def _compressed_tensors(settings: dict[str, Any]) -> tuple[str | None, list[str]]:
    """Of the config groups the first: bits, whole numbers or floats, and how many share a scale."""
    groups = settings.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    if not isinstance(weights, dict):
        return None, []
    notes = [f"only the first of {len(groups)} config_groups is read"] if len(groups) > 1 else []
    bits, kind, group = weights.get("num_bits"), weights.get("type", "int"), weights.get("group_size")
    if (bits, kind) == (8, "float"):
        return "fp8", notes
    if (bits, kind) == (8, "int"):
        return "int8", notes
    if (bits, kind) == (4, "float"):
        return {16: "nvfp4", 32: "mxfp4"}.get(group if isinstance(group, int) else 0), notes
    return (_grouped("int4", group if group else LARGEST_GROUP - 1), notes) if (bits, kind) == (4, "int") else (None, [])


def _grouped(name: str, group: Any) -> str:
    usual = not isinstance(group, int) or isinstance(group, bool) or not 0 < group <= LARGEST_GROUP or name not in CHOOSABLE_GROUPS
    return name if usual else f"{name}-g{group}"


def _left_out(settings: dict[str, Any]) -> tuple[set[str], int]:
    """Kinds whose modules are left as they are in every layer, and the number of modules of single layers."""
    kinds, single = set(), 0
    for key in SKIP_KEYS:
        names = settings.get(key)
        for name in names if isinstance(names, list) else ():
            text = str(name).lower()
            if re.search(r"\.\d+\.", text) or re.search(r"\.\d+$", text):
                single += 1
                continue
            last = text.rstrip(".*$").rsplit(".", 1)[-1]
            kinds |= {kind for kind, words in KIND_WORDS.items() if last in words or last + "s" in words or last.rstrip("s") in words}
    return kinds, single


def positions(config: Config) -> int | None:
    """Tokens that the config's positions allow, as vLLM works out its longest max_model_len: max_position_embeddings, times the factor of a scaling that
    stretches it (linear, dynamic; YaRN from its original length); None where it does not say."""
    number = next((config[key] for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length") if key in config), None)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        return None
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, dict):
        return number
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind in ("linear", "dynamic", "yarn") and isinstance(factor, (int, float)) and not isinstance(factor, bool) and 1 <= factor < 2**20 and number < 2**53:
        original = scaling.get("original_max_position_embeddings") if kind == "yarn" else None
        base = original if isinstance(original, int) and not isinstance(original, bool) and 0 < original < 2**53 else number
        return max(number, math.floor(base * factor)) if kind == "yarn" else math.floor(base * factor)
    return number
