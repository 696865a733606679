"""What vLLM really allots for caches: blocks of one size for attention and Mamba layers alike.

vLLM (v1) cuts one pool into equal pages so that attention and Mamba layers can share it. Source of every rule:
vllm/v1/core/kv_cache_utils.py (groups, concurrency) and vllm/platforms/interface.py (page alignment) of vllm-project/vllm.

    a = 2·K·H·bytes                     attention bytes per token and layer
    p = SSM state + conv state          one sequence, one Mamba layer; conv state in the model's dtype
    B = b·ceil(p / (b·a))               tokens per block, so that an attention page holds a Mamba state; b without Mamba
                                        (b is --block-size: 16 on a GPU, which is FlashAttention's least, 128 on a CPU)
    page = B·a                          Mamba's state is padded to it
    g = min(attention layers, Mamba layers), or the larger of the two where that is below 1.5 times the smaller
    one block of the pool = g·page      layers are put in groups of g; a group's layers share block numbers
    blocks per request = ceil(attention / g)·ceil(context / B) + ceil(Mamba / g)·s
    s = 1, with prefix caching 3        the running state, the previous one and a prefill checkpoint ("align" mode of
                                        Mamba-2; versions before the checkpoint block say 2)
"""

import math
from dataclasses import asdict, dataclass

from memory_budget.architecture import Architecture
from memory_budget.calculator import attention_bytes_per_token, conv_state_bytes_per_layer, ssm_state_bytes_per_layer, weight_bytes
from memory_budget.units import GIB, format_gib
from memory_budget.workload import Workload

BLOCK_SIZE_TOKENS = 16
STATES_WITHOUT_PREFIX_CACHING = 1
STATES_WITH_PREFIX_CACHING = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmAllotment:
    """Sizes vLLM works out when it starts.

    block_tokens: tokens of an attention block (pure Mamba: the whole context, one state serves it) · page_bytes: one layer's
    part of a block · bytes_per_block: what one block takes from the pool · blocks_per_request: for one sequence of the
    workload's context · num_blocks: in the pool · max_concurrency: such sequences at once; below 1 vLLM refuses to start ·
    kv_cache_tokens: what vLLM logs as "GPU KV cache size", floor(max_concurrency · context); older versions logged
    num_blocks // groups · block_tokens instead, which is less for a hybrid.
    """

    block_tokens: int
    page_bytes: int
    bytes_per_block: int
    blocks_per_request: int
    num_blocks: int
    kv_cache_tokens: int
    max_concurrency: float

    def as_dict(self) -> dict[str, int | float]:
        """All fields under their names."""
        return asdict(self)


def vllm_allotment(
    architecture: Architecture, workload: Workload, *, pool_bytes: int, prefix_caching: bool = False, block_size: int = BLOCK_SIZE_TOKENS
) -> VllmAllotment:
    """How vLLM cuts a pool of that many bytes for caches. Scalars only. Every attention layer is taken to keep the whole context, also within a window.

    block_size is vLLM's --block-size, of which it makes its blocks multiples. The workload's batch plays no part: how many sequences
    fit is the answer, max_concurrency. Raises ValueError for a negative pool, a block size below 1 or a pattern with nothing to cache.
    """
    if block_size < 1:
        raise ValueError(f"block size ({block_size}) must be at least 1 token")
    if pool_bytes < 0:
        raise ValueError(f"pool ({format_gib(pool_bytes)}) must not be negative: weights and overhead leave no room for caches")
    num_attention, num_mamba = architecture.num_layers_of("*"), architecture.num_layers_of("M")
    if not num_attention + num_mamba:
        raise ValueError(f"pattern {architecture.pattern} has neither attention nor Mamba layers: there is no cache for vLLM to allot")
    states = STATES_WITH_PREFIX_CACHING if prefix_caching else STATES_WITHOUT_PREFIX_CACHING
    group = _group_size(num_attention, num_mamba)
    block_tokens, page_bytes = _block(architecture, workload, block_size)
    attention_blocks = _ceil_divide(num_attention, group) * _ceil_divide(workload.context_tokens, block_tokens)
    blocks_per_request = attention_blocks + _ceil_divide(num_mamba, group) * states
    num_blocks = pool_bytes // (group * page_bytes)
    return VllmAllotment(
        block_tokens=block_tokens,
        page_bytes=page_bytes,
        bytes_per_block=group * page_bytes,
        blocks_per_request=blocks_per_request,
        num_blocks=num_blocks,
        kv_cache_tokens=int(num_blocks / blocks_per_request * workload.context_tokens),
        max_concurrency=num_blocks / blocks_per_request,
    )


def vllm_pool_bytes(
    architecture: Architecture, workload: Workload, *, device_gib: float, utilization: float = 0.92, overhead_gib: float = 0.0
) -> int:
    """Bytes left for caches: floor(device·utilization − overhead) − weights. May be negative.

    utilization is vLLM's --gpu-memory-utilization; overhead is what its profiling run finds besides the weights: peak
    activations, CUDA graphs and the like. Raises ValueError for numbers out of range.
    """
    if not 0 < device_gib < float("inf"):
        raise ValueError(f"device ({device_gib} GiB) must be above 0 GiB")
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization ({utilization}) must be above 0 and at most 1")
    if not 0 <= overhead_gib < float("inf"):
        raise ValueError(f"overhead ({overhead_gib} GiB) must be at least 0 GiB")
    return math.floor((device_gib * utilization - overhead_gib) * GIB) - weight_bytes(architecture, workload.weights_dtype)


def _block(architecture: Architecture, workload: Workload, block_size: int) -> tuple[int, int]:
    """Tokens per attention block and bytes per page."""
    state_bytes = 0
    if "M" in architecture.pattern:
        state_bytes = ssm_state_bytes_per_layer(architecture, workload.ssm_dtype)
        state_bytes += conv_state_bytes_per_layer(architecture, workload.compute_dtype)
    if "*" not in architecture.mixers:
        return workload.context_tokens, state_bytes
    token_bytes = attention_bytes_per_token(architecture, workload.kv_dtype)
    block_tokens = block_size * max(1, _ceil_divide(state_bytes, block_size * token_bytes))
    return block_tokens, block_tokens * token_bytes


def _group_size(num_attention: int, num_mamba: int) -> int:
    smaller, larger = sorted((num_attention, num_mamba))
    return larger if larger < 1.5 * smaller or smaller == 0 else smaller


def _ceil_divide(number: int, divisor: int) -> int:
    return -(-number // divisor)
