"""Lengths of rows that quantisers and kernels want, told of a size of model before it is made: what costs room or time, never what is refused.

int4: weights are packed in groups of 128 numbers of a row (compressed-tensors, W4A16 with group_size 128). llama.cpp's K-quants are blocks of 256 numbers of
a row; a matrix with other rows is stored in a larger type in its place (llama-quant.cpp). causal_conv1d takes its input, a slice of in_proj's output, only
where a token's numbers are a multiple of 8 (state-spaces/mamba #351). transformers computes experts by grouped products, which take rows of whole 16 bytes
(torch's grouped_mm); vLLM packs experts as int4, or FP8 in blocks of 128, only where their neurons are a multiple of that on every GPU.
"""

from collections.abc import Iterable, Mapping
from math import prod

from memory_budget.architecture import Architecture
from minitron.families.base import ATTENTION_HEAD, EXPERT_FFN, FFN, HIDDEN, MAMBA_HEAD, SHARED_FFN, Family

INT4_GROUP, K_QUANT_BLOCK, CONV_MULTIPLE = 128, 256, 8
GROUPED_BYTES, GROUPED_MULTIPLE = 16, 8  # the second: of numbers of 16 bits
# By the slowest axis of a row: what config.json calls its length.
ROW_NAMES = {
    HIDDEN: "hidden_size",
    FFN: "intermediate_size",
    ATTENTION_HEAD: "num_attention_heads × head_dim",
    MAMBA_HEAD: "mamba_num_heads × mamba_head_dim",
    EXPERT_FFN: "moe_intermediate_size",
    SHARED_FFN: "moe_shared_expert_intermediate_size",
    "moe_latent": "moe_latent_size",
}


def row_lengths(family: Family, architecture: Architecture) -> Mapping[str, int]:
    """Lengths of the rows of a model's matrices, by what config.json calls them; of the kinds of layers that it has."""
    sizes, lengths = family.axis_sizes(architecture), {}
    for row in family.table:
        if len(row.dimensions) == 2 and row.kind in ("", "any", *architecture.mixers):
            (segment,) = row.dimensions[1]
            lengths[ROW_NAMES.get(segment[0], segment[0])] = prod(sizes[axis] for axis in segment)
    return lengths


def in_proj_rows(architecture: Architecture) -> int:
    """Numbers that a Mamba-2 layer's in_proj gives for a token: z and x, B and C, a step for each head; 0 without such layers."""
    if "M" not in architecture.pattern:
        return 0
    states = architecture.mamba_num_groups * architecture.mamba_state_size
    return 2 * architecture.mamba_inner + 2 * states + architecture.mamba_num_heads


def row_notes(family: Family, architecture: Architecture) -> dict[str, str]:
    """What a person should know of the lengths of a model's rows: a clause for each use that minds them; empty where none does."""
    lengths = row_lengths(family, architecture)

    def odd(multiple: int, names: Iterable[str] = lengths) -> str:
        return ", ".join(f"{name} {lengths[name]:,}" for name in names if lengths[name] % multiple)

    notes = {}
    if found := odd(INT4_GROUP):
        notes["int4"] = f"rows no multiple of {INT4_GROUP}, so not to be packed as int4 in groups of {INT4_GROUP}: {found}"
    if found := odd(K_QUANT_BLOCK):
        notes["K-quants"] = f"rows no multiple of {K_QUANT_BLOCK}, so of a larger type than a K-quant in llama.cpp: {found}"
    if (rows := in_proj_rows(architecture)) % CONV_MULTIPLE:
        notes["causal_conv1d"] = f"rows of in_proj no multiple of {CONV_MULTIPLE}, which that kernel wants: {rows:,}"
    of_experts = ("moe_latent_size" if architecture.moe_latent else "hidden_size", "moe_intermediate_size") if "E" in architecture.mixers else ()
    if found := odd(GROUPED_MULTIPLE, of_experts):
        notes["experts in transformers"] = f"rows no multiple of {GROUPED_MULTIPLE}, so of no grouped products in 16 bits: {found}"
    return notes
