"""How evenly a mixture of experts sends out its tokens, counted while it is trained, and the bias that keeps it even.

A mixture is a module with a list `experts` and a router `gate`, which gives logits, weights and experts [N, K] of N tokens. E experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

BIAS = "e_score_correction_bias"  # [E], added to a router's scores where it chooses, not where it weighs


class Loads:
    """The tokens of every mixture's experts since `take`, in the order of the model's modules. Padding is none of them: `real_BT` is the mask of real tokens of
    the rows at work, None where all are. A layer that is computed again in the backward pass is counted again."""

    def __init__(self, model: nn.Module):
        self.routers = [module.gate for module in model.modules() if isinstance(getattr(module, "experts", None), nn.ModuleList)]
        self.lengths = [len(router.weight) for router in self.routers]
        self.counts: list[torch.Tensor | None] = [None] * len(self.routers)
        self.sums: list[torch.Tensor] = []
        self.real_BT: torch.Tensor | None = None
        for number, router in enumerate(self.routers):
            router.register_forward_hook(self._counter(number))
        if self.routers:
            model.loads = self

    def _counter(self, number: int) -> Callable[..., None]:
        def count(router: nn.Module, _given: Any, output: tuple[torch.Tensor, ...]) -> None:
            if router.training:
                experts_NK = output[2].detach()
                if self.counts[number] is None:
                    self.counts[number] = torch.zeros(self.lengths[number], dtype=torch.int64, device=experts_NK.device)
                ones_NK = torch.ones_like(experts_NK)
                if self.real_BT is not None:
                    ones_NK *= self.real_BT.flatten()[:, None].to(experts_NK.device)
                self.counts[number].index_add_(0, experts_NK.flatten(), ones_NK.flatten())

        return count

    def take(self) -> list[float]:
        """This process's counts, one mixture after another, which begin anew."""
        counts, self.counts = self.counts, [None] * len(self.routers)
        if any(count_E is None for count_E in counts):  # none has passed
            return [0.0] * sum(self.lengths)
        return torch.cat(counts).double().tolist() if counts else []

    def measure(self, sums: Sequence[float]) -> dict[str, float]:
        """Of the counts of all processes: how many times the mean the busiest expert of all mixtures was sent, and how many experts were sent nothing."""
        self.sums = list(torch.tensor(sums, dtype=torch.float64).split(self.lengths)) if self.routers else []
        if not self.routers:
            return {}
        most = max((sum_E.max() / sum_E.mean().clamp(min=1e-9)).item() for sum_E in self.sums)
        return {"busiest_expert": most, "idle_experts": float(sum((sum_E == 0).sum().item() for sum_E in self.sums))}

    @torch.no_grad()
    def balance(self, step: float) -> None:
        """Lower the bias of each expert that was sent more than the mean by a step, and raise the others' (arXiv 2408.15664, algorithm 1).

        Raises ValueError where a router has none.
        """
        for router, sum_E in zip(self.routers, self.sums, strict=True):
            if not hasattr(router, BIAS):
                raise ValueError("train.balance is bias, but the model's routers have no correction bias; it must be none")
            bias_E = getattr(router, BIAS)
            bias_E += step * torch.sign(sum_E.mean() - sum_E).to(bias_E)
