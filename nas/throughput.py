"""A roofline model of serving: seconds from a device's memory bandwidth and its matrix FLOP/s, nothing else.

A step takes the longer of two times, moving its bytes and doing its matrix products (Williams, Waterman and Patterson,
"Roofline", CACM 2009). Launches, elementwise work, sampling and scheduling cost nothing here, so the throughput is an
upper bound: it ranks architectures, it promises nothing. The published student (N2: 8,192 tokens in, 16,384 out, batch 8,
A10G, bf16) was measured at 156.42 tokens/s, 70 % of the 222.3 given here.

Bytes come from memory_budget's formulas and pass numpy arrays through as those do: a column of sizes gives a column of seconds.
Letters: D hidden · V vocabulary · Q query heads, H head dim · M Mamba heads, P head dim, G groups, N state.
"""

import math
from dataclasses import dataclass, replace
from difflib import get_close_matches

import numpy as np

from memory_budget.architecture import LAYER_KINDS, WINDOWED, Architecture
from memory_budget.calculator import MemoryReport, attention_bytes_per_token, max_batch, memory_report, weight_bytes
from memory_budget.parameters import count_parameters, layer_parameters
from memory_budget.parts.part import SCAN_CHUNK_TOKENS
from memory_budget.workload import BYTES_PER_NUMBER, Workload

Number = int | float | np.ndarray


@dataclass(frozen=True, slots=True)
class Device:
    """Memory bandwidth in bytes/s and dense bf16 matrix FLOP/s (float32 accumulation, no sparsity). Raises ValueError unless both are above 0."""

    name: str
    bytes_per_second: float
    flops_per_second: float

    def __post_init__(self) -> None:
        for what in ("bytes_per_second", "flops_per_second"):
            if not 0 < getattr(self, what) < math.inf:
                raise ValueError(f"{what} ({getattr(self, what)}) of device {self.name} must be a number above 0")


# Vendor's GB/s and TFLOP/s (powers of ten): NVIDIA A10G (the cloud's A10 variant; AWS G5 figures) · NVIDIA L4 datasheet, sparse
# 242 halved · Ada GPU architecture whitepaper, RTX 4090 · A100 40GB and 80GB SXM datasheets · H100 SXM datasheet, sparse 1,979 halved.
DEVICES = {
    device.name: device
    for device in (
        Device("a10g", 600e9, 70e12),
        Device("l4", 300e9, 121e12),
        Device("rtx4090", 1008e9, 165.2e12),
        Device("a100-40", 1555e9, 312e12),
        Device("a100-80", 2039e9, 312e12),
        Device("h100-80", 3350e9, 989e12),
    )
}


def device_of(name: str, *, bytes_per_second: float | None = None, flops_per_second: float | None = None) -> Device:
    """A device by its name, with numbers of one's own in place of the table's; with both numbers any name will do.

    Raises ValueError listing the table for an unknown name without both numbers.
    """
    given = {"bytes_per_second": bytes_per_second, "flops_per_second": flops_per_second}
    given = {what: value for what, value in given.items() if value is not None}
    if len(given) == 2:
        return Device(name, **given)
    if name.lower() not in DEVICES:
        near = get_close_matches(name.lower(), DEVICES, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"device ({name}) must be one of {', '.join(DEVICES)}, or come with both its bytes and its FLOPs per second{meant}")
    return replace(DEVICES[name.lower()], **given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Who is served by what: `batch` sequences at once, each of input_tokens in and output_tokens out.

    prefill_chunk_tokens: tokens of the batch's prompts that share one pass over the weights.
    Raises ValueError for a number below 1.
    """

    device: Device
    input_tokens: int = 8192
    output_tokens: int = 16384
    batch: int = 8
    prefill_chunk_tokens: int = 2048

    def __post_init__(self) -> None:
        for what in ("input_tokens", "output_tokens", "batch", "prefill_chunk_tokens"):
            if getattr(self, what) < 1:
                raise ValueError(f"{what} ({getattr(self, what)}) must be at least 1")


def layer_flops_per_token(architecture: Architecture) -> Number:
    """2 FLOPs per parameter of a matrix that a token passes through in the layers, a router's among them; the head apart, see `head_flops`."""
    flops = 2 * architecture.num_layers_of("E") * architecture.moe_num_experts * architecture.hidden
    for letter in LAYER_KINDS:
        for copies, outputs, inputs in layer_parameters(architecture, letter, active_only=True).matrices:
            flops = flops + 2 * architecture.num_layers_of(letter) * copies * outputs * inputs
    return flops


def head_flops(architecture: Architecture) -> Number:
    """One token's logits: 2·V·D FLOPs. In prefill only a sequence's last token needs them."""
    return 2 * architecture.vocab * architecture.hidden


def seen_tokens(architecture: Architecture, context_tokens: int) -> int:
    """Tokens that the last one of a context sees in all attention layers together, itself included: the whole context, or as much of it as a window holds."""
    windowed = architecture.num_layers_of(WINDOWED)
    return (architecture.num_layers_of("*") - windowed) * context_tokens + windowed * min(context_tokens, architecture.window)


def seen_on_average(architecture: Architecture, tokens: int) -> float:
    """The same of every token of a prompt, which sees those up to itself: Σ min(t, w) over t = 1 … T is m·(2·T − m + 1) / 2, m being min(T, w)."""
    windowed, within = architecture.num_layers_of(WINDOWED), min(tokens, architecture.window)
    return (architecture.num_layers_of("*") - windowed) * (tokens + 1) / 2 + windowed * within * (2 * tokens - within + 1) / (2 * tokens)


def attention_flops(architecture: Architecture, seen: float) -> Number:
    """One token over so many keys and values, of all layers together: 2·Q·H each for the scores and for their sum of values."""
    return 4 * architecture.num_attention_heads * architecture.attention_head_dim * seen


def scan_flops(architecture: Architecture, *, prefill: bool) -> Number:
    """One token through every Mamba layer's scan (SSD, section 6).

    Into the state and out of it, 2·M·P·N each. Prefill in chunks of T = 128 adds C·Bᵀ, 2·T·G·N, and its product with x, 2·T·M·P.
    """
    inner, group_states = architecture.mamba_inner, architecture.mamba_num_groups * architecture.mamba_state_size
    within_chunk = 2 * SCAN_CHUNK_TOKENS * (group_states + inner) if prefill else 0
    return architecture.num_layers_of("M") * (4 * inner * architecture.mamba_state_size + within_chunk)


def flops_per_token(architecture: Architecture, context_tokens: int) -> Number:
    """FLOPs of decoding one token of one sequence whose keys and values, its own included, are context_tokens."""
    products = layer_flops_per_token(architecture) + head_flops(architecture) + scan_flops(architecture, prefill=False)
    return products + attention_flops(architecture, seen_tokens(architecture, context_tokens))


def reached_experts(architecture: Architecture, tokens: Number) -> Number:
    """How many routed experts of a layer so many tokens reach, as expected of a router that sends each to k of its E experts evenly and whatever the others do.

    A token then misses an expert with probability 1 − k/E, all T of them with (1 − k/E)^T, so E·(1 − (1 − k/E)^T) are reached. Routers are less even and
    tokens of one text alike, so fewer are: where experts are many and sequences few, this makes bytes more, and tokens per second fewer, than they will be.
    """
    experts, per_token = architecture.moe_num_experts, architecture.moe_experts_per_token
    return experts * (1 - (1 - per_token / experts) ** tokens)


def weight_bytes_per_pass(architecture: Architecture, workload: Workload, *, tokens: Number = 1) -> Number:
    """Bytes of the weights that one pass of so many tokens reads: all but an untied embedding, of which only a row per token is, and but the routed experts
    that they do not reach.
    """
    embedding = 0 if architecture.tied_embeddings else count_parameters(architecture)["embedding"]
    if "E" in architecture.pattern:  # as if a token went to all that are reached
        architecture = replace(architecture, moe_experts_per_token=reached_experts(architecture, tokens))
    read = weight_bytes(architecture, workload.weights_dtype, active_only=True)
    return read - embedding * BYTES_PER_NUMBER[workload.compute_dtype]


def decode_step_bytes(architecture: Architecture, workload: Workload, *, context_tokens: int, batch: Number) -> Number:
    """Bytes moved to decode one token of each sequence: the weights that they need once; per sequence the keys and values of the tokens
    that it sees (its own written, the others read), and the SSM and convolution states read and written.
    """
    one, seen = _one_token(architecture, workload), seen_tokens(architecture, context_tokens)
    cache = seen * attention_bytes_per_token(architecture, workload.kv_dtype)
    return weight_bytes_per_pass(architecture, workload, tokens=batch) + batch * (cache + 2 * (one.ssm_state + one.conv_state))


def prefill_seconds(architecture: Architecture, workload: Workload, serving: Serving, *, batch: Number | None = None) -> Number:
    """All prompts of the batch, in chunks taken as alike, each the longer of its products and one reading of the weights."""
    batch = serving.batch if batch is None else batch
    tokens = serving.input_tokens
    attention = attention_flops(architecture, seen_on_average(architecture, tokens))
    per_token = layer_flops_per_token(architecture) + scan_flops(architecture, prefill=True) + attention
    flops = batch * (tokens * per_token + head_flops(architecture))
    num_chunks = -(-batch * tokens // serving.prefill_chunk_tokens)
    moved = num_chunks * weight_bytes_per_pass(architecture, workload, tokens=np.minimum(batch * tokens, serving.prefill_chunk_tokens))
    return np.maximum(flops / serving.device.flops_per_second, moved / serving.device.bytes_per_second)


def decode_seconds(architecture: Architecture, workload: Workload, serving: Serving, *, batch: Number | None = None) -> Number:
    """All output tokens but the first, which the prefill gives: step s = 1 … output − 1 sees input + s tokens.

    Bytes and FLOPs of a step are straight lines in s until windows are full, and others from there on, so the sum of the larger is closed.
    """
    batch, steps = serving.batch if batch is None else batch, serving.output_tokens - 1
    filling = min(max(architecture.window - serving.input_tokens, 0), steps)
    seconds = _stretch_seconds(architecture, workload, serving.device, batch, serving.input_tokens + filling, steps - filling)
    if filling:
        seconds = seconds + _stretch_seconds(architecture, workload, serving.device, batch, serving.input_tokens, filling)
    return seconds


def _stretch_seconds(architecture: Architecture, workload: Workload, device: Device, batch: Number, context_tokens: int, num_steps: int) -> Number:
    """The steps after that context, each of which sees as many tokens more than the one before."""
    more = seen_tokens(architecture, context_tokens + 1) - seen_tokens(architecture, context_tokens)
    moving = decode_step_bytes(architecture, workload, context_tokens=context_tokens, batch=batch) / device.bytes_per_second
    computing = batch * flops_per_token(architecture, context_tokens) / device.flops_per_second
    return _sum_of_larger(
        (moving, batch * more * attention_bytes_per_token(architecture, workload.kv_dtype) / device.bytes_per_second),
        (computing, batch * attention_flops(architecture, more) / device.flops_per_second),
        num_steps,
    )


def tokens_per_second(architecture: Architecture, workload: Workload, serving: Serving, *, batch: Number | None = None) -> Number:
    """Output tokens of the whole batch per second, prefill included: batch · output / (prefill + decode).

    Of the workload only the number formats count; `batch` goes before serving.batch and may be a column (of `largest_batch`, say),
    0 giving 0. An upper bound, see the module.
    """
    batch = serving.batch if batch is None else batch
    served = np.maximum(batch, 1)
    seconds = prefill_seconds(architecture, workload, serving, batch=served) + decode_seconds(architecture, workload, serving, batch=served)
    return batch * serving.output_tokens / seconds


def largest_batch(architecture: Architecture, workload: Workload, serving: Serving, budget_bytes: int) -> int | np.ndarray | None:
    """The most sequences of input + output tokens that fit the budget at once; 0 if none does, None without any cache (`max_batch`)."""
    return max_batch(architecture, replace(workload, context_tokens=serving.input_tokens + serving.output_tokens), budget_bytes)


def _one_token(architecture: Architecture, workload: Workload) -> MemoryReport:
    """The memory report of one sequence of one token."""
    return memory_report(architecture, replace(workload, context_tokens=1, batch=1, activation_tokens=0))


def _sum_of_larger(first: tuple[Number, Number], second: tuple[Number, Number], num_steps: int) -> Number:
    """Σ over s = 1 … num_steps of max(a + b·s, c + d·s), first being (a, b) and second (c, d).

    It is Σ (c + d·s) + Σ max(0, gap), where gap is a straight line too: on either side of the step where it turns, its sign is one.
    """
    offset, slope = first[0] - second[0], first[1] - second[1]
    steady = slope == 0
    turn = np.where(steady, 0, np.clip(np.floor(-offset / np.where(steady, 1, slope)), 0, num_steps))
    before = _sum_of_line(offset, slope, turn)
    after = _sum_of_line(offset, slope, num_steps) - before
    return _sum_of_line(*second, num_steps) + np.maximum(before, 0) + np.maximum(after, 0)


def _sum_of_line(offset: Number, slope: Number, num_steps: Number) -> Number:
    """Σ over s = 1 … num_steps of offset + slope·s."""
    return offset * num_steps + slope * num_steps * (num_steps + 1) / 2
