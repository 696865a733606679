"""The roofline model against loops over every token, and against what was measured and published."""

from dataclasses import replace

import numpy as np
import pytest

from memory_budget.architecture import Architecture
from memory_budget.calculator import memory_report
from memory_budget.parameters import count_total_parameters
from memory_budget.workload import Workload
from nas.throughput import (
    DEVICES,
    Device,
    Serving,
    decode_seconds,
    decode_step_bytes,
    device_of,
    flops_per_token,
    largest_batch,
    prefill_seconds,
    tokens_per_second,
    weight_bytes_per_pass,
)

TEACHER = Architecture(
    model_type="nemotron_h", pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", hidden=5120, vocab=131072, ffn=20480,
    num_attention_heads=40, num_key_value_heads=8, attention_head_dim=128,
    mamba_num_heads=128, mamba_head_dim=80, mamba_num_groups=8, mamba_state_size=128, mamba_conv_kernel=4,
)  # fmt: skip
STUDENT = replace(TEACHER, pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", hidden=4480, ffn=15680)
WORKLOAD = Workload()
PUBLISHED = Serving(device=DEVICES["a10g"], input_tokens=8192, output_tokens=16384, batch=8)


def test_the_published_student_is_measured_at_70_percent_of_the_roofline():
    """N2, arXiv 2508.14444: 156.42 tokens/s per GPU with vLLM, 8k in, 16k out, batch 8, A10G, bf16. An upper bound lies above."""
    assert 156.42 / tokens_per_second(STUDENT, WORKLOAD, PUBLISHED) == pytest.approx(0.704, abs=5e-4)


def test_the_teacher_is_slower_than_the_student():
    assert tokens_per_second(TEACHER, WORKLOAD, PUBLISHED) < 0.75 * tokens_per_second(STUDENT, WORKLOAD, PUBLISHED)


def test_a_token_costs_two_flops_per_parameter_of_a_matrix():
    """Without context and without the scan's 4·M·P·N: all parameters but the embedding and those that are vectors or the convolution's."""
    vectors = 57 * 4480 + 27 * (3 * 128 + 10240 + 12288 * 5)  # norms; per Mamba layer dt_bias, A_log, D, gated norm, conv1d and its bias
    scan = 27 * 4 * 128 * 80 * 128
    assert flops_per_token(STUDENT, 0) == 2 * (count_total_parameters(STUDENT) - 131072 * 4480 - vectors) + scan
    assert flops_per_token(STUDENT, 1000) - flops_per_token(STUDENT, 0) == 4 * (4 * 40 * 128 * 1000)  # 4 layers


def test_a_step_moves_the_weights_once_and_each_sequences_cache_and_states():
    report = memory_report(STUDENT, Workload(context_tokens=5000, batch=8))
    moved = decode_step_bytes(STUDENT, WORKLOAD, context_tokens=5000, batch=8)
    assert moved == report.weights - 2 * 131072 * 4480 + report.kv_cache + 2 * (report.ssm_state + report.conv_state)


@pytest.mark.parametrize(("context", "seen"), [(179, 4 * 179), (180, 4 * 180), (5000, 5000 + 3 * 180)])
def test_a_step_sees_no_more_than_the_window_in_layers_that_have_one(context, seen):
    """Keys and values of 8 KV heads in bf16 for each of 8 sequences, scores and sums of 40 query heads; the control is the student without windows."""
    assert decode_step_bytes(WINDOWS, WORKLOAD, context_tokens=context, batch=8) - decode_step_bytes(WINDOWS, WORKLOAD, context_tokens=0, batch=8) == (
        8 * seen * 2 * 8 * 128 * 2
    )
    assert flops_per_token(WINDOWS, context) - flops_per_token(WINDOWS, 0) == 4 * seen * 40 * 128
    assert (flops_per_token(WINDOWS, context) == flops_per_token(STUDENT, context)) == (context <= 180)


def test_a_tied_embedding_is_read_as_the_head():
    tied = replace(STUDENT, tied_embeddings=True)
    assert weight_bytes_per_pass(tied, WORKLOAD) == memory_report(tied, WORKLOAD).weights == weight_bytes_per_pass(STUDENT, WORKLOAD)


def decode_loop(architecture: Architecture, serving: Serving) -> float:
    """The oracle: every step's longer time, one after the other."""
    seconds = 0.0
    for context in range(serving.input_tokens + 1, serving.input_tokens + serving.output_tokens):
        moving = decode_step_bytes(architecture, WORKLOAD, context_tokens=context, batch=serving.batch) / serving.device.bytes_per_second
        seconds += max(moving, serving.batch * flops_per_token(architecture, context) / serving.device.flops_per_second)
    return seconds


QUERIES = replace(STUDENT, num_attention_heads=8 * 128, pattern="M-*" * 8)  # as its context grows, products grow faster than bytes
ANSWER = Serving(device=DEVICES["a10g"], input_tokens=100, output_tokens=300, batch=8)
WINDOWS = replace(STUDENT, pattern=STUDENT.pattern.replace("*", "W", 3), window=180)  # full within the answer


def both_sides(architecture: Architecture, context: int) -> tuple[float, float]:
    """Bytes and FLOPs of a step at batch 8."""
    return decode_step_bytes(architecture, WORKLOAD, context_tokens=context, batch=8), 8 * flops_per_token(architecture, context)


def balanced(architecture: Architecture, context: int) -> Serving:
    """On a device that takes as long for the bytes as for the FLOPs of a step at that context."""
    moved, flops = both_sides(architecture, context)
    return replace(ANSWER, device=Device("balanced", 600e9, 600e9 * flops / moved))


@pytest.mark.parametrize("context", [1, 101, 250, 399, 10**6])
@pytest.mark.parametrize(
    "architecture",
    [STUDENT, QUERIES, replace(STUDENT, pattern="M-" * 20), WINDOWS, replace(QUERIES, pattern="M-W" * 8, window=300), replace(WINDOWS, window=50)],
    ids=["student", "queries", "no attention", "windows", "queries in windows", "full windows"],
)
def test_decode_seconds_are_those_of_a_loop_over_every_step(architecture, context):
    """Bound by memory, by products, and turning from one to the other within the answer at step 150 or at its ends."""
    serving = balanced(architecture, context)
    for output_tokens in (1, 2, 300):
        one = replace(serving, output_tokens=output_tokens)
        assert decode_seconds(architecture, WORKLOAD, one) == pytest.approx(decode_loop(architecture, one), rel=1e-9)


@pytest.mark.parametrize(("architecture", "then"), [(STUDENT, "memory"), (QUERIES, "products")])
def test_in_those_loops_the_longer_time_changes_sides(architecture, then):
    """The control: taking one side for all steps would be seen."""
    device = balanced(architecture, 250).device
    times = [(moved / device.bytes_per_second, flops / device.flops_per_second) for moved, flops in (both_sides(architecture, at) for at in range(101, 400))]
    longer = ["memory" if moving > computing else "products" for moving, computing in (times[0], times[-1])]
    assert longer == (["products", "memory"] if then == "memory" else ["memory", "products"])
    assert max(sum(side) for side in zip(*times, strict=True)) < (1 - 1e-6) * decode_loop(architecture, balanced(architecture, 250))


def prefill_by_hand(architecture: Architecture, serving: Serving, batch: int) -> float:
    flops = batch * 2 * 131072 * 4480
    for position in range(serving.input_tokens):
        scan = 27 * (4 * 10240 * 128 + 2 * 128 * (8 * 128 + 10240))
        flops += batch * (flops_per_token(architecture, position + 1) - 2 * 131072 * 4480 - 27 * 4 * 10240 * 128 + scan)
    chunks = -(-batch * serving.input_tokens // serving.prefill_chunk_tokens)
    return max(flops / serving.device.flops_per_second, chunks * weight_bytes_per_pass(STUDENT, WORKLOAD) / serving.device.bytes_per_second)


@pytest.mark.parametrize("chunk", [16, 2048])
@pytest.mark.parametrize("architecture", [STUDENT, WINDOWS, replace(WINDOWS, window=501)], ids=["student", "windows", "wide windows"])
def test_prefill_seconds_are_those_of_a_loop_over_every_token(architecture, chunk):
    serving = replace(PUBLISHED, input_tokens=500, prefill_chunk_tokens=chunk)
    assert prefill_seconds(architecture, WORKLOAD, serving) == pytest.approx(prefill_by_hand(architecture, serving, 8), rel=1e-12)


def test_small_chunks_are_bound_by_reading_the_weights():
    serving = replace(PUBLISHED, input_tokens=512, prefill_chunk_tokens=16)
    read = weight_bytes_per_pass(STUDENT, WORKLOAD) / 600e9
    assert prefill_seconds(STUDENT, WORKLOAD, serving) == pytest.approx(8 * 512 / 16 * read, rel=1e-12)
    assert prefill_seconds(STUDENT, WORKLOAD, replace(serving, prefill_chunk_tokens=4096)) > read


def test_columns_give_what_their_sizes_give_one_at_a_time():
    random = np.random.default_rng(0)
    sizes = {"hidden": (4096, 5120), "ffn": (10000, 20480), "mamba_num_heads": (64, 128), "mamba_head_dim": (40, 80), "num_attention_heads": (8, 40)}
    columns = {name: random.integers(*ends, 50) for name, ends in sizes.items()}
    many = replace(STUDENT, **columns)
    batches = largest_batch(many, WORKLOAD, PUBLISHED, int(16 * 2**30))
    assert 0 in batches and max(batches) > 4
    speeds = tokens_per_second(many, WORKLOAD, PUBLISHED), tokens_per_second(many, WORKLOAD, PUBLISHED, batch=batches)
    for row in range(50):
        one = replace(STUDENT, **{name: int(column[row]) for name, column in columns.items()})
        assert largest_batch(one, WORKLOAD, PUBLISHED, int(16 * 2**30)) == batches[row]
        assert tokens_per_second(one, WORKLOAD, PUBLISHED) == pytest.approx(speeds[0][row], rel=1e-12)
        assert tokens_per_second(one, WORKLOAD, PUBLISHED, batch=int(batches[row])) == pytest.approx(speeds[1][row], rel=1e-12)
        assert (speeds[1][row] == 0) == (batches[row] == 0)


def test_the_largest_batch_is_the_last_that_fits():
    budget = int(19.66 * 2**30)
    batch = largest_batch(STUDENT, WORKLOAD, PUBLISHED, budget)

    def total(batch: int) -> int:
        return memory_report(STUDENT, Workload(context_tokens=8192 + 16384, batch=batch)).total

    assert total(batch) <= budget < total(batch + 1)


def test_more_sequences_at_once_are_more_tokens_per_second():
    speeds = [tokens_per_second(STUDENT, WORKLOAD, PUBLISHED, batch=batch) for batch in (1, 8, 32)]
    assert speeds == sorted(speeds) and speeds[1] > 5 * speeds[0]


def test_a_device_of_ones_own_numbers():
    assert device_of("L4") == DEVICES["l4"]
    assert device_of("l4", bytes_per_second=1e12) == Device("l4", 1e12, 121e12)
    assert device_of("mine", bytes_per_second=1e12, flops_per_second=2e12) == Device("mine", 1e12, 2e12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: device_of("a10"), r"device \(a10\) must be one of a10g, l4, rtx4090, a100-40, a100-80, h100-80"),
        (lambda: device_of("mine", bytes_per_second=1e12), r"device \(mine\) must be one of"),
        (lambda: device_of("mine", bytes_per_second=0.0, flops_per_second=1e12), r"bytes_per_second \(0.0\) of device mine must be a number above 0"),
        (lambda: Serving(device=DEVICES["l4"], batch=0), r"batch \(0\) must be at least 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# Sizes of Llama-3.2-1B: blocks of grouped-query attention and a gated FFN, embeddings and head one matrix.
BLOCKS = Architecture(
    model_type="llama", pattern="*-" * 16, hidden=2048, vocab=128256, tied_embeddings=True, ffn=8192, ffn_gated=True,
    num_attention_heads=32, num_key_value_heads=8, attention_head_dim=64,
)  # fmt: skip
BLOCK_PARAMETERS = 2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048  # q and o, k and v, gate and up and down


def test_a_token_of_a_model_of_blocks_costs_what_a_hand_counts():
    """Every matrix of 16 blocks and the head, and scores and values of 32 query heads: sharing KV heads saves no products."""
    by_hand = 2 * (16 * BLOCK_PARAMETERS + 128256 * 2048) + 16 * 4 * 32 * 64 * 1000
    assert flops_per_token(BLOCKS, 1000) == by_hand
    assert flops_per_token(replace(BLOCKS, num_key_value_heads=32), 1000) == by_hand + 2 * 16 * 2 * (32 - 8) * 64 * 2048  # wider k and v, no more
    assert flops_per_token(replace(BLOCKS, ffn_gated=False), 1000) == by_hand - 2 * 16 * 8192 * 2048  # the control: without its gate


def test_a_head_is_read_at_every_step_and_an_embeddings_row_is_not():
    """Tied or not the same bytes move, though the untied model holds a matrix more."""
    moved = 2 * (16 * (BLOCK_PARAMETERS + 2 * 2048) + 2048 + 128256 * 2048)
    untied = replace(BLOCKS, tied_embeddings=False)
    assert weight_bytes_per_pass(BLOCKS, WORKLOAD) == weight_bytes_per_pass(untied, WORKLOAD) == moved
    assert memory_report(BLOCKS, WORKLOAD).weights == moved and memory_report(untied, WORKLOAD).weights == moved + 2 * 128256 * 2048
    assert flops_per_token(untied, 1) == flops_per_token(BLOCKS, 1)


def test_a_step_reads_the_keys_and_values_of_key_value_heads_alone():
    per_sequence = 16 * 2 * 8 * 64 * 2 * 5000
    moved = decode_step_bytes(BLOCKS, WORKLOAD, context_tokens=5000, batch=8)
    assert moved == weight_bytes_per_pass(BLOCKS, WORKLOAD) + 8 * per_sequence
    fewer = replace(BLOCKS, num_key_value_heads=4)  # the control: half the KV heads, half the bytes beside the weights
    assert decode_step_bytes(fewer, WORKLOAD, context_tokens=5000, batch=8) == weight_bytes_per_pass(fewer, WORKLOAD) + 4 * per_sequence
