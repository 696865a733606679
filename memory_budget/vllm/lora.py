"""Bytes that vLLM allots for LoRA adapters: when it starts, for every slot, at the largest rank, whether an adapter is loaded or not.

Source: vllm/lora/model_manager.py (every linear layer and mixture of experts is wrapped, embedding and head where the model's class names them) and
vllm/lora/layers (lora_a_stacked, lora_b_stacked) of vLLM 0.32.0, without --fully-sharded-loras. Of N slots of rank R, with the matrices that one device holds:

    a projection of n inputs             N·R·(n + outputs), q, k and v, gate and up each; where they are stored as one (FUSED) they have one A
    an expert                            as its own projections; an expert of gpt_oss has one A for gate and up: N·R·n less
    a router, a shared expert's gate     N·R·(D + outputs), whole on every device; NemotronH's router has none
    Mamba-2's in_proj                    N·R·(5·D + outputs): z, x, B, C and dt have each an A
    Mamba-2's convolution                N·R·(3·kernel + channels): x, B and C
    Mamba-1's, a delta net's             N·R·(kernel + channels)
    embedding, head                      N·R·(V + D) each, whole on every device, tied or not

    in the number format of the model (lora_dtype "auto"), not of its packed weights.
"""

from memory_budget.model import Model
from memory_budget.parts.attention import Attention
from memory_budget.parts.delta import GatedDelta
from memory_budget.parts.experts import Experts
from memory_budget.parts.feed_forward import FeedForward
from memory_budget.parts.mamba1 import Mamba1
from memory_budget.parts.mamba2 import Mamba2
from memory_budget.parts.part import Part
from memory_budget.workload import BYTES_PER_NUMBER

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank may be
DEFAULT_RANK = 16
MOST_SLOTS = 2**20
FUSED = ("phi3", "granitemoehybrid")  # whose gate and up (of granitemoehybrid the shared experts') are stored as one, and so have one A
# How many of embedding and head the class of a type has wrapped (embedding_modules); types that are not here are not known to be as above.
TABLES = {
    **dict.fromkeys(("llama", "qwen3", "qwen3_moe", "mixtral", "granite", "granitemoehybrid", "falcon_h1", "jamba", "nemotron", "nemotron_h", "phi3"), 2),
    "cohere2": 1,  # the embedding
    **dict.fromkeys(("mistral", "qwen2", "qwen2_moe", "qwen3_next", "gemma2", "gemma3_text", "olmoe", "gpt_oss", "glm4_moe", "deepseek_v2", "deepseek_v3"), 0),
}


def check_lora(slots: int, rank: int) -> None:
    """Raises ValueError for slots and ranks that vLLM would refuse."""
    if not 1 <= slots <= MOST_SLOTS:
        raise ValueError(f"--lora ({str(slots)[:40]}) must be at least 1 adapter slot, and at most {MOST_SLOTS:,}")
    if rank not in RANKS:
        raise ValueError(f"--lora-rank ({str(rank)[:40]}) must be one of {', '.join(map(str, RANKS))}, as vLLM's --max-lora-rank")


def lora_bytes(model: Model, held: Model, *, slots: int, rank: int, dtype: str) -> int:
    """Bytes on one device, which holds `held` of the model; dtype: the model's. Scalars only. Raises ValueError for a type that is not known to be so."""
    if model.model_type not in TABLES:
        raise ValueError(f"--lora ({slots}): what vLLM wraps in adapters of model_type {model.model_type} is not known here; known: {', '.join(TABLES)}")
    layers = sum(count * _layer_numbers(part, model.model_type) for count, part in held.layers)
    return slots * rank * (layers + TABLES[model.model_type] * (model.vocab + model.hidden)) * BYTES_PER_NUMBER[dtype]


def _layer_numbers(part: Part, model_type: str) -> int:
    """Numbers of one slot of rank 1 in one layer."""
    numbers = sum(copies * (outputs + inputs) for copies, outputs, inputs in part.parameters().matrices if outputs * inputs)
    if isinstance(part, Mamba2):
        return numbers + 4 * part.hidden + 3 * part.conv_kernel + part.conv_channels
    if isinstance(part, Mamba1):
        return numbers + part.conv_kernel + part.inner
    if isinstance(part, GatedDelta):
        return numbers + part.conv_kernel + part.conv_channels
    if isinstance(part, Attention):
        return numbers - 2 * part.hidden * (model_type == "phi3")
    if isinstance(part, FeedForward):
        return numbers - part.hidden * (model_type in FUSED)
    if isinstance(part, Experts):
        numbers += (part.hidden + part.experts) * (model_type != "nemotron_h") + (part.hidden + 1) * part.shared_gate
        numbers -= part.experts * part.width * (model_type == "gpt_oss") + part.hidden * (model_type in FUSED and part.shared_neurons > 0)
    return numbers
