"""Tensor parallelism, vLLM's defaults and what it refuses, by hand."""

from dataclasses import dataclass, replace

import pytest

from memory_budget.model import Model, as_model
from memory_budget.parameters import count_total_parameters
from memory_budget.parts.attention import Attention
from memory_budget.parts.mamba2 import Mamba2
from memory_budget.parts.part import Part
from memory_budget.units import GIB
from memory_budget.vllm.allotment import vllm_allotment, vllm_pool_bytes
from memory_budget.vllm.settings import batch_limits, reserve_bytes, vllm_ssm_dtype, why_vllm_refuses
from memory_budget.vllm.shards import shard
from memory_budget.workload import Workload


def test_two_devices_hold_half_of_all_but_the_norms(architecture_of):
    """Nemotron Nano 9B: whole on both are its norms (57 of 4,480) and nothing else but what is not split within a layer, which it has none of."""
    model = as_model(architecture_of("nemotron-nano-9b-v2"))
    assert 2 * count_total_parameters(shard(model, 2)) == count_total_parameters(model) + 57 * 4480


def test_two_devices_split_a_pool_of_caches_and_states(architecture_of):
    """Half the bytes of each layer, so as many blocks of half the size."""
    one, two = (vllm_allotment(architecture_of("nemotron-nano-9b-v2"), Workload(), pool_bytes=3 * GIB // tp, tp=tp) for tp in (1, 2))
    assert (two.block_tokens, two.num_blocks, two.bytes_per_block) == (one.block_tokens, one.num_blocks, one.bytes_per_block // 2)


def test_what_vllm_printed_of_two_devices():
    """vLLM 0.32.0 with two processes on a CPU, 1 GiB each, 2,048 tokens in float32: 1,048,576 tokens of a Llama and 3,532,045 of a NemotronH."""
    attention = Attention(hidden=128, query_heads=4, key_value_heads=2, head_dim=32)
    mamba = Mamba2(hidden=128, heads=8, head_dim=32, groups=2, state=16, conv_kernel=4)
    for layers, tokens in (((4, attention),), 1_048_576), (((3, mamba), (1, attention)), 3_532_045):
        model = Model(model_type="tiny", vocab=512, hidden=128, tied_embeddings=False, layers=layers, num_layers=4, norms=0)
        workload = Workload(context_tokens=2048, weights_dtype="float32", kv_dtype="float32")
        assert vllm_allotment(model, workload, pool_bytes=GIB, block_size=128, tp=2).kv_cache_tokens == tokens
        assert vllm_allotment(model, workload, pool_bytes=GIB, block_size=128, tp=1).kv_cache_tokens != tokens


def test_key_value_heads_are_copied_where_devices_are_more(architecture_of):
    """Llama 3's 8: halved by 2 devices, one each on 8 and also on 16."""
    heads = [shard(as_model(architecture_of("llama-3-8b")), tp).layers[0][1].key_value_heads for tp in (2, 8, 16)]
    assert heads == [4, 1, 1]


def test_a_single_group_of_mamba2_is_on_every_device(architecture_of):
    mamba = shard(as_model(architecture_of("mamba2-2.7b")), 4).layers[0][1]
    assert (mamba.heads, mamba.groups, mamba.conv_channels) == (20, 1, 20 * 64 + 2 * 128)


def test_the_vocabulary_is_padded_to_64_rows(architecture_of):
    model = replace(as_model(architecture_of("llama-3-8b")), vocab=1000)
    assert [shard(model, tp).vocab for tp in (1, 2)] == [1024, 512]


@pytest.mark.parametrize(
    ("name", "tp", "said"),
    [
        ("nemotron-nano-9b-v2", 16, "must divide the 8 groups of Mamba-2"),
        ("llama-3-8b", 3, "must divide the 32 attention heads"),
        ("qwen2-0.5b", 4, "must divide the 14 attention heads"),
        ("llama-3-8b", 0, r"tp \(0\) must be a whole number of at least 1"),
    ],
)
def test_what_devices_cannot_split_is_refused(name, tp, said, architecture_of):
    with pytest.raises(ValueError, match=said):
        vllm_allotment(architecture_of(name), Workload(), pool_bytes=GIB, tp=tp)


def test_groups_and_key_value_heads_that_do_not_divide_are_refused(architecture_of):
    model = as_model(architecture_of("nemotron-nano-9b-v2"))
    (count, mamba), *rest = model.layers
    with pytest.raises(ValueError, match=r"tp \(4\) must divide the 2 groups of Mamba-2"):
        shard(replace(model, layers=((count, replace(mamba, groups=2)), *rest)), 4)
    llama = as_model(architecture_of("llama-3-8b"))
    (count, attention), *rest = llama.layers
    with pytest.raises(ValueError, match=r"tp \(4\) must divide the 6 key-value heads or be a multiple of them"):
        shard(replace(llama, layers=((count, replace(attention, key_value_heads=6, query_heads=24)), *rest)), 4)


def test_more_devices_than_experts_and_unknown_parts_are_refused(architecture_of):
    model = as_model(architecture_of("nemotron-3-nano-30b-a3b"))
    few = [(count, replace(part, experts=2) if part.kind == "moe" else part) for count, part in model.layers if part.kind == "moe"]
    with pytest.raises(ValueError, match=r"tp \(4\) must be at most the 2 experts"):
        shard(replace(model, layers=tuple(few)), 4)

    @dataclass(frozen=True)
    class Unknown(Part):
        hidden: int

    with pytest.raises(ValueError, match=r"tp \(4\) must be 1 for Unknown: how vLLM splits it is not known here"):
        shard(replace(model, layers=((1, Unknown(8)),)), 4)
    assert shard(replace(model, layers=((1, Unknown(8)),)), 1).layers == ((1, Unknown(8)),)


def test_a_pool_of_one_of_two_devices(architecture_of):
    architecture = architecture_of("nemotron-nano-9b-v2")
    weights = 8_888_227_328 + 57 * 4480  # of two bytes, on two devices
    assert vllm_pool_bytes(architecture, Workload(), device_gib=20, utilization=0.75, tp=2) == 15 * GIB - weights


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({"device_gib": 22.06}, (2048, 256)),
        ({"device_gib": 22.06, "server": False}, (8192, 256)),
        ({"device_gib": 79.11}, (8192, 1024)),
        ({"device_gib": 79.25, "a100": True}, (2048, 256)),
        ({"device_gib": 179.0}, (16384, 1024)),
        ({"cpu_devices": 1}, (2048, 128)),
        ({"cpu_devices": 1, "server": False}, (4096, 256)),
        ({"cpu_devices": 2, "server": False}, (8192, 512)),
        ({"device_gib": 22.06, "context_tokens": 4}, (1024, 256)),
    ],
    ids=str,
)
def test_vllms_own_limits(settings, limits):
    found = batch_limits(**settings)
    assert (found.tokens, found.sequences) == limits


def test_more_sequences_than_blocks_of_states_are_refused_with_a_number(architecture_of):
    """The published command: 136 blocks on a card of 22.06 GiB less 1 GiB, against the 256 sequences that vLLM takes by itself."""
    architecture = architecture_of("nemotron-nano-9b-v2")
    pool = vllm_pool_bytes(architecture, Workload(), device_gib=22.06, overhead_gib=1)
    allotment = vllm_allotment(architecture, Workload(), pool_bytes=pool, prefix_caching=True)
    assert allotment.num_blocks == allotment.most_sequences == 136
    (said,) = why_vllm_refuses(architecture, Workload(), allotment, max_num_seqs=256)
    assert said == "vLLM refuses to start: --max-num-seqs 256 is more than the 136 blocks for Mamba states; give --max-num-seqs 136 or less"
    assert why_vllm_refuses(architecture, Workload(), allotment, max_num_seqs=136) == ()
    assert why_vllm_refuses(architecture, Workload(), allotment, max_num_seqs=256, cuda_graphs=False) == ()


def test_attention_alone_takes_any_number_of_sequences(architecture_of):
    architecture = architecture_of("llama-3-8b")
    allotment = vllm_allotment(architecture, Workload(), pool_bytes=20 * GIB)
    assert allotment.most_sequences is None
    assert why_vllm_refuses(architecture, Workload(), allotment, max_num_seqs=10**6) == ()


def test_a_context_beyond_the_positions_or_the_pool_is_refused_with_a_number(architecture_of):
    model = replace(as_model(architecture_of("llama-3-8b")), positions=8192)
    allotment = vllm_allotment(model, Workload(), pool_bytes=GIB)
    positions, pool = why_vllm_refuses(model, Workload(), allotment, max_num_seqs=256)
    assert positions.endswith("--max-model-len 131072 is more than the config's 8,192 positions; give --max-model-len 8192 or less")
    assert pool.endswith("a sequence of 131,072 tokens takes 8,192 blocks and one is kept back, but the pool has 512")


def test_the_number_format_of_states_is_vllms():
    assert [vllm_ssm_dtype(*asked, "bf16") for asked in
            (("nemotron_h", None), ("nemotron_h", "bf16"), ("qwen3_5", "float32"), ("granitemoehybrid", None), ("granitemoehybrid", "float32"))] == [
        "float32", "bf16", "float32", "bf16", "bf16"]  # fmt: skip


def test_the_reserve_is_activations_logits_and_graphs(architecture_of):
    """Llama 3 8B, 2,048 tokens and 256 sequences, by hand: 2·D residual and normed input and 3·F of the widest mixer a token, in bf16; 2·256·V logits in
    float32; 3 + 31 + 17 graphs, twice."""
    limits = batch_limits(device_gib=22.06)
    activations = 2048 * 2 * (2 * 4096 + 3 * 14336)
    logits = 2 * 4 * 256 * 128_256
    assert reserve_bytes(architecture_of("llama-3-8b"), Workload(), limits=limits) == activations + logits + 2 * (3 + 31 + 17) * 2**20
    assert reserve_bytes(architecture_of("llama-3-8b"), Workload(), limits=limits, cuda_graphs=False) == activations + logits
