"""What other programs ask of a folder of Gemma 3, the language model alone.

Read in their sources: transformers 5.23 and 4.50 to 4.57 (models/gemma3, configuration_*.py and modeling_*.py); vLLM 0.32.0 (models/gemma3.py,
layers/activation.py, layers/rotary_embedding/__init__.py), which reads config.json by transformers' class; llama.cpp of 2026 (conversion/gemma.py and
conversion/base.py; src/models/gemma3.cpp).
"""

from collections.abc import Mapping
from typing import Any

from minitron.hand_over.compatibility import LLAMA_CPP, TRANSFORMERS, VLLM, Folder, Rule, divides, given, says
from minitron.hand_over.rules_blocks import QWEN_ROPES, VLLM_ROPE_TYPES, block_rules, rope_text, types_fit, types_text, windows_text

FULL, SLIDING = "full_attention", "sliding_attention"
OLD_THETAS = {FULL: ("rope_theta", 1_000_000.0), SLIDING: ("rope_local_base_freq", 10_000.0)}  # as versions before 5 call them, and their defaults
ACTIVATION = "gelu_pytorch_tanh"
VLLM_ACTIVATIONS = (ACTIVATION, "gelu", "silu")
PERIOD = 6  # of layers, the last of which sees all tokens, where no program is told another
LAYERS_OF_27B = 62  # by which llama.cpp knows that model


def ropes_of(folder: Folder) -> Mapping[str, Mapping[str, Any]]:
    """The rotary positions' parameters by kind of attention, from either spelling, as transformers reads them: rope_scaling is of full attention."""
    found = {}
    for kind, (old, theta) in OLD_THETAS.items():
        parameters = dict((folder.config.get("rope_parameters") or {}).get(kind) or {})
        parameters |= (folder.config.get("rope_scaling") or {}) if kind == FULL else {}
        found[kind] = {"rope_theta": folder.config.get(old, theta), **parameters, "rope_type": parameters.get("rope_type", parameters.get("type", "default"))}
    return found


def _ropes_text(folder: Folder) -> str:
    return ", ".join(f"{kind} {rope_text(rope)}" for kind, rope in ropes_of(folder).items())


def _both_spellings(folder: Folder) -> bool:
    """What versions without rope_parameters need: a number for each kind of attention, and the scaling, which only full attention can have there."""
    ropes = ropes_of(folder)
    scaled = ropes[FULL]["rope_type"] == "default" or bool(folder.config.get("rope_scaling"))
    return scaled and ropes[SLIDING]["rope_type"] == "default" and all(folder.config.get(OLD_THETAS[kind][0]) == ropes[kind]["rope_theta"] for kind in ropes)


def _every_but(period: int, num_layers: int) -> list[bool]:
    return [(layer + 1) % period > 0 for layer in range(num_layers)]


def _windowed(folder: Folder) -> list[bool]:
    """Of every layer, whether it has a window."""
    types = folder.config.get("layer_types")
    period = folder.size("sliding_window_pattern") or PERIOD
    return _every_but(period, folder.size("num_hidden_layers")) if types is None else [one == SLIDING for one in types]


def _patterned(folder: Folder) -> bool:
    """The one number that older versions read gives the same windows; their class has a default where it is absent."""
    period = folder.config.get("sliding_window_pattern", PERIOD)
    return isinstance(period, int) and period > 0 and _windowed(folder) == _every_but(period, folder.size("num_hidden_layers"))


def _llama_cpp_windows(folder: Folder) -> bool:
    period = 1 if folder.config.get("sliding_window_pattern") == 1 else PERIOD  # with 1 it is told of no window
    return _windowed(folder) == _every_but(period, folder.size("num_hidden_layers"))


def _llama_cpp_scale(folder: Folder) -> bool:
    """It divides queries by the root of a number that it takes from the other sizes."""
    is_27b = folder.size("num_hidden_layers") == LAYERS_OF_27B
    taken = folder.size("hidden_size") // max(folder.size("num_attention_heads"), 1) if is_27b else folder.size("head_dim")
    return folder.config.get("query_pre_attn_scalar") == taken


RULES = (
    *block_rules("gemma3_text", "Gemma3ForCausalLM", "256"),
    Rule(TRANSFORMERS, "hidden_size", "must be a multiple of num_attention_heads", divides("num_attention_heads", "hidden_size")),
    Rule(TRANSFORMERS, "layer_types", "must be absent, or have an entry for every layer", types_fit, types_text),
    Rule(TRANSFORMERS, "sliding_window_pattern", "should say which layers see all tokens, every so many-th: versions before 4.53 read nothing else",
         _patterned, is_advice=True),
    Rule(TRANSFORMERS, "query_pre_attn_scalar", "must be given: 256 is taken", given("query_pre_attn_scalar")),
    Rule(TRANSFORMERS, "rope_theta", "must be at the top level too, with rope_local_base_freq for layers with a window, and rope_scaling where the others' "
         "positions are scaled, which they alone may be: versions before 5 read nothing else", _both_spellings, _ropes_text),
    Rule(VLLM, "hidden_activation", f"must be one it knows ({', '.join(VLLM_ACTIVATIONS)})", says("hidden_activation", *VLLM_ACTIVATIONS, None)),
    Rule(VLLM, "rope_parameters", f"must be of types it knows ({', '.join(VLLM_ROPE_TYPES)})",
         lambda folder: all(rope["rope_type"] in VLLM_ROPE_TYPES for rope in ropes_of(folder).values()), _ropes_text),
    Rule(VLLM, "use_bidirectional_attention", "must be false: it looks back only", says("use_bidirectional_attention", False, None)),
    Rule(LLAMA_CPP, "hidden_activation", f"must be {ACTIVATION}: it always computes that", says("hidden_activation", ACTIVATION, None)),
    Rule(LLAMA_CPP, "rope_parameters", f"must be of a type that it turns this model's positions by ({', '.join(QWEN_ROPES)}), and default with windows",
         lambda folder: ropes_of(folder)[FULL]["rope_type"] in QWEN_ROPES and ropes_of(folder)[SLIDING]["rope_type"] == "default", _ropes_text),
    Rule(LLAMA_CPP, "layer_types", f"must have full_attention in every {PERIOD}th layer and nowhere else, or in all where sliding_window_pattern is 1: it has "
         "no other windows", _llama_cpp_windows, lambda folder: windows_text(_windowed(folder))),
    Rule(LLAMA_CPP, "query_pre_attn_scalar", f"must be head_dim, or hidden_size / num_attention_heads where there are {LAYERS_OF_27B} layers: it is not read",
         _llama_cpp_scale),
    Rule(LLAMA_CPP, "attn_logit_softcapping", "must be null: its converter takes nothing else", says("attn_logit_softcapping", None)),
    Rule(LLAMA_CPP, "attention_bias", "must be false: its output projection has no bias", says("attention_bias", False, None)),
    Rule(LLAMA_CPP, "use_bidirectional_attention", "must be false: it looks back only", says("use_bidirectional_attention", False, None)),
)  # fmt: skip
