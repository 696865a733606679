"""The fit of a layer with experts: what dropped ones gave is taken up by the shared expert and by those that stay.

Such a layer adds to the stream, for every token t,

    B · Σ_j g_j(t) · W_j a_j(t)  +  S s(t)      over the experts j that the router sends t to,

where a_j are the neurons of expert j as its last matrix W_j reads them, g_j is what its output is multiplied by, S is the last matrix of the shared expert,
s its neurons, and B is there where experts read and write a latent, else the identity. With the student's own router, over the experts that stay, g and the
neurons depend on none of W, S and B. Given all others each of these matrices is a least squares fit, so they are solved for in turn (block coordinate descent),
each towards what the layer should add less what the others do: first S and B, from all tokens, then expert after expert, from the tokens that are sent to it
and with inputs g_j·a_j. What is missing is kept for every token and brought up to date with each matrix, rounded as it is stored, so that later ones correct
for rounding too. An expert that no token is sent to stays as it is.

Then, in rounds of the same kind, the shared expert and one expert after another are trained, with all of their matrices, towards what is missing and what they
give themselves (local_training.py).

In memory are what experts read and what is missing, of all tokens, and the Gram matrix of one expert; neurons are computed anew, some tokens at a time.
Letters: B batch, T tokens of a row, N all real tokens, n those of an expert or a batch, K hidden of the student, k experts of a token, L what experts read
and write, I inputs of a matrix.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import nn

from minitron.families.experts import Sent, experts_of
from minitron.families.table import expert_of
from minitron.pruning.plan import ENOUGH_FOR_EXPERT, LOCAL_BATCH, SHARED_BATCH, SWEEPS, Recipe, set_ridge
from minitron.pruning.refits.least_squares import NormalEquations
from minitron.pruning.refits.local_training import train_locally, trainable

AT_ONCE = 4096  # tokens of an expert whose neurons exist at a time
BEHIND_LATENT = "mixer.fc2_latent_proj"
SHARED_EXPERT = ("mixer.shared_experts", "mixer.shared_mlp")  # whichever a family has


@dataclass(frozen=True, slots=True)
class _Told:
    """Of a batch's real tokens: what experts are given [n, L], which of them [n, k] with what weights [n, k], and what the layer adds without them [n, K]."""

    given_nL: torch.Tensor
    experts_nk: torch.Tensor
    weights_nk: torch.Tensor
    added_nK: torch.Tensor


@dataclass(frozen=True, slots=True)
class Trained:
    """Local training of a layer: how many parts were `tried` and `kept`, and the layer's error, a sum of squares, before and after."""

    tried: int
    kept: int
    before: float
    after: float


class _Listener(nn.Module):
    """In the experts' place: keeps what they would be given, and gives nothing."""

    heard: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def forward(self, hidden_ND: torch.Tensor, experts_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        self.heard = hidden_ND, experts_NK, weights_NK
        return torch.zeros_like(hidden_ND)


class ExpertsFit:
    """The fit of a student's layer. `residuals` [B, T, K] are the student's before it, `masks` [B, T] say which tokens are real, `missing` gives for every
    batch what the mixer should give, [B, T, K]; `keep` stores a matrix by its name in the layer, rounded, in the block too; `added` is what the layer
    multiplies by before it adds."""

    def __init__(self, block: nn.Module, residuals: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], missing: Iterable[torch.Tensor],
                 keep: Callable[[str, torch.Tensor], None], added: float = 1.0):  # fmt: skip
        self.added = added
        self.block, self.experts, self.residuals, self.masks, self.keep = block, experts_of(block), residuals, masks, keep
        behind = dict(block.named_modules()).get(BEHIND_LATENT)
        self.behind = behind if isinstance(behind, nn.Linear) else None
        told, error = [], []
        for (one, _), missing_BTK, mask in zip(self._walk(), missing, masks, strict=True):
            told.append((one.given_nL, one.experts_nk, one.weights_nk))
            error.append(_real(missing_BTK, mask) - one.added_nK)
        self.error_NK = torch.cat(error)
        self.given_NL, experts_Nk, self.weights_Nk = (torch.cat(values) for values in zip(*told, strict=True))
        self.sent = Sent(experts_Nk, len(self.experts))
        self.latent_NL = None if self.behind is None else torch.zeros_like(self.given_NL)
        for number in self.sent.reached:
            for tokens_n, inputs_nI in self._inputs(number):
                self._change(tokens_n, self._matrix(number), inputs_nI)

    def run(self, recipe: Recipe, outside: Sequence[str], *, place: str) -> Trained:
        """Refits and trains what the recipe says; gives what the training came to. `outside` names the layer's matrices that write to the stream beside those
        of experts.

        Raises ValueError naming the place where sums are not finite or singular.
        """
        for _ in range(SWEEPS):
            for name in outside if recipe.refit_shared else ():
                self._refit_outside(name, set_ridge(recipe), place)
            for number in self.sent.reached if recipe.refit_experts else ():
                self._refit_expert(number, set_ridge(recipe), f"expert {number} of {place}")
        fitted, tried, kept, steps = self._error, 0, 0, -(-recipe.local_steps // SWEEPS)
        for _ in range(SWEEPS if steps else 0):
            parts = [partial(self._train_shared, steps)] * (recipe.refit_shared and self._shared is not None)
            parts += [partial(self._train_expert, number, steps) for number in self.sent.reached if recipe.refit_experts]
            tried, kept = tried + len(parts), kept + sum(train() for train in parts)
        return Trained(tried, kept, fitted, self._error)

    @property
    def _error(self) -> float:
        return float(self.error_NK.square().sum(dtype=torch.float64))

    @cached_property
    def _shared(self) -> str | None:
        """The shared expert's name in the layer; None where it has none."""
        return next((name for name, _ in self.block.named_modules() if name in SHARED_EXPERT), None)

    def _train_shared(self, steps: int) -> bool:
        shared = self.block.get_submodule(self._shared)
        own, given_NK = trainable(shared), torch.cat([given_nK for _, given_nK in self._walk(shared)])
        self._give(shared, given_NK, 1.0)  # what is missing is now what it should give: no second copy of all tokens
        kept = train_locally(own.parameters(), lambda some: own(given_NK[some]) - self.error_NK[some], len(given_NK), steps=steps, batch=SHARED_BATCH)
        if kept:
            for name, tensor in own.named_parameters():
                self.keep(f"{self._shared}.{name}", tensor.detach())
        self._give(shared, given_NK, -1.0)
        return kept

    def _give(self, shared: nn.Module, given_NK: torch.Tensor, times: float) -> None:
        for error_nK, given_nK in zip(self.error_NK.split(AT_ONCE), given_NK.split(AT_ONCE), strict=True):
            error_nK.add_(shared(given_nK), alpha=times)

    def _train_expert(self, number: int, steps: int) -> bool:
        own, (tokens_n, places_n) = trainable(self.experts[number]), self.sent.of(number)
        given_nL, weights_n1 = self.given_NL[tokens_n], self.weights_Nk.flatten()[places_n, None]
        behind = (lambda made: made) if self.behind is None else partial(F.linear, weight=self.behind.weight.float())
        before_nL = _in_parts(own, given_nL) * weights_n1
        targets_nK = self.error_NK[tokens_n] + behind(before_nL)

        def off(some: torch.Tensor) -> torch.Tensor:
            return behind(own(given_nL[some]) * weights_n1[some]) - targets_nK[some]

        if len(tokens_n) < targets_nK.shape[1] or not train_locally(own.parameters(), off, len(tokens_n), steps=steps, batch=LOCAL_BATCH):
            return False
        for name, tensor in own.named_parameters():
            self.keep(f"mixer.experts.{number}.{name}", tensor.detach())
        more_nL = _in_parts(self.experts[number], given_nL) * weights_n1 - before_nL
        if self.latent_NL is not None:
            self.latent_NL[tokens_n] += more_nL
        self.error_NK[tokens_n] -= behind(more_nL)
        return True

    def _refit_outside(self, name: str, ridge: float, place: str) -> None:
        """A matrix that writes to the stream from all tokens: the shared expert's, or what is behind the latents."""
        writer = self.block.get_submodule(name.removesuffix(".weight"))
        equations = NormalEquations(writer.in_features, writer.out_features, self.error_NK.device)
        before_KI = _now(writer)
        for error_nK, inputs_nI in self._inputs_outside(writer):
            equations.add(inputs_nI, error_nK + inputs_nI @ before_KI.T)
        self.keep(name, equations.solve(before_KI, ridge, place=place))
        for error_nK, inputs_nI in self._inputs_outside(writer):
            error_nK += inputs_nI @ (before_KI - _now(writer)).T

    def _refit_expert(self, number: int, ridge: float, place: str) -> None:
        before_LI = self._matrix(number)
        equations = NormalEquations(before_LI.shape[1], before_LI.shape[0], self.error_NK.device, enough=ENOUGH_FOR_EXPERT)
        to_latent_LK = None if self.behind is None else torch.linalg.pinv(self.behind.weight.double()).float()
        for tokens_n, inputs_nI in self._inputs(number):
            error_nK = self.error_NK[tokens_n]
            equations.add(inputs_nI, (error_nK if to_latent_LK is None else error_nK @ to_latent_LK.T) + inputs_nI @ before_LI.T)
        self.keep(f"mixer.experts.{number}.down_proj.weight", equations.solve(before_LI, ridge, place=place))
        changed_LI = self._matrix(number) - before_LI
        for tokens_n, inputs_nI in self._inputs(number):
            self._change(tokens_n, changed_LI, inputs_nI)

    def _matrix(self, number: int) -> torch.Tensor:
        return _now(self.experts[number].down_proj)

    def _change(self, tokens_n: torch.Tensor, changed_LI: torch.Tensor, inputs_nI: torch.Tensor) -> None:
        """What is missing once an expert's matrix is larger by so much."""
        more = inputs_nI @ changed_LI.T
        if self.behind is not None:
            self.latent_NL[tokens_n] += more
            more = more @ self.behind.weight.float().T
        self.error_NK[tokens_n] -= more

    def _inputs(self, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The tokens [n] of an expert, some at a time, and its weighted neurons [n, I]."""
        tokens_n, places_n = self.sent.of(number)
        weights_n = self.weights_Nk.flatten()[places_n]
        for some_n, of_some_n in zip(tokens_n.split(AT_ONCE), weights_n.split(AT_ONCE), strict=True):
            yield some_n, self.experts[number].inner(self.given_NL[some_n]) * of_some_n[:, None]

    def _inputs_outside(self, writer: nn.Linear) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What is missing [n, K], a view, and the inputs [n, I] of another matrix, a batch at a time."""
        first = 0
        for told, inner_nI in self._walk(writer):
            end = first + len(told.given_nL)
            yield self.error_NK[first:end], self.latent_NL[first:end] if writer is self.behind else inner_nI
            first = end

    def _walk(self, writer: nn.Module | None = None) -> Iterator[tuple[_Told, torch.Tensor | None]]:
        """Of every batch what the layer does without its experts, and what a matrix of it is given, [n, I]."""
        listener, inner = _Listener(), []
        self.block.mixer.experts = listener
        handle = writer and writer.register_forward_pre_hook(lambda _module, args: inner.append(args[0]))
        try:
            for residual_BTK, mask in zip(self.residuals, self.masks, strict=True):
                added_BTK = self.block(residual_BTK) - residual_BTK
                added_BTK = added_BTK if self.added == 1 else added_BTK / self.added
                yield _Told(*(_real(values, mask) for values in (*listener.heard, added_BTK))), _real(inner.pop(), mask) if inner else None
        finally:
            self.block.mixer.experts = self.experts
            if handle:
                handle.remove()


def is_trained(name: str) -> bool:
    """Whether a layer's tensor is one that local training may change."""
    return expert_of(name) is not None or any(f".{shared}." in name for shared in SHARED_EXPERT)


def _now(linear: nn.Linear) -> torch.Tensor:
    """Its matrix in float32, which stays what it is when the module is given another."""
    return linear.weight.detach().float()


def _in_parts(module: nn.Module, given_NI: torch.Tensor) -> torch.Tensor:
    """[N, I] to [N, O], some tokens at a time."""
    return torch.cat([module(some_nI) for some_nI in given_NI.split(AT_ONCE)])


def _real(values: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """[B, T, …] or [B·T, …] to the real tokens' own, [n, …]."""
    flat = values.flatten(0, -2)
    return flat if mask_BT is None else flat[mask_BT.flatten()]
