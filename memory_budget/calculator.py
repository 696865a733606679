"""Bytes that an architecture needs to serve a workload.

Plain arithmetic, so sizes that are numpy integer arrays pass through: one call can weigh many architectures of one
pattern. Nothing is rounded, no fudge factors: every part is an exact count of numbers times their bytes, but the
activations, which are an estimate whose formula `prefill_activation_bytes` states.

Letters: D hidden · F ffn · Q query heads, K KV heads, H head dim · M Mamba heads, P head dim, G groups, N state · E experts.
"""

from dataclasses import dataclass

from memory_budget.architecture import Architecture
from memory_budget.formats import BYTES_PER_NUMBER, parse_format
from memory_budget.model import Model, as_model, part_of
from memory_budget.parameters import count_active_parameters, count_total_parameters
from memory_budget.parts.part import Part, larger
from memory_budget.workload import Workload

BESIDE = ("lora", "draft", "mtp")  # parts of a report that are there when they are asked for
NO_LIMIT = 2**63 - 1  # in an array of contexts, where a single one is None: numpy's largest integer


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes per part (integers; arrays where the architecture's sizes are). activations is 0 unless the workload asks for them.

    lora, draft, mtp: of what is served beside the model (command/beside.py); None where it is not asked for.
    """

    weights: int
    kv_cache: int
    ssm_state: int
    conv_state: int
    activations: int
    lora: int | None = None
    draft: int | None = None
    mtp: int | None = None

    @property
    def total(self) -> int:
        own = self.kv_cache + self.ssm_state + self.conv_state + self.activations + self.weights  # the one of most dimensions last, where they are arrays
        beside = [size for size in (self.lora, self.draft, self.mtp) if size is not None]
        return own + sum(beside) if beside else own

    def as_dict(self) -> dict[str, int]:
        """The parts and the total, in bytes, under their names."""
        parts = ("weights", "kv_cache", "ssm_state", "conv_state", "activations")
        beside = {name: size for name in BESIDE if (size := getattr(self, name)) is not None}
        return {name: getattr(self, name) for name in parts} | beside | {"total": self.total}


def memory_report(counted: Architecture | Model, workload: Workload) -> MemoryReport:
    """Weights, caches, states and (where asked) activations in bytes.

    The published pair at 131,072 tokens, batch 1, bf16 and a float32 SSM state: 26.07 GiB (12B) and 18.69 GiB (9B).
    """
    model = as_model(counted)
    numbers = [sum(number * getattr(part, name) for number, part in model.layers) for name in ("state_numbers", "conv_numbers")]
    return MemoryReport(
        weights=weight_bytes(model, workload.weights_dtype),
        kv_cache=workload.batch * kv_cache_bytes(model, workload.context_tokens, workload.kv_dtype),
        ssm_state=workload.batch * numbers[0] * BYTES_PER_NUMBER[workload.ssm_dtype],
        conv_state=workload.batch * numbers[1] * BYTES_PER_NUMBER[workload.compute_dtype],
        activations=prefill_activation_bytes(model, workload) if workload.activation_tokens > 0 else 0,
    )


def weight_bytes(counted: Architecture | Model, dtype: str, *, active_only: bool = False) -> int:
    """Bytes of all weights in a format, as `formats` names them; with active_only without the routed experts that a token does not pass through.

    What is packed, and what stays bf16, is said at `Workload`.
    """
    model, packing = as_model(counted), parse_format(dtype)
    parameters = count_active_parameters(model) if active_only else count_total_parameters(model)
    if not packing.is_packed:
        return parameters * BYTES_PER_NUMBER[packing.dtype]
    packed_numbers = packed_bytes = 0
    for number, part in model.layers:
        for copies, outputs, inputs in part.parameters(active_only=active_only).matrices if packing.packs(part.kind) else ():
            packed_numbers = packed_numbers + number * copies * outputs * inputs
            packed_bytes = packed_bytes + number * packing.matrix_bytes(copies, outputs, inputs)
    return (parameters - packed_numbers) * BYTES_PER_NUMBER["bf16"] + packed_bytes


def kv_cache_bytes(counted: Architecture | Model, context_tokens: int, kv_dtype: str) -> int:
    """Keys and values of one sequence of so many tokens in all attention layers: for each token that a layer keeps, at most part.kept_tokens.

    The tensors of transformers' (5.23) DynamicCache are as large; for a window they are views, of one token more once a token was decoded, and of the whole
    prompt from its prefill until then.
    """
    total = 0
    for number, part in as_model(counted).layers:
        kept = part.kept_tokens
        if kept != 0:
            total = total + number * (context_tokens if kept is None else min(kept, context_tokens)) * part.cache_numbers_per_token
    return total * BYTES_PER_NUMBER[kv_dtype]


def attention_bytes_per_token(architecture: Architecture, kv_dtype: str) -> int:
    """Keys and values of one token in one attention layer: 2·K·H·bytes."""
    return part_of(architecture, "*").cache_numbers_per_token * BYTES_PER_NUMBER[kv_dtype]


def ssm_state_bytes_per_layer(architecture: Architecture, ssm_dtype: str) -> int:
    """SSM state of one sequence in one Mamba layer: M·P·N numbers (SSD)."""
    return part_of(architecture, "M").state_numbers * BYTES_PER_NUMBER[ssm_dtype]


def conv_state_bytes_per_layer(architecture: Architecture, dtype: str) -> int:
    """Convolution state of one sequence in one Mamba layer: (M·P + 2·G·N)·(kernel − 1) numbers."""
    return part_of(architecture, "M").conv_numbers * BYTES_PER_NUMBER[dtype]


def prefill_activation_bytes(counted: Architecture | Model, workload: Workload) -> int:
    """Estimated peak of live activations while one chunk of T = activation_tokens tokens passes the layers.

    One layer is alive at a time (no gradients), attention is computed without a T × T score matrix, and only last tokens
    reach the head (their logits are left out: 4·V bytes per sequence). In every layer 2·D numbers a token: the residual stream and the normed input;
    plus the largest mixer's own (`Part.activation_bytes`).
    """
    model, tokens, number = as_model(counted), workload.activation_tokens, BYTES_PER_NUMBER[workload.compute_dtype]
    peak = 0
    for _, part in model.layers:
        peak = larger(peak, part.activation_bytes(tokens, number))
    return 2 * tokens * model.hidden * number + peak


def max_context_tokens(counted: Architecture | Model, workload: Workload, budget_bytes: int) -> int | None:
    """The longest context, in tokens, with which the workload fits; 0 if none does. The model's position limit is not looked at.

    None where context is not what limits: without attention layers a token costs nothing, so if one token fits, any
    number does; and if all attention is within a window, so it is once the windows are full. Number by number for arrays, given a
    pattern with attention; no limit is NO_LIMIT there.
    """
    model = as_model(counted)
    report = memory_report(model, workload)
    free_bytes = budget_bytes - (report.total - report.kv_cache)
    keeping = [(number * part.cache_numbers_per_token, part.kept_tokens) for number, part in model.layers if part.kept_tokens != 0]
    if not keeping:
        return None if free_bytes >= 0 else 0
    free = free_bytes // (workload.batch * BYTES_PER_NUMBER[workload.kv_dtype])  # numbers
    # What a context takes is the least of some straight lines in it, each with the parts that keep the fewest tokens full: it is the longest that any allows.
    longest, limits = 0, sorted({kept for _, kept in keeping if kept is not None})
    for full_up_to in (0, *limits):
        in_full = sum(numbers * kept for numbers, kept in keeping if kept is not None and kept <= full_up_to)
        per_token = sum(numbers for numbers, kept in keeping if kept is None or kept > full_up_to)
        if any(kept is None or kept > full_up_to for _, kept in keeping):
            longest = larger(longest, (free - in_full) // per_token)
    if any(kept is None for _, kept in keeping):
        return longest
    is_free = free >= sum(numbers * kept for numbers, kept in keeping)
    if isinstance(is_free, bool):
        return None if is_free else longest
    return longest + is_free * (NO_LIMIT - longest)


def max_batch(counted: Architecture | Model, workload: Workload, budget_bytes: int) -> int | None:
    """The most sequences of the workload's context that fit at once; 0 if none does.

    None where a sequence costs nothing (no mixer keeps anything). Number by number for arrays.
    """
    model = as_model(counted)
    report = memory_report(model, workload)
    sequences_bytes = report.kv_cache + report.ssm_state + report.conv_state
    is_free = not any(map(_keeps, (part for _, part in model.layers)))
    return _how_many(budget_bytes - (report.total - sequences_bytes), sequences_bytes // workload.batch, is_free=is_free)


def _keeps(part: Part) -> bool:
    return part.kept_tokens != 0 or part.kind == "mamba"


def _how_many(free_bytes: int, each_bytes: int, *, is_free: bool) -> int | None:
    if is_free:
        return None if free_bytes >= 0 else 0
    number = free_bytes // each_bytes
    return number * (number > 0)
