"""The residual streams of a base and of its student over the same calibration tokens, where a walk through their layers stands.

Letters: B batch, T tokens of a row, N real tokens of a batch, R rows, D hidden of the base, K hidden of the student, I inputs of a matrix.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from minitron.checkpoints.placement import given_to
from minitron.pruning.basis import Basis
from minitron.pruning.rotation import normalised, real_tokens


class Streams:
    """x of the base, [B, T, D], and y of the student, [B, T, K], of every batch. y should be x in the basis. `pairs` are ids [B, T] and the mask of real
    tokens, None where all are; `epsilon` is the norms'; `added` is what the family multiplies a mixer's output by on its way into the stream."""

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor | None]], basis: Basis, epsilon: float, added: float):
        self.ids, self.masks = [ids for ids, _ in pairs], [mask for _, mask in pairs]
        self.basis, self.epsilon, self.added = basis, epsilon, added
        self.base: list[torch.Tensor] = []
        self.student: list[torch.Tensor] = []

    def begin(self, base_width: int, student_width: int, device: torch.device) -> None:
        """Room for both, to be filled."""
        self.base, self.student = ([torch.empty(*ids_BT.shape, width, device=device) for ids_BT in self.ids] for width in (base_width, student_width))

    def real_ids(self) -> Iterator[torch.Tensor]:
        """Of every batch, [N]."""
        return (ids if mask is None else ids[mask] for ids, mask in zip(self.ids, self.masks, strict=True))

    def normalised(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """n(x) [N, D] and n(y) [N, K] of every batch."""
        for base_BTD, student_BTK, mask in zip(self.base, self.student, self.masks, strict=True):
            yield real_tokens(normalised(base_BTD, self.epsilon), mask), real_tokens(normalised(student_BTK, self.epsilon), mask)

    def missing(self) -> Iterator[torch.Tensor]:
        """What a mixer of the student should give, [B, T, K] of every batch: what is missing in its stream, over what the family multiplies it by."""
        for base_BTD, student_BTK in zip(self.base, self.student, strict=True):
            missing_BTK = self.basis.project(base_BTD) - student_BTK
            yield missing_BTK if self.added == 1 else missing_BTK / self.added

    def given(self, block: nn.Module, writer: nn.Module) -> Iterator[torch.Tensor]:
        """Of every batch what a writer of the student's block is given, [N, I]. What it would make of it is not computed."""
        return (real_tokens(given_to(writer, block, student_BTK), mask) for student_BTK, mask in zip(self.student, self.masks, strict=True))

    def given_and_missing(self, block: nn.Module, writer: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of every batch what the writer is given, [N, I], what is missing, [N, K], and second_half's."""
        missing = (real_tokens(missing_BTK, mask) for missing_BTK, mask in zip(self.missing(), self.masks, strict=True))
        return zip(self.given(block, writer), missing, self.second_half(), strict=True)

    def second_half(self) -> Iterator[torch.Tensor]:
        """Of every batch which real tokens, [N], are of rows with an odd number: however many rows a batch has, the same ones."""
        first = 0
        for ids_BT, mask in zip(self.ids, self.masks, strict=True):
            odd_B1 = torch.arange(first, first + len(ids_BT), device=ids_BT.device)[:, None] % 2 == 1
            yield real_tokens(odd_B1.expand_as(ids_BT), mask)
            first += len(ids_BT)

    def token_weights(self) -> Iterator[torch.Tensor]:
        """Of every batch 1 over the root mean square of the base's stream behind the layer, [N, 1]: what comes next reads the stream normalised, so an error
        counts for less in the few tokens where a model keeps values thousands of times as large as elsewhere (massive activations, arXiv 2402.17762)."""
        return (self.token_weight(real_tokens(base_BTD, mask)) for base_BTD, mask in zip(self.base, self.masks, strict=True))

    def token_weight(self, base: torch.Tensor) -> torch.Tensor:
        """Of streams [..., D], [..., 1]."""
        return torch.rsqrt(base.float().square().mean(-1, keepdim=True) + self.epsilon)

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.ids))

    def rows(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of these rows, counted through all batches: [R, T, D], [R, T, K] and the mask of real tokens, [R, T]."""
        places = [(batch, row) for batch, ids_BT in enumerate(self.ids) for row in range(len(ids_BT))]
        chosen = [places[number] for number in numbers.tolist()]
        whole = torch.ones_like(self.ids[0][0], dtype=torch.bool)
        masks = [whole if self.masks[batch] is None else self.masks[batch][row] for batch, row in chosen]
        streams = (torch.stack([stream[batch][row] for batch, row in chosen]) for stream in (self.base, self.student))
        return *streams, torch.stack(masks)
