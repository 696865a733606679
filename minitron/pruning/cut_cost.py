"""What a compensated cut takes: calibration tokens, memory, time; told or refused before anything is loaded."""

import numpy as np
import torch

from distill.batches import count_tokens
from memory_budget.architecture import Architecture
from memory_budget.parameters import count_parameters, layer_parameters
from memory_budget.units import format_gib
from minitron.machine.rate import duration, product_flops_per_second
from minitron.pruning.compensate import Recipe
from minitron.pruning.plan import PruningPlan
from minitron.pruning.refit import ridge_for
from minitron.pruning.stream_moments import num_sites


def few_tokens_note(plan: PruningPlan, recipe: Recipe, rows: np.ndarray) -> str | None:
    """What to say where the calibration tokens are fewer than the inputs of a matrix that is solved for; None where they are not."""
    tokens, widest = count_tokens(rows), max((inputs for inputs, _ in _solved_for(plan, recipe)), default=0)
    if tokens >= widest:
        return None
    ridge, needed = ridge_for(recipe.ridge, widest, tokens), -(-widest * len(rows) // tokens)
    return (f"{tokens:,} calibration tokens are fewer than the {widest:,} inputs solved for: prune.ridge goes from {recipe.ridge:g} up to {ridge:.2g}; "
            f"prune.samples={needed} would do")  # fmt: skip


def _solved_for(plan: PruningPlan, recipe: Recipe) -> list[tuple[int, int]]:
    """Inputs and outputs of every matrix that is."""
    student = plan.student
    inner = {"M": student.mamba_inner, "-": student.ffn, "*": student.num_attention_heads * student.attention_head_dim}
    reading = [(student.hidden, plan.teacher.hidden)] * recipe.refit_reading
    return reading + [(inner[kind], student.hidden) for kind in student.pattern] * recipe.refit_writing


def _sums_for_directions(plan: PruningPlan, recipe: Recipe) -> int:
    """Bytes of the moments of every norm and as much again for half of them (directions.py)."""
    turns = recipe.directions == "loss" and plan.student.hidden < plan.teacher.hidden
    return 3 * 8 * num_sites(plan.teacher.hidden, plan.teacher.num_sublayers) * plan.teacher.hidden**2 * turns


def check_memory(plan: PruningPlan, recipe: Recipe, rows: np.ndarray, available: int, where: str, *, number_bytes: int) -> None:
    """Refuse to begin what `available` bytes cannot hold. Raises ValueError.

    At least: both models' residuals of all tokens in float32, and beside them two layers of the base and one of the student as stored, `number_bytes` a
    number, and in float64 either the Gram matrix of a fit, its factor and two matrices of its shape, or what directions are chosen by.
    """
    residuals, needed = _residual_bytes(plan, rows), _needed_bytes(plan, recipe, rows, number_bytes=number_bytes)
    if needed <= available:
        return
    beside = needed - residuals
    fitting = len(rows) * (available - beside) // residuals
    advice = f"prune.samples={fitting} would fit" if fitting > 0 else f"{format_gib(beside)} are for the matrices alone, so prune.method must be slice"
    said = f"the compensated cut needs at least {format_gib(needed)}, and {where} has {format_gib(available)}"
    raise ValueError(f"prune.samples is {len(rows)}, {count_tokens(rows):,} tokens: {said}; {advice}")


def _residual_bytes(plan: PruningPlan, rows: np.ndarray) -> int:
    return 4 * count_tokens(rows) * (plan.teacher.hidden + plan.student.hidden)


def _needed_bytes(plan: PruningPlan, recipe: Recipe, rows: np.ndarray, *, number_bytes: int) -> int:
    teacher, student = plan.teacher, plan.student
    of_teacher, of_student = (max(layer_parameters(one, kind).total for kind in set(one.pattern)) for one in (teacher, student))
    fit = max((8 * (2 * inputs * inputs + 2 * inputs * outputs) for inputs, outputs in _solved_for(plan, recipe)), default=0)
    beside = number_bytes * (2 * of_teacher + of_student) + max(fit, _sums_for_directions(plan, recipe))
    return _residual_bytes(plan, rows) + beside


def cut_line(plan: PruningPlan, recipe: Recipe, rows: np.ndarray, device: torch.device, *, number_bytes: int) -> str:
    """What a cut will hold and how long it will take at least, for the terminal."""
    tokens, widest = count_tokens(rows), max((inputs for inputs, _ in _solved_for(plan, recipe)), default=0)
    held = format_gib(_needed_bytes(plan, recipe, rows, number_bytes=number_bytes))
    products, sums = _products(plan, recipe, tokens)
    seconds = products / product_flops_per_second(device, torch.float32) + sums / product_flops_per_second(device, torch.float64)
    of_widest = f", {tokens / widest:,.0f} for each input of the widest matrix refitted" if widest else ""
    return f"{tokens:,} calibration tokens ({len(rows)} rows{of_widest}); holds about {held}, takes at least {duration(seconds / 3600)}"


def _products(plan: PruningPlan, recipe: Recipe, tokens: int) -> tuple[int, int]:
    """FLOP in float32 of both models' walks, the student's twice where writers are refitted, and in float64 of the fits' Gram and cross matrices."""

    def of_layers(model: Architecture) -> int:
        counts = count_parameters(model)
        return 2 * tokens * (sum(counts.values()) - counts["embedding"] - counts["head"])

    walks = of_layers(plan.teacher) + (1 + recipe.refit_writing) * of_layers(plan.student)
    per_layer = [2 * tokens * inputs * (inputs + outputs) for inputs, outputs in _solved_for(plan, recipe)]
    again = (plan.student.num_sublayers - 1) * per_layer[0] if recipe.refit_reading and per_layer else 0  # at every norm
    return walks, sum(per_layer) + again
