"""What other programs ask of a folder of Mamba-2 layers alone; what they ask of such a layer, a NemotronH has too (rules_nemotron_h.py).

Read in their sources: transformers 5.23 and 4.50 to 5.22 (models/mamba2, configuration_*.py and modeling_*.py); vLLM 0.32.0 (models/mamba2.py,
mamba/mamba_mixer2.py, mamba/ops/ssd_combined.py, config/model.py); llama.cpp of 2026 (conversion/mamba.py; src/models/mamba2.cpp).
"""

import math

from minitron.families.row_lengths import CONV_MULTIPLE
from minitron.hand_over.compatibility import (
    LLAMA_CPP,
    TRANSFORMERS,
    VLLM,
    Folder,
    Rule,
    divides,
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

CLASS = "Mamba2ForCausalLM"
LLAMA_CPP_EXPAND, LLAMA_CPP_VOCABULARY = 2, 16
OTHER_INNER_SIZES = ("mamba_d_ssm", "intermediate_size", "d_inner")  # what llama.cpp, and vLLM of the second, take before expand × hidden_size


def inner_size(folder: Folder, heads: str, head_dim: str) -> int:
    """Channels of all heads."""
    return folder.size(heads) * folder.size(head_dim)


def is_full_range(folder: Folder) -> bool:
    """Time steps are not bounded."""
    return list(folder.config.get("time_step_limit", [0.0, math.inf])) == [0.0, math.inf]


def is_power_of_two(folder: Folder, key: str) -> bool:
    """The field's number is 1, 2, 4 and so on, or not there."""
    size = folder.size(key)
    return key not in folder.config or (size > 0 and size & (size - 1) == 0)


def mixer_rules(*, heads: str, head_dim: str, state: str, activation: str) -> tuple[Rule, ...]:
    """What is asked of a Mamba-2 layer, given what config.json calls its sizes and its activation."""

    def in_proj_rows(folder: Folder) -> int:
        return 2 * inner_size(folder, heads, head_dim) + 2 * folder.size("n_groups") * folder.size(state) + folder.size(heads)

    return (
        Rule(VLLM, activation, "must be silu, which its kernels know", says(activation, "silu", None)),
        Rule(VLLM, "n_groups", f"must divide {heads}", divides("n_groups", heads)),
        Rule(VLLM, "conv_kernel", "must be 2 to 4", lambda folder: 2 <= folder.size("conv_kernel") <= 4),
        Rule(VLLM, "chunk_size", "must be a power of two", lambda folder: is_power_of_two(folder, "chunk_size")),
        Rule(VLLM, "time_step_limit", "must be 0 to infinity: it always computes that", is_full_range),
        Rule(LLAMA_CPP, "n_groups", f"must divide {heads}", divides("n_groups", heads)),
        Rule(LLAMA_CPP, "use_bias", "must be false: its Mamba-2 projections have no biases", says("use_bias", False, None)),
        Rule(TRANSFORMERS, "rows of in_proj", f"should be a multiple of {CONV_MULTIPLE}: the causal_conv1d kernel takes no other strides",
             lambda folder: in_proj_rows(folder) % CONV_MULTIPLE == 0, lambda folder: f"{in_proj_rows(folder):,}", is_advice=True),
    )  # fmt: skip


def _inner(folder: Folder) -> int:
    return inner_size(folder, "num_heads", "head_dim")


def _other_inner(folder: Folder) -> str:
    return ", ".join(f"{name} {folder.config[name]}" for name in OTHER_INNER_SIZES if name in folder.config) or "absent"


def _inner_agrees(folder: Folder) -> bool:
    return all(folder.size(name) == _inner(folder) for name in OTHER_INNER_SIZES if name in folder.config)


RULES = (
    Rule(TRANSFORMERS, "model_type", "must be mamba2", says("model_type", "mamba2")),
    Rule(TRANSFORMERS, "num_heads × head_dim", "must be expand × hidden_size",
         lambda folder: 0 < _inner(folder) == folder.size("expand") * folder.size("hidden_size"),
         lambda folder: f"{_inner(folder):,}, {folder.size('expand')} × {folder.size('hidden_size'):,}"),
    Rule(TRANSFORMERS, "n_groups", "must be given: 8 are taken", given("n_groups")),
    Rule(TRANSFORMERS, "groups of the gated norm", "should be 1: versions before 5.23 norm all groups together, another model",
         lambda folder: folder.size("n_groups") == 1, lambda folder: f"{folder.size('n_groups')}", is_advice=True),
    head_there(TRANSFORMERS, "it would be made up at random"),
    has_class(VLLM, CLASS),
    *mixer_rules(heads="num_heads", head_dim="head_dim", state="state_size", activation="hidden_act"),
    Rule(VLLM, "inner size", "must be num_heads × head_dim by whatever name it is given: expand comes last", _inner_agrees, _other_inner),
    Rule(VLLM, "max_position_embeddings", "should be given: 2,048 tokens are the longest context served where neither it nor --max-model-len says another",
         given("max_position_embeddings"), is_advice=True),
    head_there(VLLM, "its logits would be of whatever is in memory"),
    named(VLLM, "backbone.", "lm_head."),
    tokenizer_there("tokenizer.json", "tokenizer.model"),
    has_class(LLAMA_CPP, CLASS),
    Rule(LLAMA_CPP, "expand", f"must be {LLAMA_CPP_EXPAND}: its converter takes no other", says("expand", LLAMA_CPP_EXPAND)),
    Rule(LLAMA_CPP, "inner size", "must be num_heads × head_dim by whatever name it is given: expand comes last", _inner_agrees, _other_inner),
    Rule(LLAMA_CPP, "hidden_act", "must be silu: it always computes that", says("hidden_act", "silu", None)),
    Rule(LLAMA_CPP, "use_conv_bias", "must be true: its loader asks for that bias", says("use_conv_bias", True, None)),
    Rule(LLAMA_CPP, "time_step_limit", "must be 0 to infinity: it always computes that", is_full_range),
    Rule(LLAMA_CPP, "vocab_size", f"must be a multiple of {LLAMA_CPP_VOCABULARY}: it pads the list of tokens to one, the embeddings not",
         lambda folder: folder.size("vocab_size") % LLAMA_CPP_VOCABULARY == 0),
    head_there(LLAMA_CPP, "the embeddings are taken in its place"),
    named(LLAMA_CPP, "backbone.", "lm_head."),
    known_tokenizer(lambda folder: False if folder.own_tokenizer else True if "tokenizer.model" in folder.files else None),
    *row_rules("hidden_size", "num_heads × head_dim"),
    no_code(TRANSFORMERS),
)  # fmt: skip
