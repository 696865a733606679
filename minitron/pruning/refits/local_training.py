"""Training of a few matrices on what a layer should give, where a closed form ends: at the first matrix of an expert, behind which there is an activation.

Adam, in float32, on the least squares that the closed form solves for the last matrix alone, all matrices of the part together. A step is a share of the root
mean square of the matrix, so that models of any size are trained alike. The last eighth of the tokens is not trained on: what was learned is
kept where it lowers the error of those, and is otherwise as if it had not been.

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
HELD_BACK = 8  # one token of so many
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

    Gives whether the error of the tokens held back became less; the module is what it was where it did not, also where it is not finite, and where tokens are
    too few to try.
    """
    trained = len(targets_NO) * (HELD_BACK - 1) // HELD_BACK
    if trained < HELD_BACK:
        return False
    parameters = [parameter.requires_grad_() for parameter in module.parameters()]
    start = [parameter.detach().clone() for parameter in parameters]
    before = _error(output, targets_NO, trained)
    groups = [{"params": [parameter], "lr": STEP * float(parameter.detach().square().mean().sqrt())} for parameter in parameters]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, steps))
    with torch.enable_grad():
        for tokens_n in _drawn(trained, min(batch, trained), steps, targets_NO.device):
            optimizer.zero_grad()
            (output(tokens_n) - targets_NO[tokens_n]).square().mean().backward()
            optimizer.step()
            schedule.step()
    module.requires_grad_(False)
    if _error(output, targets_NO, trained) < before:  # no number is below one that is not finite
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
def _error(output: Callable[[torch.Tensor], torch.Tensor], targets_NO: torch.Tensor, first: int) -> float:
    """The sum of squares that outputs are off by, from a token on."""
    numbers = torch.arange(first, len(targets_NO), device=targets_NO.device)
    return sum(float((output(some) - targets_NO[some]).square().sum(dtype=torch.float64)) for some in numbers.split(AT_ONCE))
