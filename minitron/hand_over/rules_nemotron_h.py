"""What other programs ask of a NemotronH folder; of its experts, see rules_experts.py.

Read in their sources: transformers 5.23; vLLM 0.32.0 (models/nemotron_h.py, mamba/mamba_mixer2.py, mamba/ops/ssd_combined.py, attention/backends/
flash_attn.py); llama.cpp's convert_hf_to_gguf.py of 2026 (NemotronHForCausalLM and its parents) with the tensors its loader creates; mlx-lm of 2026
(mlx_lm/models/nemotron_h.py); TensorRT-LLM of 2026 (tensorrt_llm/_torch/models/modeling_nemotron_h.py, pyexecutor/config_utils.py). What the configuration
class beside NVIDIA's published weights does with layers_block_type: huggingface/transformers #45300, ml-explore/mlx-lm #1857, NVIDIA/TensorRT-LLM #19168.
"""

from memory_budget.configs.mamba import BLOCK_TYPE_LETTERS
from minitron.hand_over.compatibility import (
    LLAMA_CPP,
    MLX_LM,
    REMOTE_CODE,
    TENSORRT_LLM,
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
from minitron.hand_over.rules_experts import nemotron_h_rules
from minitron.hand_over.rules_mamba2 import inner_size, mixer_rules

CLASS = "NemotronHForCausalLM"


def pattern_of(folder: Folder) -> str:
    """One letter a layer, from either spelling; ? for what is no kind of layer."""
    text = folder.config.get("hybrid_override_pattern")
    names = folder.config.get("layers_block_type") or ()
    return text if isinstance(text, str) else "".join(BLOCK_TYPE_LETTERS.get(name, "?") for name in names)


def _inner(folder: Folder) -> int:
    return inner_size(folder, "mamba_num_heads", "mamba_head_dim")


def _is_plain_pattern(folder: Folder) -> bool:
    text = folder.config.get("hybrid_override_pattern")
    return isinstance(text, str) and set(text) <= set("M*-E") and 0 < len(text) == folder.size("num_hidden_layers")


def _is_known_pattern(folder: Folder) -> bool:
    return pattern_of(folder) != "" and set(pattern_of(folder)) <= set("M*-E")


def _has_older_names(folder: Folder) -> bool:
    names = folder.config.get("layers_block_type") or ()
    return bool(names) and set(names) <= {"mamba", "attention", "mlp", "moe"}


def _rows_of_no_layer(folder: Folder) -> list[str]:
    return [name for name, letter in ROWS_OF.items() if letter not in pattern_of(folder)]


def _absent_keys(folder: Folder) -> str:
    return ", ".join(key for key in MLX_LM_KEYS if key not in folder.config)


# Sizes that are rows of matrices, by the letter of the layers that have them.
ROWS_OF = {"intermediate_size": "-", "moe_intermediate_size": "E", "moe_shared_expert_intermediate_size": "E"}
# mlx-lm's arguments without a default.
MLX_LM_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "num_attention_heads", "num_key_value_heads",
    "attention_bias", "mamba_num_heads", "mamba_head_dim", "mamba_proj_bias", "ssm_state_size", "conv_kernel", "n_groups", "mlp_bias", "layer_norm_epsilon",
    "use_bias", "use_conv_bias",
)  # fmt: skip
RULES = (
    Rule(TRANSFORMERS, "model_type", "must be nemotron_h", says("model_type", "nemotron_h")),
    Rule(TRANSFORMERS, "head_dim", "must be given: attention_head_dim is not read, and 128 is taken", given("head_dim")),
    Rule(TRANSFORMERS, "hybrid_override_pattern", "must hold a *: its cache asks an attention layer how long it is", lambda folder: "*" in pattern_of(folder)),
    has_class(VLLM, CLASS),
    Rule(VLLM, "hybrid_override_pattern", "must be of M, *, - and E", _is_known_pattern),
    Rule(VLLM, "num_hidden_layers", "must be the pattern's length", lambda folder: folder.size("num_hidden_layers") == len(pattern_of(folder))),
    Rule(VLLM, "head_dim", "must be a multiple of 8 and at most 256, for FlashAttention", fits_flash_attention),
    Rule(VLLM, "num_key_value_heads", "must divide num_attention_heads", divides("num_key_value_heads", "num_attention_heads")),
    Rule(VLLM, "attention_bias", "must be false: its attention has no biases", says("attention_bias", False, None)),
    Rule(VLLM, "mlp_hidden_act", "must be relu2: it always computes that", says("mlp_hidden_act", "relu2", None)),
    *mixer_rules(heads="mamba_num_heads", head_dim="mamba_head_dim", state="ssm_state_size", activation="mamba_hidden_act"),
    Rule(VLLM, "tie_word_embeddings", "must be false: it reads lm_head.weight", says("tie_word_embeddings", False, None)),
    Rule(VLLM, "max_position_embeddings", "must be given: it is the longest context served", given("max_position_embeddings")),
    named(VLLM, "backbone.", "lm_head."),
    tokenizer_there("tokenizer.json"),
    has_class(LLAMA_CPP, CLASS),
    Rule(LLAMA_CPP, "hybrid_override_pattern", "must be a string of M, *, - and E, num_hidden_layers long: it does not know all of transformers' names",
         _is_plain_pattern),
    Rule(LLAMA_CPP, "rms_norm_eps", "must be there, equal to layer_norm_epsilon: the loader asks for it, and the other is not converted to it",
         lambda folder: folder.config.get("rms_norm_eps", folder.config.get("norm_eps")) == folder.config.get("layer_norm_epsilon", 1e-5)),
    Rule(LLAMA_CPP, "head_dim", "must be given", given("head_dim", "attention_head_dim")),
    Rule(LLAMA_CPP, "mamba_num_heads × mamba_head_dim", "must be a multiple of 64, or of mamba_d_head where that is given",
         lambda folder: _inner(folder) > 0 and _inner(folder) % (folder.size("mamba_d_head") or 64) == 0,
         lambda folder: f"{_inner(folder):,}"),
    Rule(LLAMA_CPP, "conv_kernel", "must be given", given("conv_kernel", "d_conv")),
    Rule(LLAMA_CPP, "ssm_state_size", "must be given", given("ssm_state_size", "state_size", "d_state")),
    Rule(LLAMA_CPP, "intermediate_size", "must be given", given("intermediate_size")),
    Rule(LLAMA_CPP, "hidden_act", "must be absent or silu", says("hidden_act", "silu", None)),
    Rule(LLAMA_CPP, "mlp_hidden_act", "must be relu2: it always computes that", says("mlp_hidden_act", "relu2", None)),
    Rule(LLAMA_CPP, "vocab_size", "must be a multiple of 8: it pads the list of tokens to one, the embeddings not",
         lambda folder: folder.size("vocab_size") % 8 == 0),
    named(LLAMA_CPP, "backbone.", "lm_head."),
    known_tokenizer(lambda folder: False if folder.own_tokenizer else None),
    *row_rules("hidden_size", *ROWS_OF, "num_attention_heads × head_dim", "mamba_num_heads × mamba_head_dim", unused=_rows_of_no_layer),
    no_code(TRANSFORMERS),
    Rule(REMOTE_CODE, "layers_block_type", "must be absent: there it is a property that cannot be set",
         lambda folder: not {"layers_block_type", "layer_types"} & set(folder.config),
         lambda folder: ", ".join(sorted({"layers_block_type", "layer_types"} & set(folder.config))) or "absent"),
    Rule(REMOTE_CODE, "hybrid_override_pattern", "must be a string of M, *, - and E, num_hidden_layers long", _is_plain_pattern),
    Rule(MLX_LM, "hybrid_override_pattern", "must be given: of the newer names of layers it knows mlp alone",
         lambda folder: bool(folder.config.get("hybrid_override_pattern") or _has_older_names(folder))),
    Rule(MLX_LM, "sizes and biases", "must all be given: it has no defaults for them", lambda folder: not _absent_keys(folder),
         lambda folder: f"without {missing}" if (missing := _absent_keys(folder)) else "all there"),
    Rule(MLX_LM, "mamba_proj_bias", "must be use_bias, which others read in its place",
         lambda folder: folder.config.get("mamba_proj_bias") == folder.config.get("use_bias")),
    Rule(MLX_LM, "attention_bias", "must be false: the attention has no biases", says("attention_bias", False)),
    Rule(TENSORRT_LLM, "hybrid_override_pattern", "must be of M, *, - and E", _is_known_pattern),
    Rule(TENSORRT_LLM, "rms_norm_eps", "must be there, equal to layer_norm_epsilon: it reads no other",
         lambda folder: folder.config.get("rms_norm_eps") == folder.config.get("layer_norm_epsilon", 1e-5)),
    Rule(TENSORRT_LLM, "num_hidden_layers", "must be the pattern's length", lambda folder: folder.size("num_hidden_layers") == len(pattern_of(folder))),
    Rule(TENSORRT_LLM, "mlp_bias", "must be false: its FFN has no biases", says("mlp_bias", False, None)),
    Rule(TENSORRT_LLM, "mlp_hidden_act", "must be relu2: it always computes that", says("mlp_hidden_act", "relu2", None)),
    *nemotron_h_rules(pattern_of),
)  # fmt: skip
