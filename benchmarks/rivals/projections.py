"""The student of Low-Rank Clone while it is trained: the teacher's matrices times projections of the hidden size, and where these begin.

D hidden of the teacher, K of the student, N tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.rivals.walks import residuals, turned_readers
from minitron.families.state import model_tensors

if TYPE_CHECKING:
    from benchmarks.real_sides import Base

HEAD, EMBEDDINGS, LAST_NORM = "lm_head.weight", "embeddings.weight", "norm_f.weight"


@dataclass(frozen=True)
class Clone:
    """A student as it is trained, by canonical names: the teacher's matrices, their projections [D, K], and norms' weights [K]."""

    matrices: dict[str, torch.Tensor]
    projections: dict[str, nn.Parameter]
    norms: dict[str, nn.Parameter]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the student is made of: Pᵀ·W of what writes to the stream, W·P of all else."""
        products = {name: projection.t() @ self.matrices[name] if writes(name) else self.matrices[name] @ projection
                    for name, projection in self.projections.items()}  # fmt: skip
        return products | self.norms


def writes(name: str) -> bool:
    return name.split(".")[-2] in ("o_proj", "down_proj")


@torch.no_grad()
def begun(base: Base, narrow: Base, hidden: int, calibration: Sequence[torch.Tensor] | None, tied: bool, seed: int) -> Clone:
    """A clone of `narrow`, the base with fewer neurons, from one rotation to principal directions of the calibration rows; at random where there are none."""
    state, size, random = model_tensors(base.family, narrow.model), base.architecture.hidden, torch.Generator().manual_seed(seed)
    norms = {name: tensor for name, tensor in state.items() if tensor.ndim == 1}
    matrices = {name: tensor for name, tensor in state.items() if tensor.ndim == 2}
    if not tied:
        matrices.setdefault(HEAD, matrices[EMBEDDINGS])
    if calibration is None:
        projections = {name: torch.randn(size, hidden, generator=random) * size**-0.5 for name in matrices}
        started = {name: torch.full((hidden,), turned_readers(weight_D, torch.eye(size))[1]) for name, weight_D in norms.items()}
    else:
        basis_DK, factor = _principal(base, hidden, calibration)
        if tied:  # nothing takes the last norm's weights in, so the basis is turned until they are a norm's weights there, too
            basis_DK = basis_DK @ torch.linalg.eigh(basis_DK.t() @ (norms[LAST_NORM][:, None] * basis_DK)).eigenvectors
        projections, started = dict.fromkeys(matrices, basis_DK), {}
        for norm, weight_D in norms.items():
            turned_DK, number = turned_readers(weight_D, basis_DK)
            layer = norm.removesuffix("norm.weight")
            readers = [HEAD] if norm == LAST_NORM else [name for name in matrices if name.startswith(layer) and not writes(name)]
            projections |= {name: turned_DK * factor for name in readers if name in matrices}
            started[norm] = torch.full((hidden,), number)
        if tied:
            started[LAST_NORM] = (basis_DK * norms[LAST_NORM][:, None] * basis_DK).sum(0) * factor
    return Clone(matrices, *({name: nn.Parameter(tensor.clone()) for name, tensor in found.items()} for found in (projections, started)))


def _principal(base: Base, hidden: int, calibration: Sequence[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The principal directions [D, K] of the normalised stream at all norms, and what a norm over K channels is to be multiplied by to be the old one there."""
    moment_DD = 0.0
    for ids_BT in calibration:
        for stream_BTD in residuals(base, ids_BT):
            stream_ND = F.rms_norm(stream_BTD.flatten(0, 1), stream_BTD.shape[-1:]).double()
            moment_DD = moment_DD + stream_ND.t() @ stream_ND
    values_D, basis_DD = torch.linalg.eigh(moment_DD)
    share = (values_D[-hidden:].sum() / values_D.sum()).item()
    return basis_DD[:, -hidden:].float(), (share * len(values_D) / hidden) ** 0.5
