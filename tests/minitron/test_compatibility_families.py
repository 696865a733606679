"""Every rule of another program for a folder of blocks or of Mamba-2 is held by a case that breaks it alone; what is handed over breaks none."""

import math
from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.families.known import FAMILIES
from minitron.hand_over.compatibility import Folder, check_folder
from minitron.hand_over.rules import RULES

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "factor": 8.0}
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
         "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False,
         "tie_word_embeddings": True, "rope_theta": 1000000.0, "rope_scaling": None}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
ONE_IN_SIX = ([SLIDING] * 5 + [FULL]) * 2 + [SLIDING] * 4
QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 16, "layer_types": [FULL] * 16}
GOOD = {
    "llama": SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3,
                      "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "mistral": SIZES | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": SIZES | QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": SIZES | QWEN | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128},
    "qwen3_moe": SIZES | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "use_sliding_window": False, "sliding_window": None},
    "gemma3_text": SIZES | {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 64,
        "sliding_window": 512, "sliding_window_pattern": 6, "layer_types": ONE_IN_SIX, "rope_local_base_freq": 10000.0, "rope_scaling": LINEAR,
        "rope_parameters": {FULL: {**LINEAR, "rope_theta": 1000000.0}, SLIDING: {"rope_type": "default", "rope_theta": 10000.0}},
        "attn_logit_softcapping": None, "use_bidirectional_attention": False},
    "mamba2": {
        "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "hidden_size": 2560, "num_hidden_layers": 64, "vocab_size": 50288, "expand": 2,
        "num_heads": 80, "head_dim": 64, "n_groups": 1, "state_size": 128, "conv_kernel": 4, "chunk_size": 256, "hidden_act": "silu", "use_bias": False,
        "use_conv_bias": True, "time_step_limit": [0.0, math.inf], "tie_word_embeddings": True, "max_position_embeddings": 131072},
    "granitemoehybrid": {
        "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "hidden_size": 1536, "num_hidden_layers": 4, "vocab_size": 100352,
        "layer_types": ["mamba", "mamba", "attention", "mamba"], "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 128, "hidden_act": "silu",
        "intermediate_size": 512, "shared_intermediate_size": 1024, "num_local_experts": 64, "num_experts_per_tok": 6, "mamba_expand": 2, "mamba_n_heads": 48,
        "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_chunk_size": 256, "mamba_proj_bias": False,
        "position_embedding_type": "nope", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 10000},
}  # fmt: skip
BLOCKS = [family for family in GOOD if family != "mamba2"]
TENSORS = dict.fromkeys(BLOCKS, ("model.embed_tokens.weight", "model.norm.weight")) | {"mamba2": ("backbone.embeddings.weight",)}
FILES = ("config.json", "tokenizer.json")
GONE = object()
EVERYWHERE = {(program, "lm_head.weight") for program in ("transformers", "vLLM", "llama.cpp")}
PRODUCT = "num_attention_heads × head_dim"


def both(field: str) -> set[tuple[str, str]]:
    return {("vLLM", field), ("llama.cpp", field)}


# (what is changed, the rules that no longer hold), of every family; then of those of blocks; then of blocks whose layers turn positions alike.
ALL = {
    "model_type": ({"model_type": "gpt2"}, {("transformers", "model_type")}),
    "not tied, no head": ({"tie_word_embeddings": False}, EVERYWHERE),
    "class": ({"architectures": ["MistralModel"]}, both("architectures")),
    "code": ({"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, {("transformers", "auto_map")}),
}
OF_BLOCKS = ALL | {
    "no head_dim": ({"head_dim": GONE}, {("transformers", "head_dim")} | both("head_dim")),
    "head_dim of no kernel": ({"head_dim": 20}, {("vLLM", "head_dim")}),
    "odd head_dim": ({"head_dim": 15}, both("head_dim")),
    "KV heads": ({"num_key_value_heads": 7}, both("num_key_value_heads")),
    "no length": ({"max_position_embeddings": GONE}, both("max_position_embeddings")),
    "ffn": ({"intermediate_size": GONE}, {("llama.cpp", "intermediate_size")}),
    "epsilon": ({"rms_norm_eps": GONE}, {("llama.cpp", "rms_norm_eps")}),
}
LLAMA_KIND = OF_BLOCKS | {
    "only the new spelling": ({"rope_theta": GONE, "rope_scaling": GONE, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
                              {("transformers", "rope_theta")}),
    "scaling only in the new spelling": ({"rope_scaling": GONE, "rope_theta": 5e5, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}},
                                         {("transformers", "rope_theta")}),
    "activation": ({"hidden_act": "gelu"}, both("hidden_act")),
    "positions of no program": ({"rope_scaling": {"type": "odd"}}, both("rope_parameters")),
    "dynamic positions": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {("llama.cpp", "rope_parameters")}),
}  # fmt: skip
LLAMA3_POSITIONS = {
    "other positions before scaling": ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}},
                                       {("llama.cpp", "original_max_position_embeddings")}),
}  # fmt: skip
WINDOWS = {
    "types": ({"layer_types": [FULL]}, {("transformers", "layer_types")}),
    "windows in all layers": ({"use_sliding_window": True, "max_window_layers": 0, "layer_types": [SLIDING] * 16}, {("llama.cpp", "use_sliding_window")}),
    "windows by number": ({"use_sliding_window": True, "max_window_layers": 9, "layer_types": None}, both("use_sliding_window")),
    "windows that no layer's number says": ({"use_sliding_window": True, "layer_types": ONE_IN_SIX}, both("use_sliding_window")),
    "llama3 positions": ({"rope_scaling": LLAMA3}, {("llama.cpp", "rope_parameters")}),
}
OTHER_WINDOWS = {("llama.cpp", "layer_types")}
CASES = {
    "llama": LLAMA_KIND | LLAMA3_POSITIONS | {"hidden size": ({"hidden_size": 2047}, {("transformers", "hidden_size")})},
    "mistral": LLAMA_KIND | LLAMA3_POSITIONS | {
        "a window unsaid": ({"sliding_window": GONE}, {("transformers", "sliding_window")}),
        "a window": ({"sliding_window": 4096}, {("llama.cpp", "sliding_window")}),
        "a window as long as any text": ({"sliding_window": 131072}, set()),
        "types": ({"layer_types": [FULL] * 16}, {("vLLM", "layer_types")}),
    },
    "qwen2": LLAMA_KIND | WINDOWS | {"hidden size apart from heads": ({"hidden_size": 1792}, both(PRODUCT))},
    "qwen3": LLAMA_KIND | WINDOWS | {"attention bias": ({"attention_bias": True}, both("attention_bias"))},
    "qwen3_moe": LLAMA_KIND | {
        "attention bias": ({"attention_bias": True}, both("attention_bias")),
        "a window": ({"use_sliding_window": True, "sliding_window": 64}, {("llama.cpp", "use_sliding_window")}),
        "types": ({"layer_types": [FULL] * 16}, {("vLLM", "layer_types")}),
        "a dense layer": ({"mlp_only_layers": [3]}, {("llama.cpp", "mlp_only_layers")}),
        "every other layer dense": ({"decoder_sparse_step": 2}, {("llama.cpp", "mlp_only_layers")}),
        "all layers dense": ({"mlp_only_layers": list(range(16))}, both("mlp_only_layers")),
        "weights as they come": ({"norm_topk_prob": False}, {("llama.cpp", "norm_topk_prob")}),
        "no number of experts": ({"num_experts": GONE}, {("vLLM", "num_experts")}),
        "no number of experts per token": ({"num_experts_per_tok": GONE}, {("llama.cpp", "num_experts_per_tok")}),
        "odd rows": ({"moe_intermediate_size": 764}, {("transformers", "rows of experts")}),
    },
    "gemma3_text": OF_BLOCKS | {
        "hidden size": ({"hidden_size": 2047}, {("transformers", "hidden_size")}),
        "types": ({"layer_types": [FULL]}, {("transformers", "layer_types")} | OTHER_WINDOWS),
        "other windows": ({"layer_types": [FULL, *ONE_IN_SIX[1:]]}, OTHER_WINDOWS),
        "windows by another number": ({"layer_types": None, "sliding_window_pattern": 4}, OTHER_WINDOWS),
        "no windows": ({"layer_types": [FULL] * 16, "sliding_window_pattern": 1}, set()),
        "no windows, but a pattern": ({"layer_types": [FULL] * 16}, OTHER_WINDOWS),
        "no scalar": ({"query_pre_attn_scalar": GONE}, {("transformers", "query_pre_attn_scalar"), ("llama.cpp", "query_pre_attn_scalar")}),
        "another scalar": ({"query_pre_attn_scalar": 168}, {("llama.cpp", "query_pre_attn_scalar")}),
        "only the new spelling": ({"rope_theta": GONE, "rope_scaling": GONE, "rope_local_base_freq": GONE}, {("transformers", "rope_theta")}),
        "scaling only in the new spelling": ({"rope_scaling": None}, {("transformers", "rope_theta")}),
        "another theta with windows": ({"rope_local_base_freq": 1e6}, {("transformers", "rope_theta")}),
        "positions of no program": ({"rope_scaling": {"rope_type": "odd"}}, both("rope_parameters")),
        "scaled with windows": ({"rope_parameters": {SLIDING: {**LINEAR, "rope_theta": 1e4}}},
                                {("transformers", "rope_theta"), ("llama.cpp", "rope_parameters")}),
        "activation": ({"hidden_activation": "relu"}, both("hidden_activation")),
        "activation of vLLM": ({"hidden_activation": "gelu"}, {("llama.cpp", "hidden_activation")}),
        "capped scores": ({"attn_logit_softcapping": 50.0}, {("llama.cpp", "attn_logit_softcapping")}),
        "attention bias": ({"attention_bias": True}, {("llama.cpp", "attention_bias")}),
        "looking ahead": ({"use_bidirectional_attention": True}, both("use_bidirectional_attention")),
    },
    "mamba2": ALL | {
        "width": ({"hidden_size": 2048}, {("transformers", "num_heads × head_dim")}),
        "expand": ({"expand": 4, "hidden_size": 1280}, {("llama.cpp", "expand")}),
        "no groups": ({"n_groups": GONE}, {("transformers", "n_groups")} | both("n_groups")),
        "groups": ({"n_groups": 3}, both("n_groups")),
        "another inner size": ({"intermediate_size": 4096}, both("inner size")),
        "the inner size by another name": ({"intermediate_size": 5120}, set()),
        "activation": ({"hidden_act": "gelu"}, both("hidden_act")),
        "wide convolution": ({"conv_kernel": 5}, {("vLLM", "conv_kernel")}),
        "chunk": ({"chunk_size": 96}, {("vLLM", "chunk_size")}),
        "clamped steps": ({"time_step_limit": [0.001, math.inf]}, both("time_step_limit")),
        "projection bias": ({"use_bias": True}, {("llama.cpp", "use_bias")}),
        "no bias of the convolution": ({"use_conv_bias": False}, {("llama.cpp", "use_conv_bias")}),
        "vocabulary": ({"vocab_size": 50280}, {("llama.cpp", "vocab_size")}),
    },
    "granitemoehybrid": {name: case for name, case in OF_BLOCKS.items() if name not in ("head_dim of no kernel", "odd head_dim", "ffn", "no head_dim")} | {
        "modern words": ({"layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]}, both("layer_types")),
        "no words": ({"layer_types": GONE}, {("transformers", "layer_types"), ("llama.cpp", "position_embedding_type")} | both("layer_types")),
        "too few words": ({"layer_types": ["mamba", "attention"]}, {("transformers", "layer_types")} | both("layer_types")),
        "other query heads": ({"num_attention_heads": 8}, both(PRODUCT)),
        "heads of no kernel": ({"num_attention_heads": 4, "head_dim": 384}, {("vLLM", "head_dim")}),
        "width": ({"mamba_n_heads": 40}, {("transformers", "mamba_n_heads × mamba_d_head")}),
        "channels by themselves": ({"mamba_d_head": "auto"}, {("transformers", "mamba_n_heads × mamba_d_head")}),
        "expand": ({"mamba_expand": 4, "mamba_n_heads": 96}, {("llama.cpp", "mamba_expand")}),
        "groups": ({"mamba_n_groups": 5}, both("mamba_n_groups")),
        "no number of experts": ({"num_local_experts": GONE},
                                 {("transformers", "num_local_experts"), ("llama.cpp", "num_experts_per_tok"), ("llama.cpp", "intermediate_size")}),
        "no number of experts per token": ({"num_experts_per_tok": GONE}, {("llama.cpp", "num_experts_per_tok")}),
        "dense, with a number of experts per token": ({"num_local_experts": 0, "intermediate_size": 1024}, {("llama.cpp", "num_experts_per_tok")}),
        "dense, as wide as another": ({"num_local_experts": 0, "num_experts_per_tok": 0}, {("llama.cpp", "intermediate_size")}),
        "dense": ({"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 1024}, set()),
        "no shared width": ({"shared_intermediate_size": GONE}, {("transformers", "shared_intermediate_size")}),
        "odd rows": ({"intermediate_size": 508}, {("transformers", "rows of experts")}),
        "positions": ({"position_embedding_type": "rope"}, {("llama.cpp", "position_embedding_type")}),
        "positions in the new spelling": ({"position_embedding_type": "rope", "rope_theta": GONE, "rope_parameters": {"rope_theta": 5e5}},
                                          {("llama.cpp", "position_embedding_type"), ("transformers", "rope_theta")}),
        "attention alone": ({"layer_types": ["attention"] * 4, "position_embedding_type": "rope", "mamba_proj_bias": True, "vocab_size": 100351}, set()),
        "attention alone, without positions": ({"layer_types": ["attention"] * 4}, {("llama.cpp", "position_embedding_type")}),
        "activation": ({"hidden_act": "gelu"}, both("hidden_act")),
        "wide convolution": ({"mamba_d_conv": 5}, {("vLLM", "mamba_d_conv")}),
        "chunk": ({"mamba_chunk_size": 96}, {("vLLM", "mamba_chunk_size")}),
        "clamped steps": ({"time_step_limit": [0.001, math.inf]}, both("time_step_limit")),
        "projection bias": ({"mamba_proj_bias": True}, {("llama.cpp", "mamba_proj_bias")}),
        "vocabulary": ({"vocab_size": 100350}, {("llama.cpp", "vocab_size")}),
    },
}  # fmt: skip
# What a change of head_dim breaks besides.
WITH_HEAD_DIM = {"qwen2": both(PRODUCT), "gemma3_text": {("llama.cpp", "query_pre_attn_scalar")}}
ODD_FFN = dict.fromkeys(both("lengths of rows"), "intermediate_size 8,000")
NUMBERED = {("transformers", "max_window_layers"): "16"}
# What is told of a folder that is taken all the same: (what is changed, what is told and the value shown). 32 heads of 72 channels are 2,304 numbers.
ADVICE = {
    "llama": ({"intermediate_size": 8000, "head_dim": 72}, ODD_FFN),
    "mistral": ({"intermediate_size": 8000, "head_dim": 72}, ODD_FFN),
    "qwen2": ({"intermediate_size": 8000, "head_dim": 72, **WINDOWS["windows that no layer's number says"][0]}, ODD_FFN | NUMBERED),
    "qwen3": ({"intermediate_size": 8000, "head_dim": 72, **WINDOWS["windows that no layer's number says"][0]}, ODD_FFN | NUMBERED),
    "qwen3_moe": ({"intermediate_size": 1, "moe_intermediate_size": 704, "hidden_size": 2056}, {
        ("vLLM", "lengths of rows"): "hidden_size 2,056, moe_intermediate_size 704", ("vLLM", "hidden_size"): "2056",
        ("llama.cpp", "lengths of rows"): "hidden_size 2,056, moe_intermediate_size 704"}),
    "gemma3_text": ({"intermediate_size": 8000, "head_dim": 72, "sliding_window_pattern": None},
                    ODD_FFN | {("transformers", "sliding_window_pattern"): "None"}),
    "mamba2": ({"n_groups": 7, "num_heads": 63, "max_position_embeddings": GONE}, {
        ("vLLM", "lengths of rows"): "num_heads × head_dim 4,032", ("llama.cpp", "lengths of rows"): "num_heads × head_dim 4,032",
        ("transformers", "groups of the gated norm"): "7", ("transformers", "rows of in_proj"): "9,919", ("vLLM", "max_position_embeddings"): "absent"}),
    "granitemoehybrid": ({"hidden_size": 1040, "num_attention_heads": 13, "head_dim": 80, "num_key_value_heads": 1, "mamba_n_heads": 26, "mamba_d_head": 80,
                          "layer_types": ["mamba"] * 4}, {
        ("vLLM", "lengths of rows"): "hidden_size 1,040, mamba_n_heads × mamba_d_head 2,080",
        ("llama.cpp", "lengths of rows"): "hidden_size 1,040, mamba_n_heads × mamba_d_head 2,080",
        ("transformers", "rows of in_proj"): "4,442", ("vLLM", "hidden_size"): "1040"}),
}  # fmt: skip


def findings(family: str, config: dict, *, tensors=None, files=FILES, own_tokenizer: bool = False) -> list:
    config = {key: value for key, value in config.items() if value is not GONE}
    return check_folder(Folder(config, tensors or TENSORS[family], files, own_tokenizer), RULES[family])


def refused(family: str, config: dict, **folder) -> set[tuple[str, str]]:
    return {(one.program, one.field) for one in findings(family, config, **folder) if one.accepted is False}


@pytest.mark.parametrize("family", GOOD)
def test_a_published_config_is_accepted(family):
    assert refused(family, GOOD[family]) == set()


@pytest.mark.parametrize(("family", "case"), [(family, case) for family, cases in CASES.items() for case in cases])
def test_one_wrong_field_is_refused_by_the_programs_that_mind(family, case):
    change, expected = CASES[family][case]
    more = WITH_HEAD_DIM.get(family, set()) if "head_dim" in change else set()
    assert refused(family, GOOD[family] | change) == expected | more


@pytest.mark.parametrize("family", GOOD)
def test_a_head_of_its_own_is_taken_tied_or_not(family):
    own = (*TENSORS[family], "lm_head.weight")
    assert refused(family, GOOD[family] | {"tie_word_embeddings": False}, tensors=own) == refused(family, GOOD[family], tensors=own) == set()


@pytest.mark.parametrize("family", GOOD)
def test_other_tensor_names_are_refused(family):
    assert refused(family, GOOD[family], tensors=("transformer.wte.weight",)) == both("tensor names")


@pytest.mark.parametrize("family", GOOD)
def test_a_tokenizer_that_is_absent_or_trained_here_is_refused(family):
    assert refused(family, GOOD[family], files=("config.json",)) == {("vLLM", "tokenizer.json")}
    assert refused(family, GOOD[family], files=("config.json", "tokenizer.model")) == set()
    assert refused(family, GOOD[family], own_tokenizer=True) == {("llama.cpp", "tokenizer")}


def remarks(family: str, change: dict) -> dict:
    told = [one for one in findings(family, GOOD[family] | change) if one.is_remark]
    assert all(one.accepted for one in told)
    return {(one.program, one.field): one.value for one in told}


@pytest.mark.parametrize("family", GOOD)
def test_what_costs_room_or_an_older_version_is_told_and_not_refused(family):
    change, told = ADVICE[family]
    assert remarks(family, change) == told and remarks(family, {}) == {}


@pytest.mark.parametrize("family", GOOD)
def test_every_rule_has_a_case_that_breaks_it(family):
    broken = set().union(ADVICE[family][1], *(expected for _, expected in CASES[family].values()))
    broken |= both("tensor names") | {("vLLM", "tokenizer.json"), ("llama.cpp", "tokenizer")}
    assert broken == {(rule.program, rule.field) for rule in RULES[family]}


def test_llama3_positions_at_the_top_level_are_read_there():
    change = {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}}
    assert refused("llama", GOOD["llama"] | change | {"original_max_position_embeddings": 4096}) == set()


def test_queries_of_the_27b_are_scaled_by_the_width_of_a_head():
    """By hidden size over heads where there are 62 layers, as in the published model, whose scalar is 5,376 / 32; the control: 61 layers, or another width."""
    large = GOOD["gemma3_text"] | {"hidden_size": 5376, "head_dim": 128, "num_hidden_layers": 62, "query_pre_attn_scalar": 168, "layer_types": None}
    assert refused("gemma3_text", large) == set()
    for change in ({"num_hidden_layers": 61}, {"hidden_size": 5120}):
        assert refused("gemma3_text", large | change) == {("llama.cpp", "query_pre_attn_scalar")}


def both_kinds(full: dict | None, sliding: dict | None) -> dict:
    return {"rope_parameters": {kind: rope for kind, rope in ((FULL, full), (SLIDING, sliding)) if rope is not None}}


SPELLINGS = {
    "new": {"rope_parameters": {**LLAMA3, "rope_theta": 123456.0}},
    "old": {"rope_theta": 123456.0, "rope_scaling": LLAMA3},
    "older": {"rope_theta": 123456.0, "rope_scaling": {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}},
    "new, unscaled": {"rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}},
    "old, unscaled": {"rope_theta": 123456.0},
    "none": {},
}
BY_KIND = {
    "new": both_kinds({**LINEAR, "rope_theta": 123456.0}, {"rope_type": "default", "rope_theta": 2345.0}),
    "old": {"rope_theta": 123456.0, "rope_local_base_freq": 2345.0, "rope_scaling": LINEAR},
    "of one kind": both_kinds({"rope_type": "default", "rope_theta": 123456.0}, None),
    "none": {},
}
SPELLED = [(family, SPELLINGS[one]) for family in ("llama", "qwen3") for one in SPELLINGS] + [("gemma3_text", BY_KIND[one]) for one in BY_KIND]


@pytest.mark.parametrize(("family", "spelling"), SPELLED)
def test_positions_are_handed_over_in_both_spellings_and_are_the_same_to_transformers(family, spelling):
    """By the frequencies that a model built of either config turns by; the control: another theta gives others."""
    small = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
             "vocab_size": 32, "layer_types": [SLIDING, FULL] if family == "gemma3_text" else None}  # fmt: skip
    given = {key: value for key, value in (GOOD[family] | small).items() if not key.startswith("rope_")} | spelling
    handed = FAMILIES[family].handed_over(given)

    def frequencies(config: dict) -> torch.Tensor:
        read = AutoConfig.for_model(**deepcopy(config))  # it writes into what it is given
        rotary = AutoModelForCausalLM.from_config(read).model.rotary_emb
        return torch.cat([table for name, table in sorted(rotary.named_buffers()) if name.endswith("inv_freq") and "original" not in name])

    assert torch.equal(frequencies(handed), frequencies(given))
    older = {key: value for key, value in handed.items() if key != "rope_parameters"}
    assert torch.equal(frequencies(older), frequencies(given))
    for theta in ("rope_theta", "rope_local_base_freq") if family == "gemma3_text" else ("rope_theta",):
        assert not torch.equal(frequencies(older | {theta: 1e7}), frequencies(given))
    assert ("transformers", "rope_theta") not in refused(family, handed)


@pytest.mark.parametrize("family", BLOCKS)
def test_a_config_is_as_it_was_after_a_model_was_built_of_it(family):
    config = GOOD[family] | {"rope_scaling": dict(LINEAR), "num_hidden_layers": 1, "layer_types": None}
    before = deepcopy(config)
    with torch.device("meta"):
        FAMILIES[family].build(config)
    assert config == before
    if family != "gemma3_text":  # the control: what transformers does to it, where positions are of one kind
        AutoConfig.for_model(**config)
        assert config != before
