"""What other programs ask of a folder of transformer blocks: Llama, Mistral, Qwen2 and Qwen3; what all such folders share, Gemma 3 has too (rules_gemma3.py).
What they ask of experts is in rules_experts.py.

Read in their sources: transformers 5.23 (models/llama, mistral, qwen2, qwen3: configuration_*.py and modeling_*.py; modeling_rope_utils.py) and 4.50 to 4.57;
vLLM 0.32.0 (models/llama.py, mistral.py, qwen2.py, qwen3.py; engine/arg_utils.py; layers/attention/attention.py; layers/rotary_embedding/__init__.py;
model_loader/default_loader.py; attention/backends/flash_attn.py), which reads config.json by transformers' classes; llama.cpp of 2026
(convert_hf_to_gguf.py with conversion/base.py, conversion/llama.py, conversion/qwen.py; src/models/llama.cpp, qwen2.cpp, qwen3.cpp), which does so too
where transformers is there.
"""

from collections.abc import Mapping, Sequence
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
    head_there,
    known_tokenizer,
    named,
    no_code,
    row_rules,
    says,
    tokenizer_there,
)
from minitron.hand_over.rules_experts import OF_QWEN3_MOE, dense_layers

VLLM_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
QWEN_ROPES = ("default", "linear", "yarn")
LLAMA_ROPES = (*QWEN_ROPES, "llama3")  # what llama.cpp's converter for Llama and Mistral makes a table of frequencies for
LLAMA_CPP_LLAMA3_POSITIONS = 8192  # of training before scaling, where config.json has them at its top level not
ROWS = ("hidden_size", "intermediate_size", "num_attention_heads × head_dim")


def rope_of(folder: Folder) -> Mapping[str, Any]:
    """The rotary positions' parameters, from either spelling, as transformers reads them: rope_scaling goes before rope_parameters."""
    parameters = folder.config.get("rope_scaling") or folder.config.get("rope_parameters") or {}
    theta = parameters.get("rope_theta", folder.config.get("rope_theta", 10_000.0))
    return {**parameters, "rope_type": parameters.get("rope_type", parameters.get("type", "default")), "rope_theta": theta}


def rope_text(rope: Mapping[str, Any]) -> str:
    """What is shown of them."""
    scaled = f" from {rope['original_max_position_embeddings']} positions" if "original_max_position_embeddings" in rope else ""
    return f"{rope['rope_type']}{scaled}, theta {rope['rope_theta']:g}"


def _rope_text(folder: Folder) -> str:
    return rope_text(rope_of(folder))


def both_rope_spellings(folder: Folder) -> bool:
    """What programs from before rope_parameters need: theta, and the scaling where there is one."""
    rope = rope_of(folder)
    scaled = rope["rope_type"] == "default" or bool(folder.config.get("rope_scaling"))
    return folder.config.get("rope_theta") == rope["rope_theta"] and scaled


def _llama3_is_read(folder: Folder) -> bool:
    rope = rope_of(folder)
    read = folder.config.get("original_max_position_embeddings", LLAMA_CPP_LLAMA3_POSITIONS)
    return rope["rope_type"] != "llama3" or rope.get("original_max_position_embeddings", folder.size("max_position_embeddings")) == read


def types_fit(folder: Folder) -> bool:
    """`layer_types` is absent or has an entry for every layer."""
    types = folder.config.get("layer_types")
    return types is None or len(types) == folder.size("num_hidden_layers")


def types_text(folder: Folder) -> str:
    """How many entries it has."""
    types = folder.config.get("layer_types")
    return "absent" if types is None else f"{len(types):,} entries"


def windows_text(windowed: Sequence[bool]) -> str:
    """In how many layers there is a window."""
    return f"windows in {sum(windowed):,} of {len(windowed):,} layers"


def _qwen_windows(folder: Folder) -> list[bool]:
    """Of every layer, whether it has a window: as layer_types says, else from the layer max_window_layers on; none unless use_sliding_window says so."""
    num_layers, types = folder.size("num_hidden_layers"), folder.config.get("layer_types")
    if not folder.config.get("use_sliding_window") or folder.config.get("sliding_window") is None:
        return [False] * num_layers
    return [layer >= folder.size("max_window_layers") for layer in range(num_layers)] if types is None else [one == "sliding_attention" for one in types]


def _numbered_windows(folder: Folder) -> bool:
    windowed = _qwen_windows(folder)
    return not any(windowed) or windowed == [layer >= folder.size("max_window_layers") for layer in range(len(windowed))]


def block_rules(model_type: str, of_class: str, head_dim_else: str, row_advice: tuple[Rule, ...] = row_rules(*ROWS)) -> tuple[Rule, ...]:
    """What is asked of every folder of blocks."""
    return (
        Rule(TRANSFORMERS, "model_type", f"must be {model_type}", says("model_type", model_type)),
        Rule(TRANSFORMERS, "head_dim", f"must be given: {head_dim_else} is taken", given("head_dim")),
        head_there(TRANSFORMERS, "it would be made up at random"),
        has_class(VLLM, of_class),
        Rule(VLLM, "head_dim", "must be a multiple of 8 and at most 256, for FlashAttention", fits_flash_attention),
        Rule(VLLM, "num_key_value_heads", "must divide num_attention_heads", divides("num_key_value_heads", "num_attention_heads")),
        Rule(VLLM, "max_position_embeddings", "must be given: it is the longest context served", given("max_position_embeddings")),
        head_there(VLLM, "its logits would be of whatever is in memory"),
        named(VLLM, "model.", "lm_head."),
        tokenizer_there("tokenizer.json", "tokenizer.model"),
        has_class(LLAMA_CPP, of_class),
        Rule(LLAMA_CPP, "head_dim", "must be given, and even", lambda folder: folder.size("head_dim") > 0 and folder.size("head_dim") % 2 == 0),
        Rule(LLAMA_CPP, "num_key_value_heads", "must divide num_attention_heads", divides("num_key_value_heads", "num_attention_heads")),
        Rule(LLAMA_CPP, "intermediate_size", "must be given", given("intermediate_size")),
        Rule(LLAMA_CPP, "max_position_embeddings", "must be given", given("max_position_embeddings")),
        Rule(LLAMA_CPP, "rms_norm_eps", "must be given", lambda folder: "rms_norm_eps" in folder.config),
        head_there(LLAMA_CPP, "the embeddings are taken in its place"),
        named(LLAMA_CPP, "model.", "lm_head."),
        known_tokenizer(lambda folder: False if folder.own_tokenizer else True if "tokenizer.model" in folder.files else None),
        *row_advice,
        no_code(TRANSFORMERS),
    )


def _llama_kind(model_type: str, of_class: str, head_dim_else: str, llama_cpp_ropes: tuple[str, ...], *row_advice: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """And of those whose FFN is gated by silu and whose layers all turn positions alike."""
    return (
        *block_rules(model_type, of_class, head_dim_else, *row_advice),
        Rule(TRANSFORMERS, "rope_theta", "must be at the top level too, and rope_scaling where positions are scaled: versions before 5 read nothing else",
             both_rope_spellings, _rope_text),
        Rule(VLLM, "hidden_act", "must be silu: it knows no other", says("hidden_act", "silu", None)),
        Rule(VLLM, "rope_parameters", f"must be of a type it knows ({', '.join(VLLM_ROPE_TYPES)})",
             lambda folder: rope_of(folder)["rope_type"] in VLLM_ROPE_TYPES, _rope_text),
        Rule(LLAMA_CPP, "hidden_act", "must be absent or silu: it always computes that", says("hidden_act", "silu", None)),
        Rule(LLAMA_CPP, "rope_parameters", f"must be of a type that it turns this model's positions by ({', '.join(llama_cpp_ropes)})",
             lambda folder: rope_of(folder)["rope_type"] in llama_cpp_ropes, _rope_text),
    )  # fmt: skip


_LLAMA3_POSITIONS = Rule(
    LLAMA_CPP, "original_max_position_embeddings", f"must be {LLAMA_CPP_LLAMA3_POSITIONS} where llama3 scales positions, or at the top level: it is "
    "looked for nowhere else", _llama3_is_read, _rope_text)  # fmt: skip
_QWEN_WINDOWS = (
    Rule(TRANSFORMERS, "layer_types", "must be absent, or have an entry for every layer", types_fit, types_text),
    Rule(TRANSFORMERS, "max_window_layers", "should be the first layer with a window, all later ones having it: versions before 4.53 read nothing else",
         _numbered_windows, is_advice=True),
    Rule(VLLM, "use_sliding_window", "must be false, or be of all layers: windows in some it refuses, and computes none where max_window_layers says so",
         lambda folder: len(set(_qwen_windows(folder))) == 1, lambda folder: windows_text(_qwen_windows(folder))),
    Rule(LLAMA_CPP, "use_sliding_window", "must be false: it has no windows", lambda folder: not any(_qwen_windows(folder)),
         lambda folder: windows_text(_qwen_windows(folder))),
)  # fmt: skip


def square_attention(program: str) -> Rule:
    """Of programs that know no head_dim."""
    return Rule(program, "num_attention_heads × head_dim", "must be hidden_size: head_dim is not read, hidden_size / num_attention_heads is taken",
                lambda folder: folder.size("num_attention_heads") * folder.size("head_dim") == folder.size("hidden_size"),
                lambda folder: f"{folder.size('num_attention_heads') * folder.size('head_dim'):,}")  # fmt: skip


LLAMA_RULES = (
    *_llama_kind("llama", "LlamaForCausalLM", "hidden_size / num_attention_heads", LLAMA_ROPES),
    Rule(TRANSFORMERS, "hidden_size", "must be a multiple of num_attention_heads", divides("num_attention_heads", "hidden_size")),
    _LLAMA3_POSITIONS,
)
MISTRAL_RULES = (
    *_llama_kind("mistral", "MistralForCausalLM", "hidden_size / num_attention_heads", LLAMA_ROPES),
    _LLAMA3_POSITIONS,
    Rule(TRANSFORMERS, "sliding_window", "must be there, null for no window: 4,096 is taken", lambda folder: "sliding_window" in folder.config),
    Rule(VLLM, "layer_types", "must be absent: windows would be where it says, and transformers has them in all layers or in none",
         lambda folder: folder.config.get("layer_types") is None, types_text),
    Rule(LLAMA_CPP, "sliding_window", "must be null, or no fewer tokens than max_position_embeddings: it has no windows",
         lambda folder: not folder.size("sliding_window") or folder.size("sliding_window") >= folder.size("max_position_embeddings")),
)  # fmt: skip
QWEN2_RULES = (
    *_llama_kind("qwen2", "Qwen2ForCausalLM", "hidden_size / num_attention_heads", QWEN_ROPES),
    *_QWEN_WINDOWS,
    square_attention(VLLM),
    square_attention(LLAMA_CPP),
)
QWEN3_RULES = (
    *_llama_kind("qwen3", "Qwen3ForCausalLM", "128", QWEN_ROPES),
    *_QWEN_WINDOWS,
    Rule(VLLM, "attention_bias", "must be false: its output projection has no bias", says("attention_bias", False, None)),
    Rule(LLAMA_CPP, "attention_bias", "must be false: its output projection has no bias", says("attention_bias", False, None)),
)
_MOE_ROWS = row_rules(*ROWS, "moe_intermediate_size", unused=lambda folder: () if dense_layers(folder) else ("intermediate_size",))
QWEN3_MOE_RULES = (
    *_llama_kind("qwen3_moe", "Qwen3MoeForCausalLM", "hidden_size / num_attention_heads", QWEN_ROPES, _MOE_ROWS),
    *OF_QWEN3_MOE,
)
