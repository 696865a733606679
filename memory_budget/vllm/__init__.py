"""What vLLM allots, refuses and asks for when it starts, by its own rules (0.32.0; where older versions differ, it is said)."""

from memory_budget.vllm.allotment import BLOCK_SIZE_TOKENS, VllmAllotment, vllm_allotment, vllm_longest_context, vllm_pool_bytes
from memory_budget.vllm.settings import BatchLimits, batch_limits, reserve_bytes, vllm_ssm_dtype, why_vllm_refuses
from memory_budget.vllm.shards import shard

__all__ = [
    "BLOCK_SIZE_TOKENS",
    "BatchLimits",
    "VllmAllotment",
    "batch_limits",
    "reserve_bytes",
    "shard",
    "vllm_allotment",
    "vllm_longest_context",
    "vllm_pool_bytes",
    "vllm_ssm_dtype",
    "why_vllm_refuses",
]
