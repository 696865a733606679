"""Routed experts as modules of their own, whatever transformers stacks them into: one tensor each on disk, in memory and where they are cut or fitted.

A mixer of experts has a router, `gate`, that gives of N tokens the K experts of each and what their outputs are multiplied by, and `experts`, which
transformers calls with those. Here that is a list of them. It sorts tokens by their expert, so that each expert is asked once, with all the tokens that are
sent to it, and one that no token is sent to is not asked at all: where experts are read from disk (`source`) it is never read.

Letters: N tokens, K experts of a token, D what experts read and write, F neurons of one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

GROUPED_SIZES = 8  # numbers of bf16 in 16 bytes


@dataclass(frozen=True, slots=True)
class Routed:
    """What one expert did with the tokens that were sent to it: which tokens [n], what its output was multiplied by [n], its neurons [n, F] as the last matrix
    reads them, and its output [n, D] before the multiplication."""

    expert: int
    tokens_n: torch.Tensor
    weights_n: torch.Tensor
    inner_nF: torch.Tensor
    output_nD: torch.Tensor


class _Undrawn(nn.Linear):
    """A matrix whose numbers will be given: to draw those of thousands of experts takes seconds, even on the meta device."""

    def reset_parameters(self) -> None:
        pass


def _matrix(inputs: int, outputs: int) -> nn.Linear:
    linear = _Undrawn(inputs, outputs, bias=False)
    linear.__class__ = nn.Linear
    return linear


class Expert(nn.Module):
    """One expert: down(act(up x)), or gated down(act(gate x) · up x). No biases; its matrices are for others to fill."""

    def __init__(self, width: int, neurons: int, *, gated: bool, activation: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        if gated:
            self.gate_proj = _matrix(width, neurons)
        self.up_proj = _matrix(width, neurons)
        self.down_proj = _matrix(neurons, width)
        self.gated, self.activation = gated, activation

    def inner(self, given_nD: torch.Tensor) -> torch.Tensor:
        """[n, D] to what the last matrix reads, [n, F]."""
        if self.gated:
            return self.activation(self.gate_proj(given_nD)) * self.up_proj(given_nD)
        return self.activation(self.up_proj(given_nD))

    def forward(self, given_nD: torch.Tensor) -> torch.Tensor:
        """[n, D] to [n, D]."""
        return self.down_proj(self.inner(given_nD))


class Source(Protocol):
    """Where experts are that are not in memory."""

    def open(self, numbers: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """These experts in this order, each ready to compute until the next is asked for."""


class Experts(nn.ModuleList):
    """The experts of a layer by number. `source`: where they come from, None if they are here. `watch` hears what each one did in every forward pass.
    `one_by_one`: gradients go through one expert after another, as they do where experts come from elsewhere."""

    def __init__(self, experts: Sequence[nn.Module]):
        super().__init__(experts)
        self.source: Source | None = None
        self.watch: Callable[[Routed], None] | None = None
        self.one_by_one = False

    def opened(self, numbers: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """Some experts by number, wherever they are."""
        return self.source.open(numbers) if self.source is not None else ((number, self[number]) for number in numbers)

    def forward(self, hidden_ND: torch.Tensor, experts_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """[N, D] to [N, D]: of every token the sum over its experts of weight · output, added up in float32 at least.

        Where gradients are wanted every expert gets them, zeros if it has no token: engines that add up gradients over processes expect one of each.
        """
        sent = Sent(experts_NK, len(self))
        if torch.is_grad_enabled():
            asked = self._one_by_one if self.one_by_one or self.source is not None else self._together
            return asked(hidden_ND, weights_NK, sent)
        total_ND = torch.zeros_like(hidden_ND, dtype=torch.promote_types(hidden_ND.dtype, weights_NK.dtype))
        for number, expert in self.opened(sent.reached):
            tokens_n, places_n = sent.of(number)
            inner_nF = expert.inner(hidden_ND[tokens_n])
            output_nD = expert.down_proj(inner_nF)
            weights_n = weights_NK.flatten()[places_n]
            if self.watch is not None:
                self.watch(Routed(number, tokens_n, weights_n, inner_nF, output_nD))
            total_ND.index_add_(0, tokens_n, (output_nD * weights_n[:, None]).to(total_ND.dtype))
        return total_ND.to(hidden_ND.dtype)

    def _one_by_one(self, hidden_ND: torch.Tensor, weights_NK: torch.Tensor, sent: "Sent") -> torch.Tensor:
        """The same; each expert is opened again in the backward pass, so that none has to be kept until then."""
        total_ND = torch.zeros_like(hidden_ND, dtype=torch.promote_types(hidden_ND.dtype, weights_NK.dtype))
        for number in sent.reached:
            tokens_n, places_n = sent.of(number)
            output_nD = checkpoint(self._output, number, hidden_ND[tokens_n], use_reentrant=False, preserve_rng_state=False)
            total_ND = total_ND.index_add(0, tokens_n, (output_nD * weights_NK.flatten()[places_n][:, None]).to(total_ND.dtype))
        return total_ND.to(hidden_ND.dtype)

    def _output(self, number: int, given_nD: torch.Tensor) -> torch.Tensor:
        ((_, expert),) = self.opened([number])
        return expert(given_nD)

    def _together(self, hidden_ND: torch.Tensor, weights_NK: torch.Tensor, sent: "Sent") -> torch.Tensor:
        """The same, of all experts at once: for training, where what is sent to them is kept anyway, and a step for each of them takes longer than
        its products."""
        first = self[0]
        given_nD = Spread.apply(hidden_ND, sent)
        inner_nF = first.activation(self._products(given_nD, "gate_proj" if first.gated else "up_proj", sent))
        if first.gated:
            inner_nF = inner_nF * self._products(given_nD, "up_proj", sent)
        output_nD, weights_n = self._products(inner_nF, "down_proj", sent), weights_NK.flatten()[sent.places]
        if self.watch is not None:
            for number in sent.reached:
                here = slice(*sent.firsts[number : number + 2])
                self.watch(Routed(number, sent.of(number)[0], weights_n[here], inner_nF[here], output_nD[here]))
        weighted_nD = output_nD * weights_n[:, None]
        return Collect.apply(weighted_nD, sent).to(hidden_ND.dtype)

    def _products(self, given_nI: torch.Tensor, name: str, sent: "Sent") -> torch.Tensor:
        kind = given_nI.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else given_nI.dtype
        return Products.apply(given_nI.to(dtype), sent, *(getattr(expert, name).weight for expert in self))


class Sent:
    """Tokens by the expert that they are sent to, from the experts [N, K] of every token."""

    def __init__(self, experts_NK: torch.Tensor, num_experts: int):
        flat = experts_NK.flatten()
        self.places, self.per_token = flat.argsort(stable=True), experts_NK.shape[1]
        self.counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat.device).index_add_(0, flat, torch.ones_like(flat))

    @cached_property
    def counts(self) -> list[int]:
        """How many tokens each expert is sent; on a GPU asking for them waits for it."""
        return self.counts_E.tolist()

    @cached_property
    def firsts(self) -> list[int]:
        """Where each expert's tokens begin among all, and at the end how many those are."""
        return [0, *accumulate(self.counts)]

    @property
    def reached(self) -> list[int]:
        """The experts that have a token, in order."""
        return [number for number, count in enumerate(self.counts) if count]

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of an expert the tokens that go to it [n], ascending, and their places [n] among all N·K."""
        places_n = self.places[self.firsts[expert] : self.firsts[expert + 1]]
        return places_n // self.per_token, places_n

    def spread(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """A row of every token to a row for every expert that it goes to, [N·K, D], by expert."""
        return rows_ND.index_select(0, self.places // self.per_token)

    def collect(self, rows_nD: torch.Tensor) -> torch.Tensor:
        """The sum over a token's experts, [N, D], in their order."""
        found_NK = torch.empty_like(self.places)
        found_NK[self.places] = torch.arange(len(self.places), device=self.places.device)
        return F.embedding_bag(found_NK.view(-1, self.per_token).sort(dim=1).values, rows_nD, mode="sum")


class Spread(torch.autograd.Function):
    """Sent.spread, whose gradient is `collect`."""

    @staticmethod
    def forward(ctx, rows_ND, sent):
        ctx.sent = sent
        return sent.spread(rows_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_nD):
        return ctx.sent.collect(gradient_nD), None


class Collect(torch.autograd.Function):
    """Sent.collect, whose gradient is `spread`."""

    @staticmethod
    def forward(ctx, rows_nD, sent):
        ctx.sent = sent
        return sent.collect(rows_nD)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_ND):
        return ctx.sent.spread(gradient_ND), None


class Products(torch.autograd.Function):
    """Rows [n, I] of what is `sent`, by expert, times its matrix [O, I], cast to their dtype: [n, O]. A matrix without rows gets a gradient of zeros."""

    @staticmethod
    def forward(ctx, given_nI, sent, *weights_OI):
        ctx.sent = sent
        ctx.save_for_backward(given_nI, *weights_OI)
        return _times(given_nI, sent, weights_OI, transposed=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_nO):
        (given_nI, *weights_OI), gradient_nO = ctx.saved_tensors, gradient_nO.contiguous()
        g_given_nI = _times(gradient_nO, ctx.sent, weights_OI, transposed=False)
        if is_grouped(given_nI, weights_OI[0]):
            g_weights = F.grouped_mm(gradient_nO.t(), given_nI, offs=ctx.sent.counts_E.cumsum(0, dtype=torch.int32)).to(weights_OI[0].dtype).unbind()
        else:
            parts = zip(gradient_nO.split(ctx.sent.counts), given_nI.split(ctx.sent.counts), weights_OI, strict=True)
            g_weights = [torch.mm(gradient.t(), given).to(weight_OI.dtype) if len(given) else torch.zeros_like(weight_OI)
                         for gradient, given, weight_OI in parts]  # fmt: skip
        return g_given_nI, None, *g_weights


def _times(given_nI: torch.Tensor, sent: Sent, matrices: Sequence[torch.Tensor], *, transposed: bool) -> torch.Tensor:
    """Rows by expert times its matrix [I, O], or [O, I] transposed."""
    if is_grouped(given_nI, matrices[0]):
        stack = torch.stack(list(matrices)).to(given_nI.dtype)
        return F.grouped_mm(given_nI, stack.mT if transposed else stack, offs=sent.counts_E.cumsum(0, dtype=torch.int32))
    made_nO = given_nI.new_empty(len(given_nI), matrices[0].shape[0 if transposed else 1])
    for given, made, matrix in zip(given_nI.split(sent.counts), made_nO.split(sent.counts), matrices, strict=True):
        if len(given):
            cast = matrix.to(given.dtype)
            torch.mm(given, cast.t() if transposed else cast, out=made)
    return made_nO


def is_grouped(given: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether a GPU multiplies by all matrices in one call (torch's grouped_mm): in bf16, from compute capability 8.0 on, by whole units of 16 bytes."""
    if given.device.type != "cuda" or given.dtype != torch.bfloat16 or any(size % GROUPED_SIZES for size in matrix.shape):
        return False
    return torch.cuda.get_device_capability(given.device) >= (8, 0)


def unstacked(stacked: nn.Module, *, gated: bool) -> Experts:
    """The experts of a module of transformers that has them stacked, as views of its tensors: up [E, F, D], or gate and up [E, 2F, D], and down [E, D, F]."""
    down_EDF = stacked.down_proj
    up_EFD = stacked.gate_up_proj if gated else stacked.up_proj
    neurons = down_EDF.shape[2]
    with torch.device("meta"):
        experts = [Expert(down_EDF.shape[1], neurons, gated=gated, activation=stacked.act_fn) for _ in range(len(down_EDF))]
    for number, expert in enumerate(experts):
        expert.down_proj.weight = _view(down_EDF, down_EDF[number])
        expert.up_proj.weight = _view(up_EFD, up_EFD[number, -neurons:])
        if gated:
            expert.gate_proj.weight = _view(up_EFD, up_EFD[number, :neurons])
    return Experts(experts)


def _view(whole: nn.Parameter, part: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(part.detach(), requires_grad=whole.requires_grad)


def experts_of(block: nn.Module) -> Experts | None:
    """The experts of a sublayer, None where it has none."""
    experts = getattr(block.mixer, "experts", None)
    return experts if isinstance(experts, Experts) else None
