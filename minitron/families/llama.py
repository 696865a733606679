"""Llama: blocks of attention with rotary positions and a gated FFN; head tied or not (transformers' models/llama).

Positions are turned by frequencies that follow from head_dim, so head_dim is no axis; heads are. Norms multiply after rounding to the model's number
format. A student whose hidden size is no multiple of its query heads is refused by transformers' configuration class, so by the search too.
"""

from memory_budget.architecture import Architecture
from minitron.families.blocks import Blocks, block_family
from nas.couplings import Multiple


def config(_teacher: dict, _architecture: Architecture) -> dict:
    """`pretraining_tp` is of Megatron's training and refused beside other sizes by older versions of transformers."""
    return {"architectures": ["LlamaForCausalLM"], "pretraining_tp": 1}


FAMILY = block_family("llama", Blocks("llama", "Llama"), config=config, couplings=(Multiple("hidden", "num_attention_heads"),))
