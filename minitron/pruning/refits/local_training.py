"""Training of a few matrices on what a layer should give, where a closed form ends: at the first matrix of an expert
or of a feed-forward layer, behind which there is an activation.

Adam, in float32, on the least squares that the closed form solves for the last matrix alone, all matrices of the part together. A step is a share of the root
mean square of the matrix, so that models of any size are trained alike. What was learned is kept where the error of all tokens is less than before, and is
otherwise as if it had not been.

Letters: R rows, T tokens of a row, D hidden of the base, K of the student, O outputs.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy

import torch
from torch import nn

from minitron.checkpoints.stored_linear import StoredLinear
from minitron.machine.device import bf16_pays
from minitron.pruning.plan import JUDGE, TRAINED_TOKENS
from minitron.pruning.rotation import real_tokens
from minitron.pruning.streams import Streams

STEP = 0.02  # of a matrix's root mean square, at the peak
LAST_STEP = 0.05  # of the peak, at the end of the cosine
WARMUP_STEPS = 10
BETAS = (0.9, 0.98)
SHARES = (1.0, 0.5, 0.25)  # of what was learned, of which the best is kept
AT_ONCE = 4096  # tokens whose outputs exist at a time


def trainable(module: nn.Module) -> nn.Module:
    """A copy of a part of a layer, float32 whatever it is stored in."""
    copied = deepcopy(module)
    for part in copied.modules():
        if isinstance(part, StoredLinear):
            part.__class__ = nn.Linear  # whose matrix has a gradient
    return copied.float()


def train_feed_forward(block: nn.Module, streams: Streams, steps: int) -> nn.Module | None:
    """A feed-forward layer's mixer, all of its matrices trained on what is missing in the student's stream behind it, some rows a step; None where that served
    no row held back. The block stays as it is."""
    own = trainable(block)

    def off(numbers: torch.Tensor) -> torch.Tensor:
        base_RTD, student_RTK, mask_RT = streams.rows(numbers)
        with torch.autocast(base_RTD.device.type, enabled=False):  # the stream in bf16 is off by as much as the layer is
            wanted_RTK = streams.basis.project(base_RTD)
        return real_tokens((own(student_RTK) - wanted_RTK) * streams.token_weight(base_RTD), mask_RT)

    at_once = max(1, TRAINED_TOKENS // streams.ids[0].shape[1])
    kept = train_locally(own.mixer.parameters(), off, streams.num_rows, steps=steps, batch=at_once, at_once=at_once, apart=True)
    return own.mixer if kept else None


def train_locally(parameters: Iterable[nn.Parameter], off: Callable[[torch.Tensor], torch.Tensor], items: int, *, steps: int, batch: int,
                  at_once: int = AT_ONCE, apart: bool = False) -> bool:  # fmt: skip
    """Trains parameters so that a part of a layer comes closer to what it should give; `off` says what it is off by, [..., O], at some of the `items`, tokens
    or rows, by their numbers [n].

    Gives whether the error became less; the parameters are what they were where it did not, also where it is not finite. `apart`: every JUDGE-th item is not
    trained on but judges, how much of what was learned is kept too, as far as there are so many. Steps have bf16 products then, where the
    device is quick with them; judging has not.
    """
    parameters, numbers = [parameter.requires_grad_() for parameter in parameters], torch.arange(items)
    judges = numbers[JUDGE - 1 :: JUDGE] if apart and items >= JUDGE else numbers
    trained = numbers[numbers % JUDGE != JUDGE - 1] if len(judges) < items else numbers
    start, device = [parameter.detach().clone() for parameter in parameters], parameters[0].device
    least, shares = _error(off, judges, at_once), SHARES if apart else SHARES[:1]
    groups = [{"params": [parameter], "lr": STEP * float(parameter.detach().square().mean().sqrt())} for parameter in parameters]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, steps))
    for numbers_n in _drawn(len(trained), min(batch, len(trained)), steps):
        optimizer.zero_grad()
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=apart and bf16_pays(device)):
            loss = off(trained[numbers_n]).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    kept, end = 0.0, [parameter.detach().clone() for parameter in parameters]
    for share in shares:
        _set(parameters, start, end, share)
        if (error := _error(off, judges, at_once)) < least:  # no number is below one that is not finite
            kept, least = share, error
    _set(parameters, start, end, kept)
    return kept > 0


@torch.no_grad()
def _set(parameters: Iterable[nn.Parameter], start: Iterable[torch.Tensor], end: Iterable[torch.Tensor], share: float) -> None:
    """So much of the way from start to end."""
    for parameter, was, became in zip(parameters, start, end, strict=True):
        parameter.copy_(became if share == 1 else was if share == 0 else torch.lerp(was, became, share))


def _pace(step: int, steps: int) -> float:
    """A short warm-up and half a cosine."""
    cosine = 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / steps)).item()
    return min(1.0, (step + 1) / WARMUP_STEPS) * (LAST_STEP + (1 - LAST_STEP) * cosine)


def _drawn(items: int, batch: int, steps: int) -> Iterator[torch.Tensor]:
    """Batches of numbers [batch], all of them in one order after another, the same ones every time."""
    generator, left = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(left) < batch:
            left = torch.randperm(items, generator=generator)
        taken, left = left[:batch], left[batch:]
        yield taken


@torch.no_grad()
def _error(off: Callable[[torch.Tensor], torch.Tensor], numbers: torch.Tensor, at_once: int) -> float:
    """The sum of squares."""
    return sum(float(off(numbers_n).square().sum(dtype=torch.float64)) for numbers_n in numbers.split(at_once))
