"""A run of blocks replaced by one linear map: ReplaceMe (Shopkhoev et al., arXiv 2505.02819) and Ghosted Layers (Yun et al., arXiv 2605.15491).

Which run: the one whose two ends are most alike, by the mean cosine distance of the stream before and behind it (both papers; LLM-Streamline's choice in
the second one). Here a run never begins with the first block: before it there is no FFN to merge a map into.

ReplaceMe. Let m be the FFN's output of the block before the run, y the stream that it is added to, and z the stream behind the run. T makes m·T + y as near to
z as least squares can, and is multiplied into the FFN's last matrix: the student is an ordinary Llama. The paper's other form, T by gradient descent on the
cosine distance, and maps for several runs are not done here.

Ghosted Layers. With x = m + y, M solves (XᵀX + εI)·M = Xᵀ(Z − X), ε = 1e-6 (§ on the closed form, as the authors' page restates it), and I + M is applied to
the stream between the blocks. Nothing in a Llama acts on the whole stream, so it is an extra matrix [D, D], counted. For blocks that are no run
the page has an operator for every removed block; one for every run of them, fitted on the base's stream, is surmised to be as good and is what is done here.

B batch, T tokens, N tokens of all rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.rivals.walks import check_calibration, check_llama, residuals, shallower, stored_parameters

if TYPE_CHECKING:
    from benchmarks.real_sides import Base

EPSILON, METHODS = 1e-6, "a linear map in place of blocks"


class MappedBlock(nn.Module):
    """A Llama's block, and behind it a linear map of the whole stream."""

    def __init__(self, block: nn.Module, operator_DD: torch.Tensor):
        super().__init__()
        self.block, self.operator = block, nn.Parameter(operator_DD)

    def forward(self, stream_BTD: torch.Tensor, **how) -> torch.Tensor:
        return self.block(stream_BTD, **how) @ self.operator


@torch.no_grad()
def chosen_run(base: Base, num_removed: int, calibration: Sequence[torch.Tensor]) -> range:
    """The run of so many blocks, not with the first, that turns the stream least. Raises ValueError where there are not so many."""
    num_blocks = base.architecture.num_layers
    if not 0 < num_removed < num_blocks:
        raise ValueError(f"blocks to remove are {num_removed}; they must be from 1 to {num_blocks - 1}, one less than the base has")
    alike = torch.zeros(num_blocks - num_removed, dtype=torch.float64)
    for ids_BT in calibration:
        ends = list(residuals(base, ids_BT))[::2]  # before every block, and behind the last
        for start in range(1, len(alike) + 1):
            alike[start - 1] += F.cosine_similarity(ends[start], ends[start + num_removed], dim=-1).sum(dtype=torch.float64)
    start = 1 + int(alike.argmax())
    return range(start, start + num_removed)


@torch.no_grad()
def replaceme(base: Base, removed: int | range, calibration: Sequence[torch.Tensor]) -> tuple[nn.Module, int]:
    """An ordinary Llama without a run of blocks, tied where the base is, and how many parameters it stores. `removed` is a run, or how many (chosen_run).

    Raises ValueError as chosen_run does, and for a run that the base has not, or that begins with its first block.
    """
    (run,) = _checked(base, removed, calibration)
    sums = [0.0, 0.0]
    for added_ND, middle_ND, behind_ND in _around(base, run, calibration):
        sums[0] += added_ND.t() @ added_ND
        sums[1] += added_ND.t() @ (behind_ND - middle_ND)
    map_DD = _solved(*sums, ridge=0.0)
    student = shallower(base, run)
    writer = student.model.layers[run.start - 1].mlp.down_proj.weight
    writer.copy_(map_DD.t() @ writer.double())
    return student, stored_parameters(student)


@torch.no_grad()
def ghosted(base: Base, removed: int | Collection[int], calibration: Sequence[torch.Tensor]) -> tuple[nn.Module, int]:
    """A Llama without some blocks, with an operator [D, D] where each run of them was, and how many parameters it stores. `removed` are blocks, or how
    many in a run (chosen_run).

    Raises ValueError as replaceme does.
    """
    runs = _checked(base, removed, calibration)
    student = shallower(base, {block for run in runs for block in run})
    for number, run in enumerate(runs):
        sums = [0.0, 0.0]
        for added_ND, middle_ND, behind_ND in _around(base, run, calibration):
            before_ND = added_ND + middle_ND
            sums[0] += before_ND.t() @ before_ND
            sums[1] += before_ND.t() @ (behind_ND - before_ND)
        map_DD = _solved(*sums, ridge=EPSILON)
        place = run.start - 1 - sum(len(earlier) for earlier in runs[:number])
        student.model.layers[place] = MappedBlock(student.model.layers[place], torch.eye(len(map_DD)) + map_DD.float())
    return student, stored_parameters(student)


def _checked(base: Base, removed: int | Collection[int], calibration: Sequence[torch.Tensor]) -> list[range]:
    """The runs to remove, in order."""
    check_llama(base, METHODS)
    check_calibration(calibration, base.architecture.hidden, "a linear map of every channel")
    runs = [chosen_run(base, removed, calibration)] if isinstance(removed, int) else list(_runs(removed))
    for run in runs:
        if not (0 < run.start < run.stop <= base.architecture.num_layers):
            raise ValueError(f"blocks to remove are {run.start} to {run.stop - 1}; they must lie between 1 and {base.architecture.num_layers - 1}")
    return runs


def _runs(removed: Collection[int]) -> Iterator[range]:
    blocks = sorted(removed)
    starts = [block for block in blocks if block - 1 not in removed]
    stops = [block + 1 for block in blocks if block + 1 not in removed]
    return map(range, starts, stops)


def _around(base: Base, run: range, calibration: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """By batch, float64 [N, D]: what the FFN before a run adds to the stream, the stream that it is added to, and the stream behind the run."""
    ffn = base.family.parts(base.model).layers[2 * run.start - 1]
    for ids_BT in calibration:
        streams = list(residuals(base, ids_BT))
        middle_BTD = streams[2 * run.start - 1]
        added_BTD = ffn.mixer(ffn.norm(middle_BTD))
        yield tuple(tensor.flatten(0, 1).double() for tensor in (added_BTD, middle_BTD, streams[2 * run.stop]))


def _solved(moment_DD: torch.Tensor, wanted_DD: torch.Tensor, *, ridge: float) -> torch.Tensor:
    """Raises ValueError where the tokens do not span all channels."""
    factor_DD, failed = torch.linalg.cholesky_ex(moment_DD + ridge * torch.eye(len(moment_DD), dtype=moment_DD.dtype))
    if failed:
        raise ValueError("calibration leaves channels that no token has; a linear map needs more, or more various, tokens")
    return torch.cholesky_solve(wanted_DD, factor_DD)
