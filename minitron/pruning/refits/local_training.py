"""Training of a few matrices on what a layer should give, where a closed form ends: at the first matrix of an expert, behind which there is an activation.

Adam, in float32, on the least squares that the closed form solves for the last matrix alone, all matrices of the part together. A step is a share of the root
mean square of the matrix, so that models of any size are trained alike. What was learned is kept where the error of all tokens is less than before, and is
otherwise as if it had not been.

Letters: N tokens, O outputs.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from minitron.checkpoints.stored_linear import StoredLinear

STEP = 0.02  # of a matrix's root mean square, at the peak
LAST_STEP = 0.05  # of the peak, at the end of the cosine
WARMUP_STEPS = 10
BETAS = (0.9, 0.98)
AT_ONCE = 4096  # tokens whose outputs exist at a time


def trainable(module: nn.Module) -> nn.Module:
    """A copy of a part of a layer, float32 whatever it is stored in."""
    copied = deepcopy(module)
    for part in copied.modules():
        if isinstance(part, StoredLinear):
            part.__class__ = nn.Linear  # whose matrix has a gradient
    return copied.float()


def train_locally(module: nn.Module, output: Callable[[torch.Tensor], torch.Tensor], targets_NO: torch.Tensor, *, steps: int, batch: int) -> bool:
    """Trains a module towards targets [N, O]; `output` gives what it makes of some tokens, [n, O], by their numbers [n].

    Gives whether the error became less; the module is what it was where it did not, also where that is not finite, and where tokens are fewer than outputs.
    """
    if len(targets_NO) < targets_NO.shape[1]:
        return False
    parameters = [parameter.requires_grad_() for parameter in module.parameters()]
    start = [parameter.detach().clone() for parameter in parameters]
    before = _error(output, targets_NO)
    groups = [{"params": [parameter], "lr": STEP * float(parameter.detach().square().mean().sqrt())} for parameter in parameters]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, steps))
    with torch.enable_grad():
        for tokens_n in _drawn(len(targets_NO), min(batch, len(targets_NO)), steps, targets_NO.device):
            optimizer.zero_grad()
            (output(tokens_n) - targets_NO[tokens_n]).square().mean().backward()
            optimizer.step()
            schedule.step()
    module.requires_grad_(False)
    if _error(output, targets_NO) < before:  # no number is below one that is not finite
        return True
    for parameter, was in zip(parameters, start, strict=True):
        parameter.copy_(was)
    return False


def _pace(step: int, steps: int) -> float:
    """A short warm-up and half a cosine."""
    cosine = 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / steps)).item()
    return min(1.0, (step + 1) / WARMUP_STEPS) * (LAST_STEP + (1 - LAST_STEP) * cosine)


def _drawn(tokens: int, batch: int, steps: int, device: torch.device):
    """Batches of tokens [batch], all of them in one order after another, the same ones every time."""
    generator, left = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(left) < batch:
            left = torch.randperm(tokens, generator=generator)
        taken, left = left[:batch], left[batch:]
        yield taken.to(device)


@torch.no_grad()
def _error(output: Callable[[torch.Tensor], torch.Tensor], targets_NO: torch.Tensor) -> float:
    """The sum of squares that outputs are off by."""
    numbers = torch.arange(len(targets_NO), device=targets_NO.device)
    return sum(float((output(some) - targets_NO[some]).square().sum(dtype=torch.float64)) for some in numbers.split(AT_ONCE))
