"""Experts that a file holds stacked in one tensor, by the names that each would have alone.

Granite's files have, of a layer of E experts of F neurons, block_sparse_moe.input_linear [E, 2F, D], each expert's gate and then its up, and
block_sparse_moe.output_linear [E, D, F]. An expert's matrices lie there in one piece each, so they are read as tensors of their own (files.py), and
joined where files are written (shards.py): nothing else knows. The names alone tell, both ways; no other family here has them.
"""

import re
from math import prod

_STACK = re.compile(r"(.+\.block_sparse_moe)\.(input_linear|output_linear)\.weight")
_PART = re.compile(r"(.+\.block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_PARTS = {"input_linear": ("gate_proj", "up_proj"), "output_linear": ("down_proj",)}  # of an expert, in their order


def parts_of(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, int], int]]:
    """Of a stack of this shape [E, rows, columns] each part's name and shape, and the number of the first of its numbers; nothing for any other tensor."""
    match = _STACK.fullmatch(name)
    if not match or len(shape) != 3:
        return []
    prefix, matrices = match[1], _PARTS[match[2]]
    each = shape[1] // len(matrices), shape[2]
    return [(f"{prefix}.experts.{expert}.{matrix}.weight", each, (len(matrices) * expert + place) * prod(each))
            for expert in range(shape[0]) for place, matrix in enumerate(matrices)]  # fmt: skip


def stack_of(name: str) -> tuple[str, int, int] | None:
    """The stack that a part of this name belongs to, its expert and its place among the expert's; None for any other tensor."""
    match = _PART.fullmatch(name)
    if not match:
        return None
    stack, matrices = next((stack, matrices) for stack, matrices in _PARTS.items() if match[3] in matrices)
    return f"{match[1]}.{stack}.weight", int(match[2]), matrices.index(match[3])
