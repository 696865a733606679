"""Qwen3, dense: Llama's blocks with a norm over every query's and key's channels before they are turned (transformers' models/qwen3).

The norm of queries and keys has one weight of head_dim for all heads, so heads are cut without it; head_dim is a number of its own and no axis.
"""

from memory_budget.architecture import Architecture
from minitron.families import qwen
from minitron.families.blocks import Blocks, block_family


def config(teacher: dict, architecture: Architecture) -> dict:
    return {"architectures": ["Qwen3ForCausalLM"], **qwen.windows(teacher, architecture)}


FAMILY = block_family("qwen3", Blocks("qwen3", "Qwen3"), config=config, computing_too=qwen.COMPUTING)
