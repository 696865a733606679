"""What other programs ask of a folder of Granite-4-H: blocks of Mamba-2 or attention, dense or with experts.

Read in their sources: transformers 5.23 (models/granitemoehybrid, configuration_*.py and modeling_*.py; integrations/moe.py); vLLM 0.32.0 and later
(models/granitemoehybrid.py, granitemoe.py, granitemoeshared.py; mamba/mamba_mixer2.py), which reads config.json by transformers' class; llama.cpp of 2026
(conversion/granite.py, mamba.py; src/models/granite-hybrid.cpp), whose converter reads config.json itself and makes a plain Granite of a model without Mamba-2.
"""

from minitron.families.row_lengths import CONV_MULTIPLE
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
from minitron.hand_over.rules_blocks import both_rope_spellings, rope_of, rope_text, square_attention, types_fit, types_text
from minitron.hand_over.rules_experts import VLLM_CPU_MULTIPLE, expert_rows
from minitron.hand_over.rules_mamba2 import inner_size, is_full_range, is_power_of_two

CLASS = "GraniteMoeHybridForCausalLM"
MAMBA, ATTENTION = "mamba", "attention"
LLAMA_CPP_EXPAND, LLAMA_CPP_VOCABULARY = 2, 8


def _types(folder: Folder) -> list:
    return list(folder.config.get("layer_types") or ())


def _has_mamba(folder: Folder) -> bool:
    return any(kind != ATTENTION for kind in _types(folder))


def _has_experts(folder: Folder) -> bool:
    return folder.size("num_local_experts") > 0


def _old_words(folder: Folder) -> bool:
    types = _types(folder)
    return len(types) == folder.size("num_hidden_layers") and set(types) <= {MAMBA, ATTENTION}


def _words(folder: Folder) -> str:
    return ", ".join(dict.fromkeys(map(str, _types(folder)))) or "absent"


def _inner(folder: Folder) -> int:
    return inner_size(folder, "mamba_n_heads", "mamba_d_head")


def _in_proj_rows(folder: Folder) -> int:
    return 2 * _inner(folder) + 2 * folder.size("mamba_n_groups") * folder.size("mamba_d_state") + folder.size("mamba_n_heads")


def _turns(folder: Folder) -> bool:
    return folder.config.get("position_embedding_type") == "rope"


_EXPERT_ROWS = expert_rows(lambda _: "hidden_size", "intermediate_size")
_OLD_WORDS = "must have mamba or attention for every layer: it knows no other words"
RULES = (
    Rule(TRANSFORMERS, "model_type", "must be granitemoehybrid", says("model_type", "granitemoehybrid")),
    Rule(TRANSFORMERS, "mamba_n_heads × mamba_d_head", "must be mamba_expand × hidden_size, whatever the layers are",
         lambda folder: 0 < _inner(folder) == folder.size("mamba_expand") * folder.size("hidden_size"),
         lambda folder: f"{_inner(folder):,}, {folder.size('mamba_expand')} × {folder.size('hidden_size'):,}"),
    Rule(TRANSFORMERS, "layer_types", "must have an entry for every layer: without it all have Mamba-2",
         lambda folder: bool(_types(folder)) and types_fit(folder), types_text),
    Rule(TRANSFORMERS, "num_local_experts", "must be given, 0 where there are none: 8 are taken", lambda folder: "num_local_experts" in folder.config),
    Rule(TRANSFORMERS, "shared_intermediate_size", "must be given: 1,024 are taken", given("shared_intermediate_size")),
    Rule(TRANSFORMERS, "rope_theta", "must be at the top level too where positions are turned, and rope_scaling where they are scaled: versions before 5 read "
         "nothing else", lambda folder: not _turns(folder) or both_rope_spellings(folder), lambda folder: rope_text(rope_of(folder))),
    Rule(TRANSFORMERS, _EXPERT_ROWS.field, _EXPERT_ROWS.rule, lambda folder: not _has_experts(folder) or _EXPERT_ROWS.holds(folder), _EXPERT_ROWS.shown),
    Rule(TRANSFORMERS, "rows of in_proj", f"should be a multiple of {CONV_MULTIPLE}: the causal_conv1d kernel takes no other strides",
         lambda folder: not _has_mamba(folder) or _in_proj_rows(folder) % CONV_MULTIPLE == 0, lambda folder: f"{_in_proj_rows(folder):,}", is_advice=True),
    head_there(TRANSFORMERS, "it would be made up at random"),
    has_class(VLLM, CLASS),
    Rule(VLLM, "layer_types", _OLD_WORDS, _old_words, _words),
    square_attention(VLLM),
    Rule(VLLM, "head_dim", "must be a multiple of 8 and at most 256, for FlashAttention", fits_flash_attention),
    Rule(VLLM, "num_key_value_heads", "must divide num_attention_heads", divides("num_key_value_heads", "num_attention_heads")),
    Rule(VLLM, "hidden_act", "must be silu: it knows no other", says("hidden_act", "silu", None)),
    Rule(VLLM, "mamba_n_groups", "must divide mamba_n_heads", divides("mamba_n_groups", "mamba_n_heads")),
    Rule(VLLM, "mamba_d_conv", "must be 2 to 4", lambda folder: 2 <= folder.size("mamba_d_conv") <= 4),
    Rule(VLLM, "mamba_chunk_size", "must be a power of two", lambda folder: is_power_of_two(folder, "mamba_chunk_size")),
    Rule(VLLM, "time_step_limit", "must be 0 to infinity: it always computes that", is_full_range),
    Rule(VLLM, "max_position_embeddings", "must be given: it is the longest context served", given("max_position_embeddings")),
    Rule(VLLM, "hidden_size", f"should be a multiple of {VLLM_CPU_MULTIPLE} for a CPU where there are experts: its kernels for them there take no other",
         lambda folder: not _has_experts(folder) or folder.size("hidden_size") % VLLM_CPU_MULTIPLE == 0, is_advice=True),
    head_there(VLLM, "its logits would be of whatever is in memory"),
    named(VLLM, "model.", "lm_head."),
    tokenizer_there("tokenizer.json", "tokenizer.model"),
    has_class(LLAMA_CPP, CLASS),
    Rule(LLAMA_CPP, "layer_types", _OLD_WORDS, _old_words, _words),
    square_attention(LLAMA_CPP),
    Rule(LLAMA_CPP, "num_key_value_heads", "must divide num_attention_heads", divides("num_key_value_heads", "num_attention_heads")),
    Rule(LLAMA_CPP, "position_embedding_type", "must be rope where all layers have attention, and another where some have Mamba-2: it takes no notice of it",
         lambda folder: _turns(folder) != _has_mamba(folder)),
    Rule(LLAMA_CPP, "hidden_act", "must be absent or silu: it always computes that", says("hidden_act", "silu", None)),
    Rule(LLAMA_CPP, "intermediate_size", "must be shared_intermediate_size where there are no experts: it makes the feed-forward layer that wide",
         lambda folder: folder.size("intermediate_size") > 0
         and (_has_experts(folder) or folder.size("intermediate_size") == folder.size("shared_intermediate_size"))),
    Rule(LLAMA_CPP, "num_experts_per_tok", "must be above 0 where there are experts, else 0 or absent: a model with it is taken for a mixture",
         lambda folder: (folder.size("num_experts_per_tok") > 0) == _has_experts(folder)),
    Rule(LLAMA_CPP, "mamba_expand", f"must be {LLAMA_CPP_EXPAND} where layers have Mamba-2: its loader takes no other",
         lambda folder: folder.size("mamba_expand") == LLAMA_CPP_EXPAND or not _has_mamba(folder)),
    Rule(LLAMA_CPP, "mamba_n_groups", "must divide mamba_n_heads", divides("mamba_n_groups", "mamba_n_heads")),
    Rule(LLAMA_CPP, "mamba_proj_bias", "must be false where layers have Mamba-2: its projections have no biases",
         lambda folder: not folder.config.get("mamba_proj_bias") or not _has_mamba(folder)),
    Rule(LLAMA_CPP, "time_step_limit", "must be 0 to infinity: it always computes that", is_full_range),
    Rule(LLAMA_CPP, "vocab_size", f"must be a multiple of {LLAMA_CPP_VOCABULARY} where layers have Mamba-2: it pads the list of tokens to one, the embeddings "
         "not", lambda folder: folder.size("vocab_size") % LLAMA_CPP_VOCABULARY == 0 or not _has_mamba(folder)),
    Rule(LLAMA_CPP, "max_position_embeddings", "must be given", given("max_position_embeddings")),
    Rule(LLAMA_CPP, "rms_norm_eps", "must be given", lambda folder: "rms_norm_eps" in folder.config),
    head_there(LLAMA_CPP, "the embeddings are taken in its place"),
    named(LLAMA_CPP, "model.", "lm_head."),
    known_tokenizer(lambda folder: False if folder.own_tokenizer else True if "tokenizer.model" in folder.files else None),
    *row_rules("hidden_size", "intermediate_size", "shared_intermediate_size", "mamba_n_heads × mamba_d_head",
               unused=lambda folder: () if _has_mamba(folder) else ("mamba_n_heads × mamba_d_head",)),
    no_code(TRANSFORMERS),
)  # fmt: skip
