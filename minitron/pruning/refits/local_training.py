"""Training of a few matrices on what a layer should give, where a closed form ends: at the first matrix of an expert
or of a feed-forward layer, behind which there is an activation.

Adam, in float32, on the least squares that the closed form solves for the last matrix alone, all matrices of the part together. A step is a share of the root
mean square of the matrix, so that models of any size are trained alike. What was learned is kept where the error of all tokens is less than before, and is
otherwise as if it had not been.

Letters: O outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy

import torch
from torch import nn

from minitron.checkpoints.stored_linear import StoredLinear
from minitron.machine.device import bf16_pays
from minitron.pruning.plan import JUDGE

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


class Rows:
    """Rows of both models' streams, [B, T, D] and [B, T, K] of every batch, and of what is no padding (None where all is), counted through all batches."""

    def __init__(self, base: Sequence[torch.Tensor], student: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]):
        whole = (torch.ones_like(batch[..., 0], dtype=torch.bool) if mask is None else mask for batch, mask in zip(student, masks, strict=True))
        self._parts = base, student, list(whole)
        self._places = [(batch, row) for batch, rows in enumerate(student) for row in range(len(rows))]

    def __len__(self) -> int:
        return len(self._places)

    def some(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """Of these rows, [R, T, D], [R, T, K] and [R, T]."""
        places = [self._places[number] for number in numbers.tolist()]
        return [torch.stack([batches[batch][row] for batch, row in places]) for batches in self._parts]


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
