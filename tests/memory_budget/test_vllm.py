"""vLLM's block arithmetic against values worked out by hand."""

import math
from dataclasses import replace

import pytest

from memory_budget.architecture import Architecture
from memory_budget.units import GIB
from memory_budget.vllm.allotment import vllm_allotment, vllm_pool_bytes
from memory_budget.workload import Workload


def test_published_student_by_hand(architecture_of):
    """State 128·80·128·4 + (10240 + 2048)·3·2 = 5,316,608 bytes; a = 4096; 5,316,608 / 65,536 = 81.1 -> 82 · 16 tokens."""
    allotment = vllm_allotment(architecture_of("nemotron-nano-9b-v2"), Workload(), pool_bytes=3 * GIB)
    assert allotment.block_tokens == 82 * 16 == 1312
    assert allotment.page_bytes == 1312 * 4096
    assert allotment.bytes_per_block == 4 * 1312 * 4096  # groups of 4: attention 4, Mamba 27 = 7 groups
    assert allotment.blocks_per_request == 100 + 7
    assert allotment.num_blocks == 3 * GIB // 21_495_808 == 149
    assert allotment.max_concurrency == 149 / 107
    assert allotment.kv_cache_tokens == 182_520


def test_prefix_caching_keeps_three_states_per_group(architecture_of):
    architecture = architecture_of("nemotron-nano-9b-v2")
    allotment = vllm_allotment(architecture, Workload(), pool_bytes=3 * GIB, prefix_caching=True)
    assert allotment.blocks_per_request == 100 + 3 * 7


@pytest.mark.parametrize(("block_size", "block_tokens"), [(16, 1312), (32, 1312), (128, 1408), (4096, 4096)])
def test_blocks_are_multiples_of_the_block_size(block_size, block_tokens, architecture_of):
    allotment = vllm_allotment(architecture_of("nemotron-nano-9b-v2"), Workload(), pool_bytes=GIB, block_size=block_size)
    assert allotment.block_tokens == block_tokens


def test_what_vllm_printed_for_a_tiny_student_on_a_cpu():
    """vLLM 0.32.0, float32, 1 GiB, 2,048 tokens: with prefix caching 599,186 tokens and 292.57x."""
    tiny = Architecture(model_type="nemotron_h", pattern="M-M-M-M*-M-*-MM-", hidden=96, vocab=2048, ffn=384, num_attention_heads=4, num_key_value_heads=2,
                        attention_head_dim=32, mamba_num_heads=16, mamba_head_dim=16, mamba_num_groups=2, mamba_state_size=32, mamba_conv_kernel=4)  # fmt: skip
    workload = Workload(context_tokens=2048, weights_dtype="float32", kv_dtype="float32")
    allotment = vllm_allotment(tiny, workload, pool_bytes=GIB, prefix_caching=True, block_size=128)
    assert (allotment.kv_cache_tokens, round(allotment.max_concurrency, 2)) == (599_186, 292.57)


def test_a_block_of_no_tokens_is_refused(architecture_of):
    with pytest.raises(ValueError, match="block size .0. must be at least 1 token"):
        vllm_allotment(architecture_of("nemotron-nano-9b-v2"), Workload(), pool_bytes=GIB, block_size=0)


def test_a_bf16_state_halves_the_block(architecture_of):
    allotment = vllm_allotment(architecture_of("nemotron-nano-9b-v2"), Workload(ssm_dtype="bf16"), pool_bytes=GIB)
    assert allotment.block_tokens == 16 * math.ceil((2_621_440 + 73_728) / 65_536) == 672


def test_an_fp8_cache_doubles_the_blocks_tokens_not_its_page(architecture_of):
    allotment = vllm_allotment(architecture_of("nemotron-nano-9b-v2"), Workload(kv_dtype="fp8"), pool_bytes=GIB)
    assert (allotment.block_tokens, allotment.page_bytes) == (16 * 163, 16 * 163 * 2048)


def test_blocks_of_a_pure_transformer_hold_16_tokens(architecture_of):
    allotment = vllm_allotment(architecture_of("llama-3-8b"), Workload(context_tokens=8193), pool_bytes=10 * GIB)
    assert (allotment.block_tokens, allotment.page_bytes, allotment.bytes_per_block) == (16, 16 * 4096, 32 * 16 * 4096)
    assert allotment.blocks_per_request == 513
    assert allotment.num_blocks == 5120


def test_a_pure_mamba_model_takes_one_block_per_sequence_whatever_the_context(architecture_of):
    architecture = architecture_of("mamba2-2.7b")
    state = 80 * 64 * 128 * 4 + (80 * 64 + 2 * 128) * 3 * 2
    for context in (1, 10**6):
        allotment = vllm_allotment(architecture, Workload(context_tokens=context), pool_bytes=GIB)
        assert (allotment.page_bytes, allotment.bytes_per_block, allotment.blocks_per_request) == (state, 64 * state, 1)
        assert allotment.block_tokens == context


@pytest.mark.parametrize(("num_attention", "num_mamba", "group"), [(4, 27, 4), (10, 14, 14), (10, 15, 10), (6, 6, 6), (5, 3, 3), (4, 3, 4)])
def test_layers_are_grouped_by_the_rarer_kind_unless_both_are_nearly_as_many(num_attention, num_mamba, group, architecture_of):
    architecture = replace(architecture_of("nemotron-nano-9b-v2"), pattern="*" * num_attention + "M" * num_mamba)
    allotment = vllm_allotment(architecture, Workload(context_tokens=1312), pool_bytes=GIB)
    assert allotment.bytes_per_block == group * allotment.page_bytes
    assert allotment.blocks_per_request == math.ceil(num_attention / group) + math.ceil(num_mamba / group)


def test_pool_of_a_device_is_its_share_less_overhead_and_weights(architecture_of):
    architecture = architecture_of("nemotron-nano-9b-v2")
    pool = vllm_pool_bytes(architecture, Workload(), device_gib=22.0, utilization=0.75, overhead_gib=0.5)
    assert pool == 16 * GIB - 2 * 8_888_227_328


def test_weights_that_leave_no_pool_are_refused(architecture_of):
    architecture = architecture_of("nemotron-nano-12b-v2")
    pool = vllm_pool_bytes(architecture, Workload(), device_gib=22.06)
    with pytest.raises(ValueError, match="weights and overhead"):
        vllm_allotment(architecture, Workload(), pool_bytes=pool)


def test_a_pool_beyond_all_memory_is_refused(architecture_of):
    with pytest.raises(ValueError, match="pool must be below 8,589,934,592 GiB"):
        vllm_allotment(architecture_of("llama-3-8b"), Workload(), pool_bytes=2**1024)


def test_a_model_with_nothing_to_cache_is_refused():
    architecture = Architecture(model_type="nemotron_h", pattern="-", hidden=8, vocab=16, ffn=8)
    with pytest.raises(ValueError, match="neither attention nor Mamba"):
        vllm_allotment(architecture, Workload(), pool_bytes=GIB)


@pytest.mark.parametrize(
    "settings",
    [
        {"device_gib": 0},
        {"device_gib": math.nan},
        {"device_gib": 1e300},
        {"device_gib": 1, "utilization": 1.1},
        {"device_gib": 1, "overhead_gib": -1},
    ],
    ids=str,
)
def test_a_device_out_of_range_is_refused(settings, architecture_of):
    with pytest.raises(ValueError):
        vllm_pool_bytes(architecture_of("llama-3-8b"), Workload(), **settings)
