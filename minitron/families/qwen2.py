"""Qwen2 and Qwen2.5, dense: Llama's blocks with biases on queries, keys and values (transformers' models/qwen2).

Its configuration class has no head_dim of its own and takes hidden size over heads where config.json has none; one that is there is used.
"""

from memory_budget.architecture import Architecture
from minitron.families import qwen
from minitron.families.blocks import Blocks, block_family


def config(teacher: dict, architecture: Architecture) -> dict:
    return {"architectures": ["Qwen2ForCausalLM"], **qwen.windows(teacher, architecture)}


FAMILY = block_family("qwen2", Blocks("qwen2", "Qwen2"), config=config, computing_too=qwen.COMPUTING)
