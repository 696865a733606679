"""Llama and Mistral: blocks of attention with rotary positions and a gated FFN; head tied or not (transformers' models/llama, mistral).

Positions are turned by frequencies that follow from head_dim, so head_dim is no axis; heads are. Norms multiply after rounding to the model's number
format. A Llama whose hidden size is no multiple of its query heads is refused by transformers' configuration class, so by the search too; Mistral's ties
no sizes to each other. There is one window for the attention of all layers of a Mistral, or none: a config.json without sliding_window means 4,096
tokens, null means no window. `layer_types` would be ignored by transformers and obeyed by vLLM, so a student's has none.
"""

from memory_budget.architecture import WINDOWED, Architecture
from minitron.families.blocks import Blocks, block_family
from nas.couplings import Multiple


def _llama(_teacher: dict, _architecture: Architecture) -> dict:
    """`pretraining_tp` is of Megatron's training and refused beside other sizes by older versions of transformers."""
    return {"architectures": ["LlamaForCausalLM"], "pretraining_tp": 1}


def _mistral(_teacher: dict, architecture: Architecture) -> dict:
    return {"architectures": ["MistralForCausalLM"], "sliding_window": architecture.window if WINDOWED in architecture.pattern else None}


LLAMA = block_family("llama", Blocks("llama", "Llama"), config=_llama, couplings=(Multiple("hidden", "num_attention_heads"),))
MISTRAL = block_family("mistral", Blocks("mistral", "Mistral"), config=_mistral, dropped=("layer_types",), computing_too=("sliding_window",))
