"""Bytes that an architecture needs to serve a workload.

Plain arithmetic, so sizes that are numpy integer arrays pass through: one call can weigh many architectures of one
pattern. Nothing is rounded, no fudge factors: every part is an exact count of numbers times their bytes, but the
activations, which are an estimate whose formula `prefill_activation_bytes` states.

Letters: D hidden · F ffn · Q query heads, K KV heads, H head dim · M Mamba heads, P head dim, G groups, N state · E experts.
"""

from dataclasses import dataclass

from memory_budget.architecture import LAYER_KINDS, WINDOWED, Architecture
from memory_budget.parameters import count_total_parameters, layer_parameters
from memory_budget.workload import BYTES_PER_NUMBER, INT4_GROUP_NUMBERS, INT4_SCALE_BYTES, QUANTISED_DTYPES, Workload

SCAN_CHUNK_TOKENS = 128  # chunk_size of every published Nemotron-H config
NO_LIMIT = 2**63 - 1  # in an array of contexts, where a single one is None: numpy's largest integer


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes per part (integers; arrays where the architecture's sizes are). activations is 0 unless the workload asks for them."""

    weights: int
    kv_cache: int
    ssm_state: int
    conv_state: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.ssm_state + self.conv_state + self.activations

    def as_dict(self) -> dict[str, int]:
        """The parts and the total, in bytes, under their names."""
        parts = ("weights", "kv_cache", "ssm_state", "conv_state", "activations", "total")
        return {name: getattr(self, name) for name in parts}


def memory_report(architecture: Architecture, workload: Workload) -> MemoryReport:
    """Weights, caches, states and (where asked) activations in bytes.

    The published pair at 131,072 tokens, batch 1, bf16 and a float32 SSM state: 26.07 GiB (12B) and 18.69 GiB (9B).
    """
    return MemoryReport(
        weights=weight_bytes(architecture, workload.weights_dtype),
        kv_cache=workload.batch * kv_cache_bytes(architecture, workload.context_tokens, workload.kv_dtype),
        ssm_state=workload.batch * architecture.num_layers_of("M") * ssm_state_bytes_per_layer(architecture, workload.ssm_dtype),
        conv_state=workload.batch * architecture.num_layers_of("M") * conv_state_bytes_per_layer(architecture, workload.compute_dtype),
        activations=prefill_activation_bytes(architecture, workload) if workload.activation_tokens > 0 else 0,
    )


def weight_bytes(architecture: Architecture, dtype: str) -> int:
    """Bytes of all weights. What fp8 and int4 pack, and what stays bf16, is said at `Workload`."""
    parameters = count_total_parameters(architecture)
    if dtype not in QUANTISED_DTYPES:
        return parameters * BYTES_PER_NUMBER[dtype]
    packed_numbers = packed_bytes = 0
    for letter in LAYER_KINDS:
        for copies, outputs, inputs in layer_parameters(architecture, letter).matrices:
            matrices = architecture.num_layers_of(letter) * copies
            packed_numbers = packed_numbers + matrices * outputs * inputs
            packed_bytes = packed_bytes + matrices * outputs * _packed_row_bytes(inputs, dtype)
    return (parameters - packed_numbers) * BYTES_PER_NUMBER["bf16"] + packed_bytes


def _packed_row_bytes(inputs: int, dtype: str) -> int:
    """Bytes of one row of a quantised matrix with that many inputs."""
    if dtype == "fp8":
        return inputs
    groups = (inputs + INT4_GROUP_NUMBERS - 1) // INT4_GROUP_NUMBERS
    return (inputs + 1) // 2 + groups * INT4_SCALE_BYTES


def kv_cache_bytes(architecture: Architecture, context_tokens: int, kv_dtype: str) -> int:
    """Keys and values of one sequence of so many tokens in all attention layers: 2·K·H·bytes for each token that a layer keeps.

    A layer keeps all tokens, or within a window the last window − 1, which with the next one are those that it sees. So do the tensors of transformers'
    (5.23) DynamicCache; there they are views, of one token more once a token was decoded, and of the whole prompt from its prefill until then.
    """
    full, windowed, most = _attention_layers(architecture)
    return (full * context_tokens + windowed * min(context_tokens, most)) * attention_bytes_per_token(architecture, kv_dtype)


def _attention_layers(architecture: Architecture) -> tuple[int, int, int]:
    """Layers that keep all tokens, layers within a window, and the most tokens that one of these keeps."""
    windowed = architecture.num_layers_of(WINDOWED)
    return architecture.num_layers_of("*") - windowed, windowed, architecture.window - 1


def attention_bytes_per_token(architecture: Architecture, kv_dtype: str) -> int:
    """Keys and values of one token in one attention layer: 2·K·H·bytes."""
    return 2 * architecture.num_key_value_heads * architecture.attention_head_dim * BYTES_PER_NUMBER[kv_dtype]


def ssm_state_bytes_per_layer(architecture: Architecture, ssm_dtype: str) -> int:
    """SSM state of one sequence in one Mamba layer: M·P·N numbers (SSD)."""
    return architecture.mamba_inner * architecture.mamba_state_size * BYTES_PER_NUMBER[ssm_dtype]


def conv_state_bytes_per_layer(architecture: Architecture, dtype: str) -> int:
    """Convolution state of one sequence in one Mamba layer: (M·P + 2·G·N)·(kernel − 1) numbers.

    The last kernel − 1 inputs are enough, and what vLLM keeps; transformers' cache keeps kernel columns.
    """
    return architecture.mamba_conv_channels * (architecture.mamba_conv_kernel - 1) * BYTES_PER_NUMBER[dtype]


def prefill_activation_bytes(architecture: Architecture, workload: Workload) -> int:
    """Estimated peak of live activations while one chunk of T = activation_tokens tokens passes the layers.

    One layer is alive at a time (no gradients), attention is computed without a T × T score matrix, and only last tokens
    reach the head (their logits are left out: 4·V bytes per sequence). In numbers of the compute dtype per token:
        every layer   2·D: the residual stream and the normed input; plus the largest of
        attention     (Q + 2·K)·H from q, k, v and Q·H out of the attention
        FFN           2·F: before and after the activation function (gated: 3·F, gate and up before it)
        Mamba-2       2·M·P + 2·G·N + M out of in_proj, M·P + 2·G·N out of the convolution, M·P out of the scan, and in
                      float32 one state M·P·N per chunk of 128 tokens
        MoE           per expert of a token: 2·F_e and its output; the latent; in float32 a score per expert; or 2·F of the
                      shared expert if that is more
    """
    tokens, number = workload.activation_tokens, BYTES_PER_NUMBER[workload.compute_dtype]
    by_kind = {"M": _mamba_activation_bytes, "*": _attention_activation_bytes, "-": _ffn_activation_bytes, "E": _moe_activation_bytes}
    peak = 0
    for letter, activation_bytes in by_kind.items():
        if letter in architecture.mixers:
            peak = _larger(peak, activation_bytes(architecture, tokens, number))
    return 2 * tokens * architecture.hidden * number + peak


def _mamba_activation_bytes(architecture: Architecture, tokens: int, number: int) -> int:
    inner, channels = architecture.mamba_inner, architecture.mamba_conv_channels
    projected = inner + channels + architecture.mamba_num_heads
    chunks = -(-tokens // SCAN_CHUNK_TOKENS)
    return tokens * (projected + channels + inner) * number + chunks * inner * architecture.mamba_state_size * 4


def _attention_activation_bytes(architecture: Architecture, tokens: int, number: int) -> int:
    heads = 2 * architecture.num_attention_heads + 2 * architecture.num_key_value_heads
    return tokens * heads * architecture.attention_head_dim * number


def _ffn_activation_bytes(architecture: Architecture, tokens: int, number: int) -> int:
    return tokens * (3 if architecture.ffn_gated else 2) * architecture.ffn * number


def _moe_activation_bytes(architecture: Architecture, tokens: int, number: int) -> int:
    has_latent = architecture.moe_latent > 0
    expert_width = architecture.moe_latent * has_latent + architecture.hidden * (1 - has_latent)
    routed = architecture.moe_experts_per_token * (2 * architecture.moe_ffn + expert_width) + architecture.moe_latent
    scores = tokens * architecture.moe_num_experts * 4
    return _larger(tokens * routed * number + scores, tokens * 2 * architecture.moe_shared_ffn * number)


def _larger(first: int, second: int) -> int:
    """max() that also works number by number on arrays."""
    return (first + second + abs(first - second)) // 2


def max_context_tokens(architecture: Architecture, workload: Workload, budget_bytes: int) -> int | None:
    """The longest context, in tokens, with which the workload fits; 0 if none does. The model's position limit is not looked at.

    None where context is not what limits: without attention layers a token costs nothing, so if one token fits, any
    number does; and if all attention is within a window, so it is once the windows are full. Number by number for arrays, given a
    pattern with attention; no limit is NO_LIMIT there.
    """
    report, (full, windowed, most) = memory_report(architecture, workload), _attention_layers(architecture)
    free_bytes = budget_bytes - (report.total - report.kv_cache)
    if not full + windowed:
        return None if free_bytes >= 0 else 0
    tokens = free_bytes // (workload.batch * attention_bytes_per_token(architecture, workload.kv_dtype))  # that fit, of all layers together
    # A context c keeps the lesser of (full + windowed)·c and full·c + windowed·most tokens, so the longer of what either leaves room for.
    longest = _larger(0, tokens // (full + windowed))
    if full:
        return _larger(longest, (tokens - windowed * most) // full)
    is_free = tokens >= windowed * most
    if isinstance(is_free, bool):
        return None if is_free else longest
    return longest + is_free * (NO_LIMIT - longest)


def max_batch(architecture: Architecture, workload: Workload, budget_bytes: int) -> int | None:
    """The most sequences of the workload's context that fit at once; 0 if none does.

    None where a sequence costs nothing (a pattern with neither attention nor Mamba layers). Number by number for arrays.
    """
    report = memory_report(architecture, workload)
    sequences_bytes = report.kv_cache + report.ssm_state + report.conv_state
    is_free = not set("*M") & set(architecture.mixers)
    return _how_many(budget_bytes - (report.total - sequences_bytes), sequences_bytes // workload.batch, is_free=is_free)


def _how_many(free_bytes: int, each_bytes: int, *, is_free: bool) -> int | None:
    if is_free:
        return None if free_bytes >= 0 else 0
    number = free_bytes // each_bytes
    return number * (number > 0)
