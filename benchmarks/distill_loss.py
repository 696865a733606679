"""The chunked distillation loss against whole logits and against liger-kernel's chunked loss: time, and peak memory.

Forward and backward pass of forward KL from hidden states and output matrices, float32, gradients for the student's both. Peak
memory is a child process's largest resident set above what it held with its inputs built, so no side sees another's.
Needs liger-kernel, whose metadata asks for triton; its chunked losses do without: pip install --no-deps liger-kernel.
Run: .venv/bin/python benchmarks/distill_loss.py [--repeats N]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.chunked_loss import Head, chunked_loss  # noqa: E402

TOKENS, VOCABULARY, HIDDEN = 4096, 131072, 512
SIDES = ("whole logits", "liger", "ours")
GIB = 2**30


def build_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student's hidden states [N, D] and matrix [V, D], then the teacher's; logits of size 3, near each other as after some training."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN, generator=random), torch.randn(VOCABULARY, HIDDEN, generator=random).mul_(3 / HIDDEN**0.5)
    teacher = hidden + 0.3 * torch.randn(TOKENS, HIDDEN, generator=random), weight.clone()
    return hidden.requires_grad_(), weight.requires_grad_(), *teacher


def whole_logits(hidden: torch.Tensor, weight: torch.Tensor, teacher_hidden: torch.Tensor, teacher_weight: torch.Tensor) -> torch.Tensor:
    """The leanest way to write it: no copy of the logits but their log-softmax."""
    student, teacher = F.log_softmax(hidden @ weight.T, dim=-1), F.log_softmax(teacher_hidden @ teacher_weight.T, dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="sum") / TOKENS


def build_side(name: str) -> Callable[..., torch.Tensor]:
    """A function of the four inputs that gives the loss, nats per token."""
    if name == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        # Its beta = 0 is KL(teacher ‖ student), see LigerFusedLinearJSDFunction.distillation_loss_fn.
        loss, labels = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0), torch.zeros(TOKENS, dtype=torch.long)
        return lambda *inputs: loss(*inputs, labels)
    if name == "whole logits":
        return whole_logits
    return lambda *inputs: chunked_loss(Head(*inputs[:2]), Head(*inputs[2:])).loss


def run_side(side: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> tuple[float, float, float, float]:
    """(seconds, loss, norms of the two gradients) of one forward and backward pass."""
    for value in inputs[:2]:
        value.grad = None
    started = time.perf_counter()
    loss = side(*inputs)
    loss.backward()
    return time.perf_counter() - started, loss.item(), *(value.grad.norm().item() for value in inputs[:2])


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_memory(name: str) -> None:
    """What a child process does: prints the bytes its side took above its inputs."""
    side, inputs = build_side(name), build_inputs()
    before = peak_bytes()
    run_side(side, inputs)
    print(peak_bytes() - before)


def measured_memory(name: str) -> int:
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def check_agreement(results: dict[str, tuple[float, ...]]) -> None:
    """Every side must have computed the same loss and gradients; torch's log-softmax of so many logits is good to 1e-5."""
    for name, values in results.items():
        for value, expected in zip(values[1:], results["ours"][1:], strict=True):
            assert abs(value - expected) < 1e-4 * abs(expected), f"{name} gives {values[1:]}, ours {results['ours'][1:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats of every side; medians are reported")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        return print_memory(arguments.memory_of)
    try:
        sides = {name: build_side(name) for name in SIDES}
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; this benchmark compares with liger-kernel: pip install --no-deps liger-kernel")
    memory = {name: measured_memory(name) for name in SIDES}
    inputs, times = build_inputs(), {name: [] for name in SIDES}
    run_side(sides["liger"], inputs)  # torch.compile's time is not counted
    for _ in range(arguments.repeats):
        results = {name: run_side(side, inputs) for name, side in sides.items()}
        check_agreement(results)
        for name, (seconds, *_) in results.items():
            times[name].append(seconds)
    return report(times, memory, arguments.repeats)


def report(times: dict[str, list[float]], memory: dict[str, int], repeats: int) -> None:
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{TOKENS:,} tokens, vocabulary {VOCABULARY:,}, hidden {HIDDEN}, float32, {torch.get_num_threads()} threads, {repeats} repeats")
    print(f"{'':14}{'seconds':>9}{'(each)':>24}{'peak GiB':>10}")
    for name in SIDES:
        print(f"{name:14}{median[name]:9.2f}{' '.join(f'{value:.2f}' for value in times[name]):>24}{memory[name] / GIB:10.2f}")
    ratios = {
        "peak_memory_ratio": memory["ours"] / memory["whole logits"],
        "time_ratio_whole_logits": median["ours"] / median["whole logits"],
        "time_ratio_liger": median["ours"] / median["liger"],
    }
    print(json.dumps({"benchmark": "distill_loss", "ratios": ratios, "seconds": median, "peak_bytes": memory, "repeats": repeats}))


if __name__ == "__main__":
    main()
