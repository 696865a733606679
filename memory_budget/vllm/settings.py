"""vLLM's own defaults, what it refuses at start, and an estimate of what it takes beside weights and caches.

Source: vllm/engine/arg_utils.py (get_batch_defaults), vllm/config/compilation.py (CUDA graphs against Mamba blocks), vllm/config/model.py (length against
positions) and vllm/model_executor/models/config.py (number formats of states) of vLLM 0.32.0.
"""

from dataclasses import dataclass

from memory_budget.architecture import Architecture
from memory_budget.calculator import prefill_activation_bytes
from memory_budget.model import Model, as_model
from memory_budget.units import format_count
from memory_budget.vllm.allotment import VllmAllotment
from memory_budget.vllm.shards import shard
from memory_budget.workload import Workload

LARGE_DEVICE_GIB, LARGEST_DEVICE_GIB = 70, 160
MOST_GRAPH_TOKENS = 512  # 1,024 on Blackwell
GRAPH_BYTES = 2**20  # the least that vLLM counts for one
LOGITS_COPIES = 2  # float32: the logits and what the sampler makes of them


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """vLLM's --max-num-batched-tokens and --max-num-seqs."""

    tokens: int
    sequences: int


def batch_limits(*, device_gib: float = 0.0, context_tokens: int = 2**31, a100: bool = False, server: bool = True, cpu_devices: int = 0) -> BatchLimits:
    """What vLLM takes where neither is given: more on a card of 70 GiB that is no A100, most on one of 160 GiB.

    server: `vllm serve`; else the class vllm.LLM · cpu_devices: number of them, on CPUs · no more than as many sequences of the context hold together.
    """
    if cpu_devices:
        tokens, sequences = (2048 * cpu_devices, 128 * cpu_devices) if server else (4096 * cpu_devices, 256 * cpu_devices)
    elif device_gib >= LARGEST_DEVICE_GIB:
        tokens, sequences = 16384, 1024
    elif device_gib >= LARGE_DEVICE_GIB and not a100:
        tokens, sequences = 8192 if server else 16384, 1024
    else:
        tokens, sequences = 2048 if server else 8192, 256
    tokens = min(tokens, sequences * context_tokens)
    return BatchLimits(tokens, min(sequences, tokens))


def why_vllm_refuses(
    counted: Architecture | Model, workload: Workload, allotment: VllmAllotment, *, max_num_seqs: int, cuda_graphs: bool = True
) -> tuple[str, ...]:
    """Why vLLM does not start, a sentence each with what to put in the command; empty where it starts.

    cuda_graphs: without them (--enforce-eager) the number of sequences is not held against the blocks.
    """
    positions, reasons = as_model(counted).positions, []
    if positions is not None and workload.context_tokens > positions:
        reasons.append(
            f"vLLM refuses to start: --max-model-len {workload.context_tokens} is more than the config's {format_count(positions, 'positions')}; "
            f"give --max-model-len {positions} or less"
        )
    if not allotment.starts:
        reasons.append(
            f"vLLM refuses to start: a sequence of {format_count(workload.context_tokens, 'tokens')} takes {allotment.blocks_per_request:,} blocks "
            f"and one is kept back, but the pool has {allotment.num_blocks:,}"
        )
    elif cuda_graphs and allotment.most_sequences is not None and max_num_seqs > allotment.most_sequences:
        reasons.append(
            f"vLLM refuses to start: --max-num-seqs {max_num_seqs} is more than the {format_count(allotment.most_sequences, 'blocks')} for Mamba states; "
            f"give --max-num-seqs {allotment.most_sequences} or less"
        )
    return tuple(reasons)


def vllm_ssm_dtype(model_type: str, config_dtype: str | None, compute_dtype: str) -> str:
    """The number format that vLLM gives recurrent states unless --mamba-ssm-cache-dtype says another; on a CPU it is float32 in any case.

    config_dtype: the config's mamba_ssm_cache_dtype (NemotronH) or mamba_ssm_dtype (Qwen3.5), which hold for these types alone; else it is compute_dtype, the
    model's own.
    """
    if model_type == "nemotron_h":
        return config_dtype or "float32"
    if model_type.startswith("qwen3_5"):
        return config_dtype or compute_dtype
    return compute_dtype


def reserve_bytes(counted: Architecture | Model, workload: Workload, *, limits: BatchLimits, cuda_graphs: bool = True, tp: int = 1) -> int:
    """An estimate, not a count, of what vLLM's profiling run finds beside the weights.

    The activations of a prefill of limits.tokens (`prefill_activation_bytes`), the logits of limits.sequences in float32 twice over, and for every CUDA graph
    the 1 MiB that is the least that vLLM counts: graphs of 1, 2, 4, 8, 16, … 256 tokens and from there by 16 up to 2·sequences, at most 512, once for decoding
    and once for the rest. Not in it: the CUDA context, libraries' workspaces and other processes.
    """
    model = shard(as_model(counted), tp)
    chunk = Workload(workload.context_tokens, 1, workload.weights_dtype, workload.kv_dtype, workload.ssm_dtype, limits.tokens)
    logits = LOGITS_COPIES * 4 * limits.sequences * model.vocab * tp
    return prefill_activation_bytes(model, chunk) + logits + (2 * len(_graphs(2 * limits.sequences)) * GRAPH_BYTES if cuda_graphs else 0)


def _graphs(tokens: int) -> list[int]:
    most = min(tokens, MOST_GRAPH_TOKENS)
    return [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)) if size <= most]
