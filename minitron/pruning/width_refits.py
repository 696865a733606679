"""What writes to the residual stream refitted for fewer neurons or heads: for every width that candidates have, in one walk over the model.

The compensated cut (compensate.py) refits a candidate's writing matrices in lock-step with its base, a walk for each candidate. Here
every layer is looked at alone: its writer W [D, I] is given activations a and makes W·a; cut along the layer's own axis it is given
fewer, and is solved anew to make the same W·a of them. That serves candidates of every hidden size K, with its first K rows.

Neurons and attention heads leave the activations of the others as they are. The units being in order, those kept come first in a, and one
Gram matrix Σ a aᵀ serves every width. Mamba heads share a norm with their group, so the layer is run anew for each number of them.
Letters: B batch, T tokens of a row, D hidden, I inputs of a writing matrix.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from memory_budget.architecture import Architecture
from minitron.checkpoints.placement import WholeModel, ids_and_mask
from minitron.families.base import MAMBA_HEAD
from minitron.families.table import expected_shape
from minitron.pruning.refit import NormalEquations
from minitron.pruning.rotation import WRITE, real_tokens, stream_role
from minitron.pruning.views import SortedTeacher


@torch.no_grad()
def refit_widths(candidates: SortedTeacher, students: Iterable[Architecture], batches: Sequence[torch.Tensor], ridge: float) -> None:
    """Puts into `candidates.refitted` a writer [D, I] for every layer and width of the students, in the model's dtype; views made later take them.

    `batches` are calibration rows [B, T], padding included. In memory, beside the model and what is made, are its residuals of all tokens, one
    layer's activations of a batch and one Gram matrix with its factor. Raises ValueError naming the layer whose sums are not finite or singular.
    """
    family, teacher, students = candidates.family, candidates.architecture, list(students)
    base, pairs = WholeModel(family, candidates.model, teacher), [ids_and_mask(batch) for batch in batches]
    residuals, everything = base.embed([ids for ids, _ in pairs]), tuple(range(teacher.num_layers))
    fewer_heads = {(student.mamba_num_heads, student.mamba_head_dim) for student in students} - {(teacher.mamba_num_heads, teacher.mamba_head_dim)}
    views = [candidates.view(replace(teacher, mamba_num_heads=heads, mamba_head_dim=channels), everything) for heads, channels in fewer_heads]
    for layer, block in base.visit(everything):
        (row,) = [row for row in family.table if row.kind == teacher.pattern[layer] and stream_role(family, row) == WRITE]
        writer = row.suffix.removesuffix(".weight")
        widths = {expected_shape(family, student, row)[1] for student in students} - {expected_shape(family, teacher, row)[1]}
        together = [block] if widths else []
        runs = [family.parts(view.model).layers[layer] for view in views] if MAMBA_HEAD in row.dimensions[1][0] else together
        fits = [NormalEquations(run.get_submodule(writer).in_features, teacher.hidden, base.device) for run in runs]
        weight_DI = block.get_submodule(writer).weight.float()
        for index, (_, mask) in enumerate(pairs):
            inner_BTI, behind_BTD = _run(block, writer, residuals[index])
            wanted = real_tokens(inner_BTI.float() @ weight_DI.T, mask)
            for run, fit in zip(runs, fits, strict=True):
                given_BTI = inner_BTI if run is block else _run(run, writer, residuals[index])[0]
                fit.add(real_tokens(given_BTI, mask), wanted)
            residuals[index] = behind_BTD
        for run, fit in zip(runs, fits, strict=True):
            start_DI = run.get_submodule(writer).weight
            solved = fit.solve_first(widths if run is block else [start_DI.shape[1]], start_DI, ridge, place=f"layer {layer}")
            candidates.refitted |= {(f"layers.{layer}.{row.suffix}", width): matrix_DI.to(start_DI.dtype) for width, matrix_DI in solved.items()}


def _run(block: nn.Module, writer: str, residual_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer's writer is given, [B, T, I], and the residual behind the layer."""
    inner: list[torch.Tensor] = []
    handle = block.get_submodule(writer).register_forward_pre_hook(lambda _module, args: inner.append(args[0]))
    behind_BTD = block(residual_BTD)
    handle.remove()
    return inner[0], behind_BTD
