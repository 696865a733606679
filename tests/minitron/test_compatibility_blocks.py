"""Every rule of another program for a Llama or Qwen3 folder is held by a case that breaks it alone; what is handed over breaks none."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.families.known import FAMILIES
from minitron.hand_over.compatibility import Folder, check_folder
from minitron.hand_over.rules import RULES

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
         "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False}  # fmt: skip
GOOD = {
    "llama": SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True, "rope_theta": 500000.0,
                      "rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "qwen3": SIZES | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True, "rope_theta": 1000000.0,
                      "rope_scaling": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 16, "head_dim": 128},
}  # fmt: skip
TENSORS, FILES = ("model.embed_tokens.weight", "model.norm.weight"), ("config.json", "tokenizer.json")
GONE = object()
EVERYWHERE = {("transformers", "lm_head.weight"), ("vLLM", "lm_head.weight"), ("llama.cpp", "lm_head.weight")}
# (what is changed, the rules that no longer hold), of both families
BOTH = {
    "model_type": ({"model_type": "mistral"}, {("transformers", "model_type")}),
    "no head_dim": ({"head_dim": GONE}, {("transformers", "head_dim"), ("vLLM", "head_dim"), ("llama.cpp", "head_dim")}),
    "head_dim of no kernel": ({"head_dim": 20}, {("vLLM", "head_dim")}),
    "odd head_dim": ({"head_dim": 15}, {("vLLM", "head_dim"), ("llama.cpp", "head_dim")}),
    "not tied, no head": ({"tie_word_embeddings": False}, EVERYWHERE),
    "only the new spelling": ({"rope_theta": GONE, "rope_scaling": GONE, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
                              {("transformers", "rope_theta")}),
    "scaling only in the new spelling": ({"rope_scaling": GONE, "rope_theta": 5e5, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}},
                                         {("transformers", "rope_theta")}),
    "class": ({"architectures": ["MistralForCausalLM"]}, {("vLLM", "architectures"), ("llama.cpp", "architectures")}),
    "KV heads": ({"num_key_value_heads": 7}, {("vLLM", "num_key_value_heads"), ("llama.cpp", "num_key_value_heads")}),
    "activation": ({"hidden_act": "gelu"}, {("vLLM", "hidden_act"), ("llama.cpp", "hidden_act")}),
    "positions of no program": ({"rope_scaling": {"type": "odd"}}, {("vLLM", "rope_parameters"), ("llama.cpp", "rope_parameters")}),
    "dynamic positions": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {("llama.cpp", "rope_parameters")}),
    "no length": ({"max_position_embeddings": GONE}, {("vLLM", "max_position_embeddings"), ("llama.cpp", "max_position_embeddings")}),
    "code": ({"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, {("transformers", "auto_map")}),
    "ffn": ({"intermediate_size": GONE}, {("llama.cpp", "intermediate_size")}),
    "epsilon": ({"rms_norm_eps": GONE}, {("llama.cpp", "rms_norm_eps")}),
}  # fmt: skip
CASES = {
    "llama": BOTH | {
        "hidden size": ({"hidden_size": 2047}, {("transformers", "hidden_size")}),
        "other positions before scaling": ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}},
                                           {("llama.cpp", "original_max_position_embeddings")}),
    },
    "qwen3": BOTH | {
        "types": ({"layer_types": ["full_attention"]}, {("transformers", "layer_types")}),
        "attention bias": ({"attention_bias": True}, {("vLLM", "attention_bias"), ("llama.cpp", "attention_bias")}),
        "windows": ({"use_sliding_window": True}, {("vLLM", "use_sliding_window"), ("llama.cpp", "use_sliding_window")}),
        "llama3 positions": ({"rope_scaling": LLAMA3}, {("llama.cpp", "rope_parameters")}),
    },
}  # fmt: skip
PAIRS = [(family, case) for family, cases in CASES.items() for case in cases]


def refused(family: str, config: dict, *, tensors=TENSORS, files=FILES, own_tokenizer: bool = False) -> set[tuple[str, str]]:
    folder = Folder({key: value for key, value in config.items() if value is not GONE}, tensors, files, own_tokenizer)
    return {(finding.program, finding.field) for finding in check_folder(folder, RULES[family]) if finding.accepted is False}


@pytest.mark.parametrize("family", GOOD)
def test_a_published_config_is_accepted(family):
    assert refused(family, GOOD[family]) == set()


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_one_wrong_field_is_refused_by_the_programs_that_mind(family, case):
    change, expected = CASES[family][case]
    assert refused(family, GOOD[family] | change) == expected


@pytest.mark.parametrize("family", GOOD)
def test_a_head_of_its_own_is_taken_tied_or_not(family):
    own = (*TENSORS, "lm_head.weight")
    assert refused(family, GOOD[family] | {"tie_word_embeddings": False}, tensors=own) == refused(family, GOOD[family], tensors=own) == set()


@pytest.mark.parametrize("family", GOOD)
def test_other_tensor_names_are_refused(family):
    assert refused(family, GOOD[family], tensors=("transformer.wte.weight",)) == {("vLLM", "tensor names"), ("llama.cpp", "tensor names")}


@pytest.mark.parametrize("family", GOOD)
def test_a_tokenizer_that_is_absent_or_trained_here_is_refused(family):
    assert refused(family, GOOD[family], files=("config.json",)) == {("vLLM", "tokenizer.json")}
    assert refused(family, GOOD[family], files=("config.json", "tokenizer.model")) == set()
    assert refused(family, GOOD[family], own_tokenizer=True) == {("llama.cpp", "tokenizer")}


def remarks(family: str, change: dict) -> list:
    return [one for one in check_folder(Folder(GOOD[family] | change, TENSORS, FILES, own_tokenizer=False), RULES[family]) if one.is_remark]


@pytest.mark.parametrize("family", GOOD)
def test_rows_that_cannot_be_packed_are_told_and_not_refused(family):
    assert remarks(family, {}) == []
    told = remarks(family, {"intermediate_size": 8000, "head_dim": 72})  # of 32 heads: 2,304 numbers
    assert {(one.program, one.value, one.accepted) for one in told} == {(program, "intermediate_size 8,000", True) for program in ("vLLM", "llama.cpp")}


@pytest.mark.parametrize("family", GOOD)
def test_every_rule_has_a_case_that_breaks_it(family):
    broken = set().union(*(expected for _, expected in CASES[family].values()))
    broken |= {(one.program, one.field) for one in remarks(family, {"intermediate_size": 8000})}
    broken |= {("vLLM", "tensor names"), ("llama.cpp", "tensor names"), ("vLLM", "tokenizer.json"), ("llama.cpp", "tokenizer")}
    assert broken == {(rule.program, rule.field) for rule in RULES[family]}


def test_llama3_positions_at_the_top_level_are_read_there():
    change = {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}}
    assert refused("llama", GOOD["llama"] | change | {"original_max_position_embeddings": 4096}) == set()


SPELLINGS = {
    "new": {"rope_parameters": {**LLAMA3, "rope_theta": 123456.0}},
    "old": {"rope_theta": 123456.0, "rope_scaling": LLAMA3},
    "older": {"rope_theta": 123456.0, "rope_scaling": {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}},
    "new, unscaled": {"rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}},
    "old, unscaled": {"rope_theta": 123456.0},
    "none": {},
}


@pytest.mark.parametrize("family", GOOD)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_positions_are_handed_over_in_both_spellings_and_are_the_same_to_transformers(family, spelling, tmp_path):
    """By the frequencies that a model built of either config turns by; the control: another theta gives others."""
    small = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
             "vocab_size": 32, "layer_types": None}  # fmt: skip
    given = {key: value for key, value in (GOOD[family] | small).items() if not key.startswith("rope_")} | SPELLINGS[spelling]
    handed = FAMILIES[family].handed_over(given)

    def frequencies(config: dict) -> torch.Tensor:
        read = AutoConfig.for_model(**deepcopy(config))  # it writes into what it is given
        return AutoModelForCausalLM.from_config(read).model.rotary_emb.inv_freq

    assert torch.equal(frequencies(handed), frequencies(given))
    older = {key: value for key, value in handed.items() if key != "rope_parameters"}
    assert torch.equal(frequencies(older), frequencies(given))
    assert not torch.equal(frequencies(older | {"rope_theta": 1e7}), frequencies(given))
    assert ("transformers", "rope_theta") not in refused(family, handed)


@pytest.mark.parametrize("family", GOOD)
def test_a_config_is_as_it_was_after_a_model_was_built_of_it(family):
    config = GOOD[family] | {"rope_scaling": dict(LLAMA3), "num_hidden_layers": 1, "layer_types": None}
    before = deepcopy(config)
    with torch.device("meta"):
        FAMILIES[family].build(config)
    assert config == before
    AutoConfig.for_model(**config)
    assert config != before  # the control: what transformers does to it
