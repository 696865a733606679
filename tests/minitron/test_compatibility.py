"""Every rule of another program for a NemotronH folder is held by a case that breaks it alone."""

import math

import pytest

from minitron.families.known import FAMILIES
from minitron.hand_over.compatibility import Folder, check_folder, remarks, verdicts
from minitron.hand_over.rules import RULES as RULES_BY_FAMILY
from minitron.hand_over.rules_nemotron_h import RULES

GOOD = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-", "num_hidden_layers": 5,
    "hidden_size": 4608, "mamba_proj_bias": False, "mlp_bias": False, "use_conv_bias": True, "head_dim": 128, "num_attention_heads": 40,
    "num_key_value_heads": 8, "attention_bias": False, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "n_groups": 8, "mamba_num_heads": 112,
    "mamba_head_dim": 80, "conv_kernel": 4, "chunk_size": 128, "time_step_limit": [0.0, math.inf], "tie_word_embeddings": False,
    "max_position_embeddings": 131072, "layer_norm_epsilon": 1e-5, "rms_norm_eps": 1e-5, "ssm_state_size": 128, "intermediate_size": 15872,
    "use_bias": False, "vocab_size": 131072,
}  # fmt: skip
TENSORS, FILES = ("backbone.embeddings.weight", "lm_head.weight"), ("config.json", "tokenizer.json")
GONE = object()
REMOTE = "NVIDIA's code"
NAMES = ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"]
MLX_SIZES = ("mlx-lm", "sizes and biases")
PATTERN = {("llama.cpp", "hybrid_override_pattern"), (REMOTE, "hybrid_override_pattern")}
# (what is changed, the rules that no longer hold)
CASES = {
    "model_type": ({"model_type": "mamba2"}, {("transformers", "model_type")}),
    "no head_dim": ({"head_dim": GONE}, {("transformers", "head_dim"), ("vLLM", "head_dim"), ("llama.cpp", "head_dim")}),
    "no attention": (
        {"hybrid_override_pattern": "M-M--"},
        {("transformers", "hybrid_override_pattern")},
    ),
    "class": ({"architectures": ["LlamaForCausalLM"]}, {("vLLM", "architectures"), ("llama.cpp", "architectures")}),
    "class not first": ({"architectures": ["Other", "NemotronHForCausalLM"]}, {("llama.cpp", "architectures")}),
    "odd letter": ({"hybrid_override_pattern": "M-M*|"}, PATTERN | {("vLLM", "hybrid_override_pattern"), ("TensorRT-LLM", "hybrid_override_pattern")}),
    "only the new names": (
        {"hybrid_override_pattern": GONE, "layers_block_type": NAMES},
        PATTERN | {(REMOTE, "layers_block_type"), ("mlx-lm", "hybrid_override_pattern")},
    ),
    "only the older names": (
        {"hybrid_override_pattern": GONE, "layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp"]},
        PATTERN | {(REMOTE, "layers_block_type")},
    ),
    "both spellings": ({"layers_block_type": NAMES}, {(REMOTE, "layers_block_type")}),
    "layers": ({"num_hidden_layers": 6}, PATTERN | {("vLLM", "num_hidden_layers"), ("TensorRT-LLM", "num_hidden_layers")}),
    "odd head_dim": ({"head_dim": 20}, {("vLLM", "head_dim")}),
    "KV heads": ({"num_key_value_heads": 7}, {("vLLM", "num_key_value_heads")}),
    "attention bias": ({"attention_bias": True}, {("vLLM", "attention_bias"), ("mlx-lm", "attention_bias")}),
    "FFN activation": ({"mlp_hidden_act": "silu"}, {(program, "mlp_hidden_act") for program in ("vLLM", "llama.cpp", "TensorRT-LLM")}),
    "FFN bias": ({"mlp_bias": True}, {("TensorRT-LLM", "mlp_bias")}),
    "code": ({"auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}}, {("transformers", "auto_map")}),
    "code of a pipeline": ({"custom_pipelines": {"text-generation": {"impl": "mine.Pipeline"}}}, {("transformers", "auto_map")}),
    "biases by default": ({"mamba_proj_bias": GONE, "use_bias": GONE}, {("mlx-lm", "sizes and biases")}),
    "Mamba activation": ({"mamba_hidden_act": "gelu"}, {("vLLM", "mamba_hidden_act")}),
    "groups": ({"n_groups": 5}, {("vLLM", "n_groups"), ("llama.cpp", "n_groups")}),
    "wide convolution": ({"conv_kernel": 5}, {("vLLM", "conv_kernel")}),
    "no convolution": ({"conv_kernel": GONE}, {("vLLM", "conv_kernel"), ("llama.cpp", "conv_kernel"), MLX_SIZES}),
    "chunk": ({"chunk_size": 96}, {("vLLM", "chunk_size")}),
    "clamped steps": ({"time_step_limit": [0.001, math.inf]}, {("vLLM", "time_step_limit")}),
    "infinity as transformers writes it": ({"time_step_limit": [0.0, {"__float__": "Infinity"}]}, {("vLLM", "time_step_limit")}),
    "tied": ({"tie_word_embeddings": True}, {("vLLM", "tie_word_embeddings")}),
    "positions": ({"max_position_embeddings": None}, {("vLLM", "max_position_embeddings")}),
    "experts per token": ({"num_experts_per_tok": None}, {("llama.cpp", "num_experts_per_tok")}),
    "sizes of experts that there are none of": ({"n_group": 0, "moe_intermediate_size": 7, "n_shared_experts": 3}, set()),
    "epsilon": ({"rms_norm_eps": GONE}, {("llama.cpp", "rms_norm_eps"), ("TensorRT-LLM", "rms_norm_eps")}),
    "other epsilon": ({"rms_norm_eps": 1e-6}, {("llama.cpp", "rms_norm_eps"), ("TensorRT-LLM", "rms_norm_eps")}),
    "inner width": ({"mamba_num_heads": 8, "mamba_head_dim": 4}, {("llama.cpp", "mamba_num_heads × mamba_head_dim")}),
    "state": ({"ssm_state_size": GONE}, {("llama.cpp", "ssm_state_size"), MLX_SIZES}),
    "ffn": ({"intermediate_size": GONE}, {("llama.cpp", "intermediate_size"), MLX_SIZES}),
    "hidden_act": ({"hidden_act": "relu2"}, {("llama.cpp", "hidden_act")}),
    "projection bias": ({"use_bias": True}, {("llama.cpp", "use_bias"), ("mlx-lm", "mamba_proj_bias")}),
    "vocabulary": ({"vocab_size": 1001}, {("llama.cpp", "vocab_size")}),
}
# Nemotron 3 Nano's sizes of experts, and what else is refused of a folder that has them.
GOOD_WITH_EXPERTS = GOOD | {
    "hybrid_override_pattern": "MEM*E", "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1920, "n_shared_experts": 1, "n_group": 1,
    "moe_shared_expert_intermediate_size": 3840, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "moe_latent_size": None,
    "dtype": "bfloat16",
}
ROWS, KEYS, GROUPS = ("transformers", "rows of experts"), {("llama.cpp", "keys of experts"), ("mlx-lm", "keys of experts")}, ("transformers", "n_group")
SHARED = {("vLLM", "n_shared_experts"), ("TensorRT-LLM", "n_shared_experts")}
CASES_WITH_EXPERTS = {
    "an FFN beside them": ({"hybrid_override_pattern": "M-M*E"}, {("llama.cpp", "kinds of FFN")}),
    "biases": ({"mlp_bias": True}, {("vLLM", "mlp_bias"), ("llama.cpp", "mlp_bias"), ("TensorRT-LLM", "mlp_bias")}),
    "two shared ones": ({"n_shared_experts": 2}, SHARED),
    "no word of a shared one": ({"n_shared_experts": GONE}, SHARED | KEYS),
    "no word of what weights are multiplied by": ({"routed_scaling_factor": GONE}, KEYS),
    "no word of groups that a token sees": ({"topk_group": GONE}, {("mlx-lm", "keys of experts")}),
    "no word of experts per token": ({"num_experts_per_tok": GONE}, KEYS | {("llama.cpp", "num_experts_per_tok"), ("mlx-lm", "num_experts_per_tok")}),
    "one expert per token": ({"num_experts_per_tok": 1}, {("mlx-lm", "num_experts_per_tok")}),
    "one expert per token, by its own weight": ({"num_experts_per_tok": 1, "norm_topk_prob": False}, set()),
    "groups": ({"n_group": 8, "topk_group": 4}, set()),
    "groups of other sizes": ({"n_group": 5, "topk_group": 4}, {GROUPS}),
    "groups of one": ({"n_group": 128, "topk_group": 8}, {GROUPS}),
    "all groups for a token": ({"n_group": 8, "topk_group": 8}, {("llama.cpp", "topk_group")}),
    "odd rows": ({"moe_intermediate_size": 1924}, {ROWS}),
    "such rows of longer numbers": ({"moe_intermediate_size": 1924, "dtype": "float32"}, set()),
    "odd rows of a latent": ({"moe_latent_size": 1028}, {ROWS}),
    "odd rows that no expert reads": ({"hidden_size": 4612, "moe_latent_size": 1024}, set()),
}


def refused(config: dict, *, tensors=TENSORS, files=FILES, own_tokenizer: bool = False) -> set[tuple[str, str]]:
    folder = Folder({key: value for key, value in config.items() if value is not GONE}, tensors, files, own_tokenizer)
    return {(finding.program, finding.field) for finding in check_folder(folder, RULES) if finding.accepted is False}


def test_a_published_config_is_accepted():
    assert refused(GOOD) == refused(GOOD_WITH_EXPERTS) == set()


@pytest.mark.parametrize("case", CASES)
def test_one_wrong_field_is_refused_by_the_programs_that_mind(case):
    change, expected = CASES[case]
    assert refused(GOOD | change) == expected


@pytest.mark.parametrize("case", CASES_WITH_EXPERTS)
def test_one_wrong_field_of_experts_is_refused_by_the_programs_that_mind(case):
    change, expected = CASES_WITH_EXPERTS[case]
    assert refused(GOOD_WITH_EXPERTS | change) == expected


def test_other_tensor_names_are_refused():
    assert refused(GOOD, tensors=("model.embeddings.weight",)) == {("vLLM", "tensor names"), ("llama.cpp", "tensor names")}


def test_a_tokenizer_that_is_absent_or_trained_here_is_refused():
    assert refused(GOOD, files=("config.json",)) == {("vLLM", "tokenizer.json")}
    assert refused(GOOD, own_tokenizer=True) == {("llama.cpp", "tokenizer")}


def test_every_rule_has_a_case_that_breaks_it():
    broken = set().union(*(expected for _, expected in (*CASES.values(), *CASES_WITH_EXPERTS.values())))
    broken |= {("transformers", "rows of in_proj"), ("vLLM", "lengths of rows"), ("llama.cpp", "lengths of rows"),
               ("vLLM", "hybrid_override_pattern")}  # advice, below  # fmt: skip
    broken |= {("vLLM", "tensor names"), ("llama.cpp", "tensor names"), ("vLLM", "tokenizer.json"), ("llama.cpp", "tokenizer")}
    assert broken == {(rule.program, rule.field) for rule in RULES}


# The 9B's FFN of 15,680 is no multiple of 128, and its hidden size of 4,480 none of 256 besides; 14 heads of 16 channels in 2 groups give 590 rows of in_proj.
@pytest.mark.parametrize(("change", "expected"), [
    ({}, {}),
    ({"intermediate_size": 15680}, {("vLLM", "lengths of rows"): "intermediate_size 15,680", ("llama.cpp", "lengths of rows"): "intermediate_size 15,680"}),
    ({"hidden_size": 4480}, {("llama.cpp", "lengths of rows"): "hidden_size 4,480"}),
    ({"hidden_size": 4424}, {("vLLM", "lengths of rows"): "hidden_size 4,424", ("llama.cpp", "lengths of rows"): "hidden_size 4,424"}),
    ({"mamba_num_heads": 14, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 32}, {
        ("vLLM", "lengths of rows"): "mamba_num_heads × mamba_head_dim 224", ("llama.cpp", "lengths of rows"): "mamba_num_heads × mamba_head_dim 224",
        ("transformers", "rows of in_proj"): "590"}),
], ids=str)  # fmt: skip
def test_lengths_that_cost_room_or_time_are_told_and_not_refused(change, expected):
    findings = check_folder(Folder(GOOD | change, TENSORS, FILES, own_tokenizer=False), RULES)
    assert {(one.program, one.field): one.value for one in findings if one.is_remark} == expected
    of_rows = [one for one in findings if one.field in ("lengths of rows", "rows of in_proj")]
    assert len(of_rows) == 3 and all(one.accepted for one in of_rows)
    assert sorted(remarks(findings)) == sorted(
        f"{one.program} takes it, but {one.field} ({one.value}) {one.rule}" for one in of_rows if (one.program, one.field) in expected
    )
    assert not any("rows" in text for text in verdicts(findings))


def test_what_is_advised_of_experts_is_of_their_rows_and_of_cpus():
    """Rows of an FFN that no layer has are none; 1,856 neurons, as published, are no multiple of 128."""
    change = {"moe_intermediate_size": 1856, "intermediate_size": 1, "moe_shared_expert_intermediate_size": 3712}
    findings = check_folder(Folder(GOOD_WITH_EXPERTS | change, TENSORS, FILES, own_tokenizer=False), RULES)
    assert {(one.program, one.field): one.value for one in findings if one.is_remark} == {
        ("vLLM", "lengths of rows"): "moe_intermediate_size 1,856", ("vLLM", "hybrid_override_pattern"): "MEM*E",
        ("llama.cpp", "lengths of rows"): "moe_intermediate_size 1,856, moe_shared_expert_intermediate_size 3,712"}  # fmt: skip


def test_every_family_that_can_be_cut_has_rules():
    assert set(RULES_BY_FAMILY) == set(FAMILIES)


def test_a_verdict_names_field_value_and_rule():
    said = verdicts(check_folder(Folder(GOOD | {"chunk_size": 96}, TENSORS, FILES, own_tokenizer=False), RULES))
    assert said[1] == "vLLM would not take it: chunk_size (96) must be a power of two"
    assert "not to be told from here: tokenizer" in said[2] and "would not" not in said[2]
