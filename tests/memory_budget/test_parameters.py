"""Parameter counts against published numbers and against transformers' models on the meta device."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from memory_budget.parameters import count_active_parameters, count_parameters, count_total_parameters

CONFIG_NAMES = sorted(path.stem for path in (Path(__file__).parent / "configs").glob("*.json"))
PUBLISHED = {
    "nemotron-nano-12b-v2": 12_310_001_152,
    "nemotron-nano-9b-v2": 8_888_227_328,
    "nemotron-nano-depth-56": 11_386_496_128,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "qwen2-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "gemma-3-1b": 999_885_952,
    "nemotron-3-nano-30b-a3b": 31_577_937_344,
    "nemotron-3-super-120b-a12b": 120_668_687_360,
}
# That one token passes through, embeddings and head among them: 3.6 and 12.7 thousand millions of the reports (arXiv 2512.20848, 2604.12374).
ACTIVE = {"nemotron-3-nano-30b-a3b": 3_580_073_408, "nemotron-3-super-120b-a12b": 12_770_216_960}


def meta_model(config: dict):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    hf_config = AutoConfig.for_model(**config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


def kind_of(name: str, pattern: str) -> str:
    """The kind a transformers parameter name belongs to."""
    if "embed" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    kinds = {"M": "mamba", "*": "attention", "-": "ffn", "E": "moe"}
    if ".mixer." in name:
        return kinds[pattern[int(name.split(".layers.")[1].split(".")[0])]]
    if ".self_attn." in name:
        return "attention"
    return "ffn" if ".mlp." in name else "norm"


@pytest.mark.parametrize("name", PUBLISHED)
def test_count_is_the_published_one(name, architecture_of):
    assert count_total_parameters(architecture_of(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_as_many_are_active_as_is_published(name, architecture_of):
    architecture = architecture_of(name)
    assert count_active_parameters(architecture) == ACTIVE[name]
    assert count_active_parameters(replace(architecture, moe_experts_per_token=1)) != ACTIVE[name]


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_every_kind_counts_as_many_numbers_as_the_model_of_transformers(name, config_of, architecture_of):
    architecture = architecture_of(name)
    counted = Counter()
    for parameter_name, parameter in meta_model(config_of(name)).named_parameters():  # a tied tensor comes once
        counted[kind_of(parameter_name, architecture.pattern)] += parameter.numel()
    assert count_parameters(architecture) == {kind: counted[kind] for kind in count_parameters(architecture)}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 49},
        {"ffn_bias": False},
        {"mamba_projection_bias": False},
        {"mamba_conv_bias": True},
        {"tied_embeddings": True},
        {"attention_input_bias": True},
        {"post_norms": True},
    ],
    ids=str,
)
def test_a_wrong_size_or_flag_is_noticed_against_transformers(change, config_of, architecture_of):
    model = meta_model(config_of("tiny-nemotron-h"))
    architecture = architecture_of("tiny-nemotron-h")
    truth = sum(parameter.numel() for parameter in model.parameters())
    assert count_total_parameters(architecture) == truth
    assert count_total_parameters(replace(architecture, **change)) != truth


def test_the_routers_correction_bias_is_a_buffer_and_not_counted(config_of):
    model = meta_model(config_of("tiny-nemotron-h-latent-moe"))
    name = "e_score_correction_bias"
    assert any(name in buffer for buffer, _ in model.named_buffers())
    assert not any(name in parameter for parameter, _ in model.named_parameters())


def test_active_parameters_leave_out_the_idle_experts_and_nothing_else(architecture_of):
    architecture = architecture_of("nemotron-3-nano-30b-a3b")
    idle = 128 - 6
    per_expert = 2 * 2688 * 1856
    assert count_total_parameters(architecture) - count_active_parameters(architecture) == 23 * idle * per_expert


def test_a_dense_model_is_active_all_over(architecture_of):
    architecture = architecture_of("nemotron-nano-9b-v2")
    assert count_active_parameters(architecture) == count_total_parameters(architecture)
