"""memory_budget's report against models that transformers loaded and the caches they filled: equal to the byte."""

from collections.abc import Callable

import pytest
import torch

from memory_budget.calculator import memory_report
from memory_budget.hf_config import architecture_from_config
from memory_budget.workload import Workload
from minitron.mamba import dispatch

TOKENS = 11
TRANSFORMERS_OWN = {(owner, name): getattr(owner, name) for owner, name, _ in dispatch.replacements()}  # before any test puts ours in their place
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
TRANSFORMER = {"hidden_size": 24, "vocab_size": 53, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA2 = {"hidden_size": 24, "vocab_size": 53, "num_hidden_layers": 2, "expand": 2, "num_heads": 8, "head_dim": 6, "n_groups": 2, "state_size": 10}
NEMOTRON_H = {
    "hidden_size": 24, "vocab_size": 53, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "mamba_num_heads": 8,
    "mamba_head_dim": 5, "n_groups": 2, "ssm_state_size": 10, "conv_kernel": 4, "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
}  # fmt: skip
MOE = {
    "layers_block_type": ["linear_attention", "moe", "full_attention"], "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip
CONFIGS = {
    "nemotron_h": {"model_type": "nemotron_h", **NEMOTRON_H},
    "nemotron_h, no FFN": {"model_type": "nemotron_h", **NEMOTRON_H, "layers_block_type": ["linear_attention", "full_attention"]},
    "nemotron_h, all biases": {"model_type": "nemotron_h", **NEMOTRON_H, "use_bias": True, "mlp_bias": True, "attention_bias": True},
    "nemotron_h, no biases": {"model_type": "nemotron_h", **NEMOTRON_H, "use_conv_bias": False},
    "nemotron_h, one group, kernel 2": {"model_type": "nemotron_h", **NEMOTRON_H, "n_groups": 1, "conv_kernel": 2},
    "nemotron_h, MoE": {"model_type": "nemotron_h", **NEMOTRON_H, **MOE},
    "mamba2": {"model_type": "mamba2", **MAMBA2},
    "mamba2, other biases, tied": {"model_type": "mamba2", **MAMBA2, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", **TRANSFORMER},
    "llama, biases, tied": {"model_type": "llama", **TRANSFORMER, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **TRANSFORMER},
    "qwen2": {"model_type": "qwen2", **TRANSFORMER},
    "qwen3": {"model_type": "qwen3", **TRANSFORMER, "head_dim": 8},
}


@pytest.fixture
def load(tmp_path) -> Callable[[dict, torch.dtype], torch.nn.Module]:
    """The model of a config as transformers loads it from a checkpoint of that dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def loaded(config: dict, dtype: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype).save_pretrained(tmp_path / "checkpoint")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype="auto").eval()

    return loaded


@torch.no_grad()
def filled_cache(model: torch.nn.Module, batch: int):
    """transformers' own cache after a prompt of TOKENS tokens."""
    output = model(torch.randint(0, 50, (batch, TOKENS)), use_cache=True)
    return output.cache_params if model.config.model_type == "mamba2" else output.past_key_values


def recurrent(cache, name: str) -> list[torch.Tensor]:
    """The "conv_states" or "recurrent_states" of all Mamba layers."""
    return [state for layer in cache.layers for state in getattr(layer, name, {}).values()]


def real_bytes(model: torch.nn.Module, cache) -> dict[str, int]:
    """Bytes of the tensors that a MemoryReport counts, by its names; of the convolution's columns all but the first (see the last test)."""
    attention = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return {
        "weights": sum({weight.data_ptr(): weight.nbytes for weight in model.parameters()}.values()),
        "kv_cache": sum(layer.keys.nbytes + layer.values.nbytes for layer in attention),
        "ssm_state": sum(state.nbytes for state in recurrent(cache, "recurrent_states")),
        "conv_state": sum(state[..., 1:].contiguous().nbytes for state in recurrent(cache, "conv_states")),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_report_is_the_bytes_of_the_loaded_model_and_its_filled_cache(name, dtype, load):
    model = load(CONFIGS[name], DTYPES[dtype])
    for batch in (1, 3):
        report = memory_report(architecture_from_config(CONFIGS[name]), Workload(TOKENS, batch, weights_dtype=dtype, kv_dtype=dtype)).as_dict()
        expected = real_bytes(model, filled_cache(model, batch))
        assert {part: report[part] for part in expected} == expected
        assert report["total"] == sum(expected.values())


@pytest.mark.parametrize("installed", [False, True], ids=["transformers' scan", "our scan"])
def test_state_is_float32_in_a_bf16_model_whichever_scan_fills_it(installed, load, monkeypatch):
    for owner, name, function in dispatch.replacements():
        monkeypatch.setattr(owner, name, function if installed else TRANSFORMERS_OWN[owner, name])
    cache = filled_cache(load(CONFIGS["nemotron_h"], torch.bfloat16), 1)
    assert {state.dtype for state in recurrent(cache, "recurrent_states")} == {torch.float32}
    assert {state.dtype for state in recurrent(cache, "conv_states")} == {torch.bfloat16}


@pytest.mark.parametrize("change", [{"context_tokens": TOKENS + 1}, {"batch": 2}, {"weights_dtype": "bf16"}, {"ssm_dtype": "bf16"}], ids=str)
def test_a_report_of_another_workload_is_not_equal(change, load):
    """The control of the first test."""
    model = load(CONFIGS["nemotron_h"], torch.float32)
    workload = Workload(**{"context_tokens": TOKENS, "weights_dtype": "float32", "kv_dtype": "float32"} | change)
    assert memory_report(architecture_from_config(CONFIGS["nemotron_h"]), workload).total != sum(real_bytes(model, filled_cache(model, 1)).values())


@torch.no_grad()
def test_the_column_of_the_convolution_that_only_transformers_keeps_is_never_read(load):
    model = load(CONFIGS["nemotron_h"], torch.float32)

    def next_logits(forgotten: int | None) -> torch.Tensor:
        torch.manual_seed(1)
        cache = filled_cache(model, 2)
        for state in recurrent(cache, "conv_states") if forgotten is not None else ():
            state[..., forgotten] = 100.0
        return model(torch.full((2, 1), 7), past_key_values=cache, use_cache=True).logits

    expected = next_logits(None)
    assert torch.equal(next_logits(0), expected)
    assert not torch.equal(next_logits(1), expected)  # the control: a column that is read
