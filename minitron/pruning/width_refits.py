"""What writes to the residual stream refitted for fewer neurons or heads: for every width that candidates have, in one walk over the model.

The compensated cut (compensate.py) refits a candidate's writing matrices in lock-step with its base, a walk for each candidate. Here
every layer is looked at alone: its writer W [D, I] is given activations a and makes W·a; cut along the layer's own axis it is given
fewer, and is solved anew to make the same W·a of them. That serves candidates of every hidden size K, with its first K rows.

Neurons and attention heads leave the activations of the others as they are. The units being in order, those kept come first in a, and one
Gram matrix Σ a aᵀ serves every width; of fewer KV heads those kept are not the first, and have its rows and columns to themselves. Mamba heads
share a norm with their group, so the layer is run anew for each number of them. Of a layer with experts every routed one is fitted to its own tokens, each
counted by what the router multiplies the output with, and so is the shared expert, to all. For fewer experts nothing is fitted: what is ranked is the drop,
whose refit (compensate.py) depends on which others stay.
Letters: B batch, T tokens of a row, n tokens of an expert, D hidden, I inputs of a writing matrix.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from memory_budget.architecture import Architecture
from minitron.checkpoints.placement import WholeModel, ids_and_mask, run_layer
from minitron.families.base import EXPERT_FFN, MAMBA_HEAD, SHARED_FFN
from minitron.families.experts import Routed, experts_of
from minitron.pruning.plan import ENOUGH_FOR_EXPERT
from minitron.pruning.refits.least_squares import NormalEquations
from minitron.pruning.rotation import WRITE, real_tokens, stream_role
from minitron.pruning.views import ColumnsKey, SortedTeacher

AT_ONCE = 4096  # tokens of an expert whose neurons are widened to be summed up


@torch.no_grad()
def refit_widths(candidates: SortedTeacher, students: Iterable[Architecture], batches: Sequence[torch.Tensor], ridge: float) -> None:
    """Puts into `candidates.refitted` a writer [D, I] for every layer and width of the students, in the model's dtype; views made later take them.

    `batches` are calibration rows [B, T], padding included. In memory, beside the model and what is made, are its residuals of all tokens, one
    layer's activations of a batch and one Gram matrix with its factor. Raises ValueError naming the layer whose sums are not finite or singular.
    """
    family, teacher, students = candidates.family, candidates.architecture, list(students)
    base, pairs = WholeModel(family, candidates.model, teacher), [ids_and_mask(batch) for batch in batches]
    residuals, everything = base.embed([ids for ids, _ in pairs]), tuple(range(teacher.num_sublayers))
    by_heads = {(student.mamba_num_heads, student.mamba_head_dim): student for student in students}
    by_heads.pop((teacher.mamba_num_heads, teacher.mamba_head_dim), None)
    narrower, layers_of = list(by_heads.values()), [candidates.mamba_layers(student) for student in by_heads.values()]
    for layer, block in base.visit(everything):
        if experts_of(block) is not None:
            residuals = _refit_experts(candidates, layer, block, residuals, [mask for _, mask in pairs], students, ridge)
            continue
        (row,) = [row for row in family.table if row.kind == teacher.mixers[layer] and stream_role(family, row) == WRITE]
        writer, name = row.suffix.removesuffix(".weight"), f"layers.{layer}.{row.suffix}"
        widths, others = _kept_columns(candidates, name, students)
        together = [block] if widths or others else []
        runs = [layers[layer] for layers in layers_of] if MAMBA_HEAD in row.dimensions[1][0] else together
        fits = [NormalEquations(run.get_submodule(writer).in_features, teacher.hidden, base.device) for run in runs]
        weight_DI = block.get_submodule(writer).weight.float()
        for index, (_, mask) in enumerate(pairs):
            inner_BTI, behind_BTD = _run(block, writer, residuals[index])
            wanted = real_tokens(inner_BTI.float() @ weight_DI.T, mask)
            for run, fit in zip(runs, fits, strict=True):
                given_BTI = inner_BTI if run is block else _run(run, writer, residuals[index])[0]
                fit.add(real_tokens(given_BTI, mask), wanted)
            residuals[index] = behind_BTD
        for number, (run, fit) in enumerate(zip(runs, fits, strict=True)):
            start_DI = run.get_submodule(writer).weight
            if run is block:
                solved = {key: fit.of_inputs(columns).solve(start_DI[:, columns], ridge, place=f"layer {layer}") for key, columns in others.items()}
                first = fit.solve_first(widths, start_DI, ridge, place=f"layer {layer}")
                solved |= {(name, width, b""): matrix_DI for width, matrix_DI in first.items()}
            else:
                solved = {candidates.kept_columns(name, narrower[number])[0]: fit.solve(start_DI, ridge, place=f"layer {layer}")}
            candidates.refitted |= {key: matrix_DI.to(start_DI.dtype) for key, matrix_DI in solved.items()}


def _refit_experts(candidates: SortedTeacher, layer: int, block: nn.Module, residuals: list[torch.Tensor], masks: Sequence[torch.Tensor | None],
                   students: Iterable[Architecture], ridge: float) -> list[torch.Tensor]:  # fmt: skip
    """The last matrices of a layer's experts, for every number of neurons; gives the residuals behind the layer. In memory is one expert's Gram matrix, since
    each is asked once, and the shared one's. An expert that no token reaches stays as it is."""
    teacher, table = candidates.architecture, candidates.family.table
    suffixes = {row.dimensions[1]: row.suffix for row in table if row.kind == "E" and len(row.dimensions) == 2}  # by what is read
    mask_N = torch.cat([residual_BTD.new_ones(residual_BTD.shape[:2], dtype=torch.bool) if mask is None else mask
                        for residual_BTD, mask in zip(residuals, masks, strict=True)]).flatten()  # fmt: skip

    def fit(suffix: str, widths: set[int], inner_nI: torch.Tensor, enough: float = 1.0) -> None:
        weight_DI = block.get_parameter(suffix)
        if inner_nI.any():
            sums = NormalEquations(weight_DI.shape[1], weight_DI.shape[0], weight_DI.device, enough=enough)
            for some_nI in inner_nI.split(AT_ONCE):
                sums.add(some_nI, some_nI.float() @ weight_DI.float().T)
            found = sums.solve_first(widths, weight_DI, ridge, place=f"layer {layer}, {suffix.removesuffix('.weight')}")
            candidates.refitted |= {(f"layers.{layer}.{suffix}", width, b""): matrix_DI.to(weight_DI.dtype) for width, matrix_DI in found.items()}

    def routed(one: Routed) -> None:
        real_n = mask_N[one.tokens_n]
        inner_nF = one.inner_nF[real_n].float() * one.weights_n[real_n, None]
        fit(suffixes[(EXPERT_FFN,),].replace("*", str(one.expert)), neurons, inner_nF, ENOUGH_FOR_EXPERT)

    neurons, of_shared = ({getattr(student, field) for student in students} - {getattr(teacher, field)} for field in ("moe_ffn", "moe_shared_ffn"))
    hooks = []
    if of_shared:
        suffix = suffixes[(SHARED_FFN,),]
        writer = block.get_submodule(suffix.removesuffix(".weight"))
        hooks.append(writer.register_forward_pre_hook(lambda _module, args: fit(suffix, of_shared, args[0].flatten(0, -2)[mask_N])))
    experts_of(block).watch = routed if neurons else None
    behind = run_layer(block, residuals)
    experts_of(block).watch = None
    for hook in hooks:
        hook.remove()
    return behind


def _kept_columns(candidates: SortedTeacher, name: str, students: Iterable[Architecture]) -> tuple[set[int], dict[ColumnsKey, torch.Tensor]]:
    """Of the columns of a writer that students keep: how many where they are the first ones, and which where they are not."""
    widths, others = set(), {}
    for student in students:
        key, columns = candidates.kept_columns(name, student)
        if columns is not None and key[2]:
            others[key] = columns
        elif columns is not None:
            widths.add(key[1])
    return widths, others


def _run(block: nn.Module, writer: str, residual_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer's writer is given, [B, T, I], and the residual behind the layer."""
    inner: list[torch.Tensor] = []
    handle = block.get_submodule(writer).register_forward_pre_hook(lambda _module, args: inner.append(args[0]))
    behind_BTD = block(residual_BTD)
    handle.remove()
    return inner[0], behind_BTD
