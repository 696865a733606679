"""Experts in the walk for width: what each one does with the tokens sent to it, and one turn for each over the tokens of all batches.

Letters: B samples of a batch, T tokens, D hidden; N tokens of all batches, n those sent to an expert, E experts, F neurons of one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import nn

from minitron.families.experts import Routed, experts_of


class ExpertSums:
    """Sums over the tokens sent to each expert of a layer, EXPERT_ROWS [3, E] and NEURON_ROWS [2, E, F] of scores.py. What an expert's output is multiplied by
    is taken as it reaches the experts, so it is right for every router. `mask_N` says which tokens count, None: all."""

    def __init__(self, num_experts: int, neurons: int, mask_N: torch.Tensor | None, device: torch.device):
        self.mask_N = mask_N
        self.sums_3E = torch.zeros(3, num_experts, dtype=torch.float64, device=device)
        self.sums_2EF = torch.zeros(2, num_experts, neurons, dtype=torch.float64, device=device)

    def hear(self, routed: Routed) -> None:
        """What experts.Experts.watch is told."""
        inner_nF, output_nD, weights_n = routed.inner_nF, routed.output_nD, routed.weights_n
        if self.mask_N is not None:
            real_n = self.mask_N[routed.tokens_n]
            inner_nF, output_nD, weights_n = inner_nF[real_n], output_nD[real_n], weights_n[real_n]
        lengths_n = torch.linalg.vector_norm(output_nD, dim=-1, dtype=torch.float32).double()
        self.sums_3E[:, routed.expert] += torch.stack([lengths_n.new_tensor(len(lengths_n)), weights_n.double() @ lengths_n, lengths_n.sum()])
        sizes_nF = inner_nF.abs().float()
        self.sums_2EF[0, routed.expert] += sizes_nF.sum(0)
        self.sums_2EF[1, routed.expert] += sizes_nF.square_().sum(0)


class _Asked(Exception):
    """A layer has come to its experts."""


@contextmanager
def asked_once(block: nn.Module, hidden: Sequence[torch.Tensor], watch: Callable[[Routed], None] | None = None) -> Iterator[None]:
    """Within it `block` is to run on every batch [B, T, D] in turn, and its experts give what they have made of the tokens of all of them at once: so each is
    read once and asked once, and of the rest of the layer there is one batch at a time. What comes before the experts, norm and router, runs twice. `watch`
    hears what each one did; a layer without experts runs as it is."""
    experts, given = experts_of(block), []
    if experts is None:
        yield
        return

    def ask(*given_NX: torch.Tensor) -> None:
        given.append(given_NX)
        raise _Asked

    try:
        experts.forward = ask
        for batch_BTD in hidden:
            with suppress(_Asked):
                block(batch_BTD)
        del experts.forward
        sizes, together = [len(of_batch[0]) for of_batch in given], [torch.cat(parts) for parts in zip(*given, strict=True)]
        given.clear()
        experts.watch = watch
        made = iter(experts(*together).split(sizes))
        del together
        experts.forward = lambda *_: next(made)
        yield
    finally:
        experts.watch = None
        experts.__dict__.pop("forward", None)
