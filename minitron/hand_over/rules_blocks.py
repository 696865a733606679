"""What other programs ask of a Llama or Qwen3 folder.

Read in their sources: transformers 5.23 (models/llama and models/qwen3, configuration_*.py and modeling_*.py; modeling_rope_utils.py); vLLM 0.32.0
(models/llama.py, models/qwen3.py, models/qwen2.py, layers/rotary_embedding/__init__.py, model_loader/default_loader.py, attention/backends/
flash_attn.py), which reads config.json by transformers' classes; llama.cpp of 2026 (convert_hf_to_gguf.py with conversion/base.py, conversion/llama.py,
conversion/qwen.py; src/models/llama.cpp, src/models/qwen3.cpp), which does so too where transformers is there.
"""

from collections.abc import Mapping
from typing import Any

from minitron.hand_over.compatibility import (
    LLAMA_CPP,
    TRANSFORMERS,
    VLLM,
    Folder,
    Rule,
    divides,
    fits_flash_attention,
    given,
    has_class,
    known_tokenizer,
    named,
    no_code,
    row_rules,
    says,
    tokenizer_there,
)

VLLM_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
LLAMA_CPP_LLAMA3_POSITIONS = 8192  # of training before scaling, where config.json has them at its top level not


def rope_of(folder: Folder) -> Mapping[str, Any]:
    """The rotary positions' parameters, from either spelling, as transformers reads them: rope_scaling goes before rope_parameters."""
    parameters = folder.config.get("rope_scaling") or folder.config.get("rope_parameters") or {}
    theta = parameters.get("rope_theta", folder.config.get("rope_theta", 10_000.0))
    return {**parameters, "rope_type": parameters.get("rope_type", parameters.get("type", "default")), "rope_theta": theta}


def _rope_text(folder: Folder) -> str:
    rope = rope_of(folder)
    scaled = f" from {rope['original_max_position_embeddings']} positions" if "original_max_position_embeddings" in rope else ""
    return f"{rope['rope_type']}{scaled}, theta {rope['rope_theta']:g}"


def _both_spellings(folder: Folder) -> bool:
    """What programs from before rope_parameters need: theta, and the scaling where there is one."""
    rope = rope_of(folder)
    scaled = rope["rope_type"] == "default" or bool(folder.config.get("rope_scaling"))
    return folder.config.get("rope_theta") == rope["rope_theta"] and scaled


def _llama3_is_read(folder: Folder) -> bool:
    rope = rope_of(folder)
    read = folder.config.get("original_max_position_embeddings", LLAMA_CPP_LLAMA3_POSITIONS)
    return rope["rope_type"] != "llama3" or rope.get("original_max_position_embeddings", folder.size("max_position_embeddings")) == read


def _head_is_there(folder: Folder) -> bool:
    return folder.config.get("tie_word_embeddings") is True or "lm_head.weight" in folder.tensors


def _head_text(folder: Folder) -> str:
    return ("there" if "lm_head.weight" in folder.tensors else "absent") + (", tied" if folder.config.get("tie_word_embeddings") is True else ", not tied")


def _types_fit(folder: Folder) -> bool:
    types = folder.config.get("layer_types")
    return types is None or len(types) == folder.size("num_hidden_layers")


def _head(program: str, otherwise: str) -> Rule:
    return Rule(program, "lm_head.weight", f"must be there unless tie_word_embeddings is true: {otherwise}", _head_is_there, _head_text)


def _rules(model_type: str, of_class: str, head_dim_else: str, llama_cpp_ropes: tuple[str, ...]) -> tuple[Rule, ...]:
    """The rules that both families share."""
    return (
        Rule(TRANSFORMERS, "model_type", f"must be {model_type}", says("model_type", model_type)),
        Rule(TRANSFORMERS, "head_dim", f"must be given: {head_dim_else} is taken", given("head_dim")),
        _head(TRANSFORMERS, "it would be made up at random"),
        Rule(TRANSFORMERS, "rope_theta", "must be at the top level too, and rope_scaling where positions are scaled: versions before 5 read nothing else",
             _both_spellings, _rope_text),
        has_class(VLLM, of_class),
        Rule(VLLM, "head_dim", "must be a multiple of 8 and at most 256, for FlashAttention", fits_flash_attention),
        Rule(VLLM, "num_key_value_heads", "must divide num_attention_heads", divides("num_key_value_heads", "num_attention_heads")),
        Rule(VLLM, "hidden_act", "must be silu: it knows no other", says("hidden_act", "silu", None)),
        Rule(VLLM, "rope_parameters", f"must be of a type it knows ({', '.join(VLLM_ROPE_TYPES)})",
             lambda folder: rope_of(folder)["rope_type"] in VLLM_ROPE_TYPES, _rope_text),
        Rule(VLLM, "max_position_embeddings", "must be given: it is the longest context served", given("max_position_embeddings")),
        _head(VLLM, "its logits would be of whatever is in memory"),
        named(VLLM, "model.", "lm_head."),
        tokenizer_there("tokenizer.json", "tokenizer.model"),
        has_class(LLAMA_CPP, of_class),
        Rule(LLAMA_CPP, "head_dim", "must be given, and even", lambda folder: folder.size("head_dim") > 0 and folder.size("head_dim") % 2 == 0),
        Rule(LLAMA_CPP, "num_key_value_heads", "must divide num_attention_heads", divides("num_key_value_heads", "num_attention_heads")),
        Rule(LLAMA_CPP, "intermediate_size", "must be given", given("intermediate_size")),
        Rule(LLAMA_CPP, "max_position_embeddings", "must be given", given("max_position_embeddings")),
        Rule(LLAMA_CPP, "rms_norm_eps", "must be given", lambda folder: "rms_norm_eps" in folder.config),
        Rule(LLAMA_CPP, "hidden_act", "must be absent or silu: it always computes that", says("hidden_act", "silu", None)),
        Rule(LLAMA_CPP, "rope_parameters", f"must be of a type that it turns this model's positions by ({', '.join(llama_cpp_ropes)})",
             lambda folder: rope_of(folder)["rope_type"] in llama_cpp_ropes, _rope_text),
        _head(LLAMA_CPP, "the embeddings are taken in its place"),
        named(LLAMA_CPP, "model.", "lm_head."),
        known_tokenizer(lambda folder: False if folder.own_tokenizer else True if "tokenizer.model" in folder.files else None),
        *row_rules(),
        no_code(TRANSFORMERS),
    )  # fmt: skip


LLAMA_RULES = (
    *_rules("llama", "LlamaForCausalLM", "hidden_size / num_attention_heads", ("default", "linear", "yarn", "llama3")),
    Rule(TRANSFORMERS, "hidden_size", "must be a multiple of num_attention_heads", divides("num_attention_heads", "hidden_size")),
    Rule(LLAMA_CPP, "original_max_position_embeddings", f"must be {LLAMA_CPP_LLAMA3_POSITIONS} where llama3 scales positions, or at the top level: it is "
         "looked for nowhere else", _llama3_is_read, _rope_text),
)  # fmt: skip
QWEN3_RULES = (
    *_rules("qwen3", "Qwen3ForCausalLM", "128", ("default", "linear", "yarn")),
    Rule(TRANSFORMERS, "layer_types", "must be absent, or have an entry for every layer", _types_fit,
         lambda folder: "absent" if (types := folder.config.get("layer_types")) is None else f"{len(types):,} entries"),
    Rule(VLLM, "attention_bias", "must be false: its output projection has no bias", says("attention_bias", False, None)),
    Rule(LLAMA_CPP, "attention_bias", "must be false: its output projection has no bias", says("attention_bias", False, None)),
    Rule(VLLM, "use_sliding_window", "must be false: it has windows in all layers or in none", says("use_sliding_window", False, None)),
    Rule(LLAMA_CPP, "use_sliding_window", "must be false: it has no windows", says("use_sliding_window", False, None)),
)  # fmt: skip
