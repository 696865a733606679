"""Bytes per part: published totals, transformers' real tensors and caches, and what still fits."""

from dataclasses import replace

import pytest

from memory_budget.architecture import Architecture
from memory_budget.calculator import (
    conv_state_bytes_per_layer,
    max_batch,
    max_context_tokens,
    memory_report,
    prefill_activation_bytes,
    weight_bytes,
)
from memory_budget.hf_config import architecture_from_config
from memory_budget.units import GIB
from memory_budget.workload import Workload

BUDGET_BYTES = 20 * GIB


@pytest.mark.parametrize(
    ("name", "weights", "kv_cache", "total"),
    [
        ("nemotron-nano-12b-v2", 22.93, 3.00, 26.07),
        ("nemotron-nano-9b-v2", 16.56, 2.00, 18.69),
    ],
)
def test_report_is_the_published_one_at_128k_tokens(name, weights, kv_cache, total, architecture_of):
    report = memory_report(architecture_of(name), Workload(context_tokens=131072))
    assert [round(part / GIB, 2) for part in (report.weights, report.kv_cache, report.total)] == [weights, kv_cache, total]


def test_one_attention_layer_keeps_half_a_gib_for_128k_tokens(architecture_of):
    report = memory_report(architecture_of("nemotron-nano-9b-v2"), Workload())
    assert report.kv_cache == 4 * GIB // 2


def test_bf16_state_takes_half_of_float32_state(architecture_of):
    architecture = architecture_of("nemotron-nano-9b-v2")
    assert 2 * memory_report(architecture, Workload(ssm_dtype="bf16")).ssm_state == memory_report(architecture, Workload()).ssm_state


def test_weight_bytes_are_those_of_the_real_tensors(config_of, architecture_of):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "float32")):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of("tiny-nemotron-h")), dtype=dtype)
        real_bytes = sum(parameter.nbytes for parameter in model.parameters())
        assert weight_bytes(architecture_of("tiny-nemotron-h"), name) == real_bytes


def test_cache_bytes_are_those_of_transformers_but_for_one_column_of_the_convolution(config_of, architecture_of):
    """transformers keeps kernel columns of the convolution's input; kernel − 1 are enough, and what vLLM keeps and we count."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    batch, tokens = 2, 11
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of("tiny-nemotron-h")), dtype=torch.float32).eval()
    with torch.no_grad():
        layers = model(torch.randint(0, 100, (batch, tokens)), use_cache=True).past_key_values.layers
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if getattr(layer, "keys", None) is not None)
    recurrent = [layer for layer in layers if hasattr(layer, "recurrent_states")]
    ssm_bytes = sum(state.nbytes for layer in recurrent for state in layer.recurrent_states.values() if state is not None)
    conv_bytes = sum(state.nbytes for layer in recurrent for state in layer.conv_states.values() if state is not None)

    architecture = architecture_of("tiny-nemotron-h")
    workload = Workload(context_tokens=tokens, batch=batch, weights_dtype="float32", kv_dtype="float32", ssm_dtype="float32")
    report = memory_report(architecture, workload)
    kernel = architecture.mamba_conv_kernel
    assert (report.kv_cache, report.ssm_state) == (kv_bytes, ssm_bytes)
    assert report.conv_state * kernel == conv_bytes * (kernel - 1)
    assert memory_report(architecture, replace(workload, context_tokens=tokens + 1)).kv_cache != kv_bytes


WINDOW_OF_8 = {
    "tiny-mistral-null-head-dim": {"sliding_window": 8},
    "tiny-qwen2-head-dim": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "tiny-qwen3-biases": {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "tiny-gemma3-biases": {},
}


@pytest.mark.parametrize("name", WINDOW_OF_8)
def test_cache_bytes_of_windows_are_those_of_transformers(name, config_of):
    """After prompts below, at and above the window, and after further tokens one at a time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of(name) | WINDOW_OF_8[name]
    model, architecture = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval(), architecture_from_config(config)
    for prompt, decoded in ((5, 0), (7, 0), (8, 0), (20, 0), (5, 2), (5, 9), (20, 3)):
        cache = None
        with torch.no_grad():
            for tokens in (prompt, *[1] * decoded):
                cache = model(torch.zeros(2, tokens, dtype=torch.long), past_key_values=cache, use_cache=True).past_key_values
        workload = Workload(context_tokens=prompt + decoded, batch=2, kv_dtype="float32")
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert memory_report(architecture, workload).kv_cache == held
        assert (memory_report(replace(architecture, window=9), workload).kv_cache == held) == (prompt + decoded < 8)  # a window more, a token more


def test_caches_of_a_published_model_are_the_sum_counted_by_hand(architecture_of):
    """Gemma-3-1B: 4 layers keep all tokens, 22 the last 511; keys and values of one head of 256 numbers in bf16."""
    report = memory_report(architecture_of("gemma-3-1b"), Workload(context_tokens=32768, batch=3))
    assert report.kv_cache == 3 * (4 * 32768 + 22 * 511) * 2 * 256 * 2


@pytest.mark.parametrize("pattern", ["*-*-", "W-W-*-", "W-*-*-M", "W-W-", "M-W"])
@pytest.mark.parametrize("window", [2, 5])
def test_the_longest_context_is_the_last_that_fits_at_any_budget(pattern, window):
    """Against trying every context: the cache grows by every layer up to the window, and by those without one from there on."""
    architecture = Architecture(model_type="nemotron_h", pattern=pattern, hidden=2, vocab=3, ffn=2, num_attention_heads=1, num_key_value_heads=1,
                                attention_head_dim=2, window=window, mamba_num_heads=1, mamba_head_dim=1, mamba_num_groups=1, mamba_state_size=1)  # fmt: skip
    workload = Workload(context_tokens=1000, batch=3, kv_dtype="fp8")
    totals = [memory_report(architecture, replace(workload, context_tokens=tokens)).total for tokens in range(1, 40)]
    found = set()
    for budget in range(totals[0] - 3, totals[15] + 3):
        fitting = sum(total <= budget for total in totals)
        expected = None if fitting == len(totals) else fitting
        assert max_context_tokens(architecture, workload, budget) == expected
        found.add(expected)
    assert found > {0, window - 1, window + 3} if "*" in pattern else found == {*range(window - 1), None}  # both stretches were met


@pytest.mark.parametrize("name", ["nemotron-nano-9b-v2", "nemotron-3-nano-30b-a3b", "llama-3-8b", "qwen3-8b", "gemma-3-1b"])
@pytest.mark.parametrize(
    "workload",
    [
        Workload(weights_dtype="int4"),
        Workload(weights_dtype="fp8", batch=3, kv_dtype="fp8", activation_tokens=2048),
    ],
    ids=str,
)
def test_longest_context_fits_and_one_token_more_does_not(name, workload, architecture_of):
    architecture = architecture_of(name)
    longest = max_context_tokens(architecture, workload, 40 * GIB)
    assert longest > 0
    assert memory_report(architecture, replace(workload, context_tokens=longest)).total <= 40 * GIB
    assert memory_report(architecture, replace(workload, context_tokens=longest + 1)).total > 40 * GIB


@pytest.mark.parametrize("name", ["nemotron-nano-9b-v2", "llama-3-8b", "mamba2-2.7b", "mistral-7b-v0.1", "gemma-3-1b"])
def test_largest_batch_fits_and_one_sequence_more_does_not(name, architecture_of):
    architecture, workload = architecture_of(name), Workload(context_tokens=4096, batch=7)
    largest = max_batch(architecture, workload, BUDGET_BYTES)
    assert largest > 0
    assert memory_report(architecture, replace(workload, batch=largest)).total <= BUDGET_BYTES
    assert memory_report(architecture, replace(workload, batch=largest + 1)).total > BUDGET_BYTES


def test_nothing_fits_a_budget_below_the_weights(architecture_of):
    architecture = architecture_of("nemotron-nano-12b-v2")
    assert (max_context_tokens(architecture, Workload(), BUDGET_BYTES), max_batch(architecture, Workload(), BUDGET_BYTES)) == (0, 0)


def test_context_of_a_pure_mamba_model_has_no_limit_but_its_state_must_fit(architecture_of):
    architecture = architecture_of("mamba2-2.7b")
    assert max_context_tokens(architecture, Workload(), BUDGET_BYTES) is None
    state_misses_by_one = memory_report(architecture, Workload()).total - 1
    assert max_context_tokens(architecture, Workload(), state_misses_by_one) == 0


def test_batch_of_a_model_without_any_cache_has_no_limit():
    architecture = Architecture(model_type="nemotron_h", pattern="--", hidden=8, vocab=16, ffn=8)
    assert max_batch(architecture, Workload(), GIB) is None
    assert max_batch(architecture, Workload(), 1) == 0


def test_quantised_weights_are_the_sum_counted_by_hand():
    """One attention layer, D = 200: q 4·8 × 200, k and v 2·8 × 200 each, o 200 × 32; 100 × 200 embedding and head; two norms."""
    architecture = Architecture(model_type="llama", pattern="*", hidden=200, vocab=100, num_attention_heads=4, num_key_value_heads=2, attention_head_dim=8)
    rest = 2 * (2 * 100 * 200 + 2 * 200)
    assert weight_bytes(architecture, "fp8") == rest + (32 + 16 + 16) * 200 + 200 * 32
    assert weight_bytes(architecture, "int4") == rest + (32 + 16 + 16) * (100 + 2 * 2) + 200 * (16 + 1 * 2)


def test_quantised_weights_leave_the_convolutions_state_in_bf16(architecture_of):
    architecture = architecture_of("nemotron-nano-9b-v2")
    assert memory_report(architecture, Workload(weights_dtype="int4")).conv_state == 27 * conv_state_bytes_per_layer(architecture, "bf16")


def test_total_holds_activations_only_where_they_are_asked_for(architecture_of):
    architecture = architecture_of("nemotron-nano-9b-v2")
    without, asked = memory_report(architecture, Workload()), Workload(activation_tokens=8192)
    assert without.activations == 0
    assert memory_report(architecture, asked).total - without.total == prefill_activation_bytes(architecture, asked) > 0


def test_activations_of_a_ffn_are_the_sum_counted_by_hand():
    architecture = Architecture(model_type="nemotron_h", pattern="-", hidden=10, vocab=16, ffn=30)
    assert prefill_activation_bytes(architecture, Workload(activation_tokens=7)) == 7 * (2 * 10 + 2 * 30) * 2


def test_the_peak_is_the_largest_kind_wherever_it_stands_in_the_pattern(architecture_of):
    architecture, workload = replace(architecture_of("nemotron-nano-9b-v2"), ffn=1), Workload(activation_tokens=512)
    peaks = {pattern: prefill_activation_bytes(replace(architecture, pattern=pattern), workload) for pattern in ("M", "-", "M-", "-M", "*M-")}
    assert peaks["M"] == peaks["M-"] == peaks["-M"] == peaks["*M-"] > peaks["-"]


def test_a_layer_kind_below_the_peak_does_not_move_the_activations(architecture_of):
    architecture, workload = architecture_of("llama-3-8b"), Workload(activation_tokens=512)
    wider = replace(architecture, num_key_value_heads=16)
    assert prefill_activation_bytes(wider, workload) == prefill_activation_bytes(architecture, workload)
    assert prefill_activation_bytes(replace(architecture, ffn=2 * architecture.ffn), workload) > prefill_activation_bytes(architecture, workload)
