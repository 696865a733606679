"""How long distillation must take at least where Mamba-2's fused kernels are missing, told before anything is loaded.

A lower bound: the matrix products of student and teacher at the rate that the device reaches here. Scan, norms and waiting come on top.
"""

from collections.abc import Sequence

import torch

from memory_budget.architecture import Architecture
from memory_budget.parameters import count_parameters, count_total_parameters
from minitron.machine.rate import duration, product_flops_per_second
from minitron.mamba.kernels import check_kernels
from minitron.settings.training import Precision, TrainSettings


def without_kernels(device: torch.device) -> str | None:
    """Why a model's Mamba layers run in plain torch on this device; None where the fused kernels are there and give the right numbers."""
    if device.type != "cuda":
        return f"there are none for {device.type}"
    try:
        check_kernels(device)
    except ValueError as error:
        return str(error)
    return None


def training_flops(student: Architecture, teacher: Architecture | None, phases: Sequence[tuple[TrainSettings, int]]) -> int:
    """Of all phases, (settings, sequence length) each: 2 a parameter forward and 4 backward for every token (arXiv 2001.08361, §2.1), the
    teacher's forward pass (none: it is absent), and the causal attention's two products over half the sequence."""

    def forward(model: Architecture | None, length: int) -> int:
        if model is None:
            return 0
        attention = model.pattern.count("*") * 2 * length * model.num_attention_heads * model.attention_head_dim
        looked_up = count_parameters(model)["embedding"] if model.has_own_head else 0  # a tied table is the head's matrix too
        return 2 * (count_total_parameters(model) - looked_up) + attention

    return sum(train.tokens * (3 * forward(student, length) + forward(teacher, length)) for train, length in phases)


def check_time(flops: int, device: torch.device, precision: Precision, *, processes: int, max_hours: float | None, has_mamba: bool = True) -> str | None:
    """What to say of a run's least duration where it is above a minute: on a CPU, and for models with Mamba-2 layers wherever kernels for them are missing.

    Raises ValueError where that is more than `max_hours` (None: no limit).
    """
    if has_mamba and (reason := without_kernels(device)) is not None:
        why = f"without fused Mamba-2 kernels ({reason})"
    elif device.type == "cpu":
        why = "on a CPU"
    else:
        return None
    rate = product_flops_per_second(device, torch.bfloat16 if precision is Precision.bf16 else torch.float32)
    hours = flops / rate / processes / 3600
    told = f"{why} this run takes at least {duration(hours)} "
    told += f"({flops:.1e} FLOP of matrix products at {rate / 1e12:.2f} TFLOP/s in each of {processes} processes)"
    if max_hours is not None and hours > max_hours:
        raise ValueError(f"distill.max_hours is {max_hours:g}; {told}; raise it (null: no limit), train on fewer tokens, or where the kernels are")
    return told if hours > 1 / 60 else None
