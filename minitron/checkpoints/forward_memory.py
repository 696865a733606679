"""What forward passes of whole models hold on a GPU, counted from architectures before anything is loaded.

Weights are exact counts. What a layer makes on its way is an estimate: the tensors that live at once in its forward pass, named below. (On a CPU, where
Mamba-2 and feed-forward layers go by blocks, it is less, and nothing is refused by it.)
"""

from collections.abc import Sequence

import torch

from memory_budget.architecture import Architecture
from memory_budget.parameters import count_total_parameters
from minitron.machine.device import process_memory_bytes
from minitron.machine.memory_plan import MemoryPlan

FLOAT32 = 4


def forward_memory(stage: str, models: Sequence[tuple[Architecture, int]], *, tokens: int, logits_tokens: int, advice: str) -> MemoryPlan:
    """Models of an architecture and bytes per number each, all there at once, one of them at work on so many tokens.

    `logits_tokens` are those whose float32 logits are there at once, of model and teacher, with as much again for what is made of them.
    """
    largest = max(models, key=lambda model: layer_bytes_per_token(*model))
    parts = {
        "weights": sum(width * count_total_parameters(architecture) for architecture, width in models),
        "states": sum(tokens * architecture.hidden * width for architecture, width in models),
        "a layer's own": tokens * layer_bytes_per_token(*largest),
        "logits": 4 * FLOAT32 * min(logits_tokens, tokens) * largest[0].vocab,
    }
    return MemoryPlan(stage, parts, advice)


def check_forward(plan: MemoryPlan, device: torch.device) -> None:
    """Raises ValueError where a GPU has less than the plan wants."""
    if device.type == "cuda":
        plan.check(*process_memory_bytes(device))


def layer_bytes_per_token(model: Architecture, width: int) -> int:
    """The most that one layer makes on its way for a token, in eval mode.

    Mamba-2: in_proj's output, the convolution's input and output, the scan's result, and the four float32 copies that transformers' gated norm makes.
    Feed-forward: up's output, its relu and the square. Attention: queries, keys, values and their weighted sum. Each beside the norm's float32 copy.
    """
    kinds = set(model.pattern)
    mamba = (model.mamba_inner + 3 * model.mamba_conv_channels + model.mamba_num_heads + model.mamba_inner) * width + 4 * FLOAT32 * model.mamba_inner
    attention = 2 * (model.num_attention_heads + model.num_key_value_heads) * model.attention_head_dim * width
    most = max([mamba] * ("M" in kinds) + [3 * model.ffn * width] * ("-" in kinds) + [attention] * ("*" in kinds), default=0)
    return most + 2 * model.hidden * (FLOAT32 + width)
