"""How long training takes: its products of matrices, what lies between them, and the optimiser. Loads no torch until it is asked about a device.

Where Mamba-2's fused kernels are missing, a run that would take longer than distill.max_hours is refused.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memory_budget.architecture import Architecture
from memory_budget.parameters import count_active_parameters, count_parameters, count_total_parameters, layer_parameters
from minitron.checkpoints.forward_work import forward_work, head_work, seen_numbers
from minitron.machine.pace import Work
from minitron.machine.rate import duration, gpu_product_rate, product_rate
from minitron.settings.training import Optimizer, Precision, TrainSettings
from nas.throughput import attention_flops

if TYPE_CHECKING:
    import torch

BACKWARD = 2  # times a forward pass
OPTIMIZER_NUMBERS = 2.0  # a parameter and step: the gradient's norm, both moments and the parameter pass by
LOSS_PASSES = 6.0  # over the logits of one model in a chunk, forward and backward
MUON_ITERATIONS = 5
EXPERT_TENSOR_CALLS = 0.25  # of a sublayer, for an optimiser's step on a tensor of an expert: 60 µs
FASTER_BF16 = 16.0  # the most that a processor multiplies faster in bf16 than in float32


def training_work(student: Architecture, teacher: Architecture | None, train: TrainSettings, length: int) -> Work:
    """Of one phase on rows of `length`; `teacher` None: its outputs are cached, or there is none."""
    steps = max(1.0, train.tokens / (train.batch * length))
    micro_steps = steps * -(-train.batch // (train.micro_batch or train.batch))
    forward = forward_work(student, train.tokens, length, batches=micro_steps)
    again = bool(train.gradient_checkpointing) / train.checkpoint_every
    work = forward * (1 + BACKWARD + again) + head_work(student, train.tokens, LOSS_PASSES)
    if teacher is not None:
        work += forward_work(teacher, train.tokens, length, batches=micro_steps) + head_work(teacher, train.tokens, LOSS_PASSES / 2)
    products = training_flops(student, teacher, [(train, length)])
    tensors = (3 if student.ffn_gated else 2) * student.moe_num_experts * student.num_layers_of("E")
    optimizer = Work(numbers=OPTIMIZER_NUMBERS * count_total_parameters(student), calls=2 * student.num_sublayers + EXPERT_TENSOR_CALLS * tensors)
    if train.optimizer is Optimizer.muon:
        optimizer += Work(products=sum(map(_orthogonalised, student.pattern, [student] * len(student.pattern))), calls=4 * student.num_sublayers)
    return Work(products=products, again=forward.products * again, numbers=work.numbers, calls=work.calls) + optimizer * steps


def _orthogonalised(letter: str, model: Architecture) -> int:
    """FLOP of Muon's iterations over a layer's matrices (Newton-Schulz: X Xᵀ, its square, and both times X)."""
    return MUON_ITERATIONS * sum(
        copies * (4 * min(out, into) ** 2 * max(out, into) + 2 * min(out, into) ** 3) for copies, out, into in layer_parameters(model, letter).matrices
    )


def training_flops(student: Architecture, teacher: Architecture | None, phases: Sequence[tuple[TrainSettings, int]]) -> int:
    """Of all phases, (settings, sequence length) each: 2 an active parameter forward and 4 backward for every token (arXiv 2001.08361, §2.1), the
    teacher's forward pass (none: it is absent), and attention's two products over half the sequence, or as much as it computes of it."""

    def forward(model: Architecture | None, length: int) -> int:
        if model is None:
            return 0
        attention = int(attention_flops(model, seen_numbers(model, length)))
        looked_up = count_parameters(model)["embedding"] if model.has_own_head else 0  # a tied table is the head's matrix too
        return 2 * (count_active_parameters(model) - looked_up) + attention

    return sum(train.tokens * (3 * forward(student, length) + forward(teacher, length)) for train, length in phases)


def without_kernels(device: "torch.device") -> str | None:
    """Why a model's Mamba layers run in plain torch on this device; None where the fused kernels are there and give the right numbers."""
    if device.type != "cuda":
        return f"there are none for {device.type}"
    from minitron.mamba.kernels import check_kernels

    try:
        check_kernels(device)
    except ValueError as error:
        return str(error)
    return None


def check_time(flops: int, device: "torch.device", precision: Precision, *, processes: int, max_hours: float | None, has_mamba: bool = True) -> None:
    """Raises ValueError where matrix products alone take more than `max_hours` (None: no limit): on a CPU, and for models with Mamba-2 layers wherever
    kernels for them are missing."""
    if max_hours is None:
        return
    if device.type == "cpu":
        check_hours(flops, precision, processes=processes, max_hours=max_hours, has_mamba=has_mamba)
    elif has_mamba and (reason := without_kernels(device)) is not None:
        import torch

        rate = gpu_product_rate(device, torch.bfloat16 if precision is Precision.bf16 else torch.float32)
        _check(flops, rate, f"without fused Mamba-2 kernels ({reason})", processes=processes, max_hours=max_hours)


def check_hours(flops: int, precision: Precision, *, processes: int, max_hours: float | None, has_mamba: bool) -> None:
    """The same for a CPU, from nothing but its rate of products: before any work. Raises ValueError."""
    if max_hours is None:
        return
    why = "without fused Mamba-2 kernels (there are none for cpu)" if has_mamba else "on a CPU"
    _check(flops, product_rate() * (FASTER_BF16 if precision is Precision.bf16 else 1.0), why, processes=processes, max_hours=max_hours)


def _check(flops: int, rate: float, why: str, *, processes: int, max_hours: float) -> None:
    hours = flops / rate / processes / 3600
    if hours > max_hours:
        raise ValueError(f"distill.max_hours is {max_hours:g}; {why} this run takes at least {duration(hours)} ({flops:.1e} FLOP of matrix products at "
                         f"{rate / 1e12:.2f} TFLOP/s in each of {processes} processes); raise it (null: no limit), train on fewer tokens, or where the "
                         "kernels are")  # fmt: skip
