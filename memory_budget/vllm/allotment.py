"""What vLLM really allots for caches: blocks of one size for attention and Mamba layers alike.

vLLM (v1) cuts one pool into equal pages so that layers that keep unlike things can share it (groups.py). Of Nemotron's hybrids it comes to this:

    a = 2·K·H·bytes                     attention bytes per token and layer
    p = SSM state + conv state          one sequence, one Mamba layer; conv state in the model's dtype
    B = b·ceil(p / (b·a))               tokens per block, so that an attention page holds a Mamba state; b without Mamba
                                        (b is --block-size: 16 on a GPU, which is FlashAttention's least, 128 on a CPU)
    page = B·a                          Mamba's state is padded to it
    g = layers of the rarest kind, or of the commonest where that is below 1.5 times as many
    one block of the pool = g·page      layers are put in groups of g; a group's layers share block numbers
    blocks per request = Σ over kinds of ceil(layers / g)·(blocks of the kind)
                                        full attention: ceil(context / B)
                                        within a window W: ceil(min(W − 1 + f, context) / B) + 1
                                        within chunks of C: ceil(min(C + f, context) / B)
                                        Mamba: 1, with prefix caching 3 (Mamba-2) or 2 (other recurrent layers)
    f = n·--max-num-batched-tokens      tokens in flight; n = 2 with asynchronous scheduling, which is vLLM's default on a GPU, else 1
"""

import math
from dataclasses import asdict, dataclass

from memory_budget.architecture import Architecture
from memory_budget.calculator import weight_bytes
from memory_budget.model import Model, as_model
from memory_budget.units import GIB, format_gib
from memory_budget.vllm.groups import layer_groups
from memory_budget.vllm.shards import shard
from memory_budget.workload import Workload

BLOCK_SIZE_TOKENS = 16
NO_CONTEXT_IS_LONGER = 2**48  # tokens
MOST_BYTES = 2**63  # of a pool
BATCHED_TOKENS = 2048  # of vLLM's server on a GPU of less than 70 GiB and on a CPU; settings.batch_limits knows the others


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmAllotment:
    """Sizes vLLM works out when it starts.

    block_tokens: tokens of an attention block (pure Mamba: the whole context, one state serves it) · page_bytes: one layer's
    part of a block · bytes_per_block: what one block takes from the pool · blocks_per_request: for one sequence of the
    workload's context · num_blocks: in the pool · kv_cache_tokens: what vLLM logs as "GPU KV cache size", floor(max_concurrency · context) ·
    max_concurrency: such sequences at once, what it logs as "Maximum concurrency".

    num_groups: of layers · older_kv_cache_tokens: what versions from about 0.10 to 0.20 logged as "GPU KV cache size", num_blocks // num_groups · block_tokens,
    which is less where there are several groups · starts: whether one sequence fits beside the block that vLLM holds back, without which it refuses to start ·
    most_sequences: the largest --max-num-seqs with which it starts, one block for the states of each; None without states, where any number will do.
    """

    block_tokens: int
    page_bytes: int
    bytes_per_block: int
    blocks_per_request: int
    num_blocks: int
    kv_cache_tokens: int
    max_concurrency: float
    num_groups: int
    older_kv_cache_tokens: int
    starts: bool
    most_sequences: int | None

    def as_dict(self) -> dict[str, int | float | None]:
        """All fields under their names."""
        return asdict(self)


def vllm_allotment(
    counted: Architecture | Model,
    workload: Workload,
    *,
    pool_bytes: int,
    prefix_caching: bool = False,
    block_size: int = BLOCK_SIZE_TOKENS,
    max_num_batched_tokens: int = BATCHED_TOKENS,
    async_scheduling: bool = True,
    hybrid_manager: bool = True,
    tp: int = 1,
) -> VllmAllotment:
    """How vLLM cuts a pool of that many bytes for caches. Scalars only.

    block_size is vLLM's --block-size, of which its blocks are multiples · max_num_batched_tokens, async_scheduling (off on a CPU): of matter within windows
    and chunks alone · hybrid_manager: off (--disable-hybrid-kv-cache-manager) layers within a window or chunks have blocks for the whole context, if others
    have · tp: --tensor-parallel-size; the pool is that of one device.
    The workload's batch plays no part: how many sequences fit is the answer, max_concurrency. Raises ValueError for a negative pool, a block size or batch
    below 1, a model with nothing to cache, and what tp does not split.
    """
    for name, value, unit in (("block size", block_size, "token"), ("max_num_batched_tokens", max_num_batched_tokens, "token")):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1 {unit}")
    if pool_bytes < 0:
        raise ValueError(f"pool ({format_gib(pool_bytes)}) must not be negative: weights and overhead leave no room for caches")
    if pool_bytes >= MOST_BYTES:
        raise ValueError(f"pool must be below {MOST_BYTES // GIB:,} GiB")
    model, context = shard(as_model(counted), tp), workload.context_tokens
    groups = layer_groups(model, workload, block_size=block_size, prefix_caching=prefix_caching, hybrid_manager=hybrid_manager)
    num_blocks = pool_bytes // groups.bytes_per_block
    blocks_per_request = groups.blocks_of_request(context, max_num_batched_tokens * (2 if async_scheduling else 1))
    block_tokens = min((page.tokens for _, page in groups.pages if page.tokens), default=context)
    return VllmAllotment(
        block_tokens=block_tokens,
        page_bytes=max(page.bytes for _, page in groups.pages),
        bytes_per_block=groups.bytes_per_block,
        blocks_per_request=blocks_per_request,
        num_blocks=num_blocks,
        kv_cache_tokens=int(num_blocks / blocks_per_request * context),
        max_concurrency=num_blocks / blocks_per_request,
        num_groups=groups.number,
        older_kv_cache_tokens=num_blocks // groups.number * block_tokens,
        starts=num_blocks > blocks_per_request,
        most_sequences=num_blocks if any(page.kind == "state" for _, page in groups.pages) else None,
    )


def vllm_longest_context(counted: Architecture | Model, workload: Workload, *, pool_bytes: int, most: int | None = None, **options) -> int | None:
    """The longest context with which vLLM starts, in tokens, by the same rules (vLLM's --max-model-len auto); 0 if it starts with none.

    most: not looked beyond, such as the model's positions. None where context is not what limits. options are those of vllm_allotment.
    """

    def fits(context: int) -> bool:
        return vllm_allotment(counted, _with_context(workload, context), pool_bytes=pool_bytes, **options).starts

    if not fits(1):
        return 0
    limit = NO_CONTEXT_IS_LONGER if most is None else most
    if fits(limit):
        return most
    longest, too_long = 1, limit
    while too_long - longest > 1:
        middle = (longest + too_long) // 2
        longest, too_long = (middle, too_long) if fits(middle) else (longest, middle)
    return longest


def _with_context(workload: Workload, context_tokens: int) -> Workload:
    return Workload(context_tokens, workload.batch, workload.weights_dtype, workload.kv_dtype, workload.ssm_dtype, workload.activation_tokens)


def vllm_pool_bytes(
    counted: Architecture | Model, workload: Workload, *, device_gib: float, utilization: float = 0.92, overhead_gib: float = 0.0, tp: int = 1
) -> int:
    """Bytes left for caches on each of tp devices: floor(device·utilization − overhead) − weights. May be negative.

    utilization is vLLM's --gpu-memory-utilization; overhead is what its profiling run finds besides the weights: peak
    activations, CUDA graphs and the like (settings.reserve_bytes estimates it). Raises ValueError for numbers out of range or what tp does not split.
    """
    if not 0 < device_gib < MOST_BYTES // GIB:
        raise ValueError(f"device ({device_gib} GiB) must be above 0 GiB and below {MOST_BYTES // GIB:,} GiB")
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization ({utilization}) must be above 0 and at most 1")
    if not 0 <= overhead_gib < MOST_BYTES // GIB:
        raise ValueError(f"overhead ({overhead_gib} GiB) must be at least 0 GiB and below {MOST_BYTES // GIB:,} GiB")
    return math.floor((device_gib * utilization - overhead_gib) * GIB) - weight_bytes(shard(as_model(counted), tp), workload.weights_dtype)
