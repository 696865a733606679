"""What the residual stream holds, and what the loss needs of it: second moments of activations and gradients at every norm input.

The base is walked forward and then backward, one layer at a time, as it is for scores: the forward walk leaves every layer's inputs in a folder, and
the backward one runs each layer again from there, with the gradient that the layers behind it gave. The gradients are those of −log p(y) summed
over tokens, with y drawn from the model's own distribution p, which makes E[g gᵀ] the Fisher information (Martens, arXiv 1412.1193, §5):
labels drawn independently, what the losses of different tokens have in common is nothing on average.

Letters: B batch, T tokens of a row, N tokens of a batch, D hidden, V vocabulary, S sites: norm inputs, or runs of them that share a sum.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from memory_budget.architecture import Architecture
from minitron.checkpoints.placement import Head, PlacedModel, ids_and_mask, run_layer
from minitron.families.base import Family
from minitron.families.experts import experts_of
from minitron.families.table import row_of
from minitron.pruning.plan import num_sites
from minitron.pruning.rotation import NORM, factors, normalised, real_tokens, stream_role

HEAD_NUMBERS = 2**26  # logits at once


@dataclass(frozen=True, slots=True)
class Moments:
    """Means over tokens, float64 [S, D, D]: of n nᵀ, n being the normalised residual, and of g gᵀ, g being the gradient at n, nats per token."""

    covariances_SDD: torch.Tensor
    fishers_SDD: torch.Tensor


class _Sums:
    """Moments as they add up; sites are given by their layer, the last norm's as the number of layers."""

    def __init__(self, hidden: int, num_layers: int, device: torch.device):
        self.num_layers, self.num_sites = num_layers, num_sites(hidden, num_layers)
        self.moments = Moments(*(torch.zeros(self.num_sites, hidden, hidden, dtype=torch.float64, device=device) for _ in range(2)))
        self.tokens_S = torch.zeros(self.num_sites, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, layer: int, normed_ND: torch.Tensor, gradient_ND: torch.Tensor) -> None:
        """Raises ValueError naming the layer whose gradients are not finite."""
        if not torch.isfinite(gradient_ND).all():
            raise ValueError(f"prune: the gradients before {place(layer, self.num_layers)} are not finite")
        site = self.num_sites - 1 if layer == self.num_layers else layer * (self.num_sites - 1) // self.num_layers
        for total_DD, vectors_ND in ((self.moments.covariances_SDD[site], normed_ND.double()), (self.moments.fishers_SDD[site], gradient_ND.double())):
            total_DD.addmm_(vectors_ND.T, vectors_ND)
        self.tokens_S[site] += len(normed_ND)
        self.tokens += len(normed_ND) * (layer == self.num_layers)

    def means(self) -> Moments:
        """The curvatures of norms that share a sum add up; their covariances are averaged."""
        self.moments.covariances_SDD.div_(self.tokens_S[:, None, None])
        self.moments.fishers_SDD.div_(self.tokens)
        return self.moments


def place(layer: int, num_layers: int) -> str:
    return "the output head" if layer == num_layers else f"layer {layer}"


@torch.no_grad()
def stream_moments(base: PlacedModel, batches: Sequence[torch.Tensor], epsilon: float, *, scratch: Path | None = None, seed: int = 0,
                   on_layer: Callable[[], None] = lambda: None) -> Moments:  # fmt: skip
    """Moments over calibration rows [B, T], padding included, of a base that computes in float32.

    Residuals before every layer lie in the folder `scratch` meanwhile (the system's own for such things when None), 2·D bytes a token and layer.
    Raises ValueError naming the layer whose residuals or gradients are not finite.
    """
    num_layers = base.architecture.num_sublayers
    pairs = [ids_and_mask(batch) for batch in batches]
    masks = [mask for _, mask in pairs]
    sums = _Sums(base.architecture.hidden, num_layers, base.device)
    with tempfile.TemporaryDirectory(dir=_emptied(scratch)) as folder:
        residuals = _walk_forward(base, [ids for ids, _ in pairs], Path(folder), on_layer)
        generator = torch.Generator(base.device).manual_seed(seed)
        with base.open_head() as head:
            gradients = [_behind_head(base.family, head, residual, mask, epsilon, generator, sums) for residual, mask in zip(residuals, masks, strict=True)]
        del residuals
        for layer, block in base.visit(range(num_layers - 1, -1, -1)):
            inputs = list(load_file(_file(Path(folder), layer), device=str(base.device)).values())
            _file(Path(folder), layer).unlink()
            norm = _norm_of(block, base.family, base.architecture, layer)
            gradients, at_norms = _behind_layer(block, norm, inputs, gradients)
            for input_BTD, at_norm_BTD, mask in zip(inputs, at_norms, masks, strict=True):
                sums.add(layer, real_tokens(normalised(input_BTD, epsilon), mask), real_tokens(at_norm_BTD * factors(base.family, norm.weight), mask))
            on_layer()
    return sums.means()


def _emptied(scratch: Path | None) -> Path | None:
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        scratch.mkdir(parents=True)
    return scratch


def _file(folder: Path, layer: int) -> Path:
    return folder / f"{layer}.safetensors"


def _walk_forward(base: PlacedModel, ids: Sequence[torch.Tensor], folder: Path, on_layer: Callable[[], None]) -> list[torch.Tensor]:
    """Residuals [B, T, D] behind the last layer; those before every layer are in the folder, rounded to bf16."""
    residuals, num_layers = base.embed(ids), base.architecture.num_sublayers
    for layer, block in base.visit(range(num_layers)):
        save_file({f"{number:08d}": residual_BTD.bfloat16().contiguous() for number, residual_BTD in enumerate(residuals)}, _file(folder, layer))
        residuals = run_layer(block, residuals)
        if not all(torch.isfinite(residual_BTD).all() for residual_BTD in residuals):
            raise ValueError(f"prune: the residuals before {place(layer + 1, num_layers)} are not finite")
        on_layer()
    return residuals


def _behind_head(family: Family, head: Head, residual_BTD: torch.Tensor, mask_BT: torch.Tensor | None, epsilon: float, generator: torch.Generator,
                 sums: _Sums) -> torch.Tensor:  # fmt: skip
    """The gradient at the residuals behind the last layer, [B, T, D]; padding's is zero."""
    residual_BTD = residual_BTD.detach().requires_grad_()
    with torch.enable_grad():
        normed_ND = real_tokens(normalised(residual_BTD, epsilon), mask_BT)
    pieces = normed_ND.detach().split(max(1, HEAD_NUMBERS // len(head.projection.weight)))
    gradient_ND = torch.cat([_at_head(family, head, piece, generator) for piece in pieces])
    sums.add(sums.num_layers, normed_ND.detach(), gradient_ND)
    return torch.autograd.grad(normed_ND, residual_BTD, gradient_ND)[0]


def _at_head(family: Family, head: Head, normed_ND: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradients [N, D] of −log p(y) at normalised residuals, y drawn from p."""
    folded_VD = head.projection.weight * (factors(family, head.norm.weight) / getattr(head.norm, "divisor", 1.0))
    p_NV = torch.softmax(normed_ND @ folded_VD.T, dim=-1)
    drawn_N1 = torch.multinomial(p_NV, 1, generator=generator)
    return p_NV.scatter_add_(1, drawn_N1, -torch.ones_like(p_NV[:, :1])) @ folded_VD


def _norm_of(block: nn.Module, family: Family, architecture: Architecture, layer: int) -> nn.Module:
    """The norm that a layer reads the stream through."""
    (name,) = [name for name in block.state_dict() if stream_role(family, row_of(family, architecture, f"layers.{layer}.{name}")) == NORM]
    return block.get_submodule(name.removesuffix(".weight"))


def _behind_layer(block: nn.Module, norm: nn.Module, inputs: Sequence[torch.Tensor],
                  behind: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """From the gradients behind a layer those at its inputs and at its norm's outputs, [B, T, D] for every batch; of a layer with experts for all at once,
    as run_layer does, and through one expert after another."""
    experts = experts_of(block)
    if experts is None:
        return tuple(map(list, zip(*map(partial(_through, block, norm), inputs, behind), strict=True)))
    before, experts.one_by_one = experts.one_by_one, True
    found = _through(block, norm, torch.cat(list(inputs)), torch.cat(list(behind)))
    experts.one_by_one = before
    return tuple(list(gradient.split([len(input_BTD) for input_BTD in inputs])) for gradient in found)


def _through(block: nn.Module, norm: nn.Module, input_BTD: torch.Tensor, behind_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From the gradient behind a layer those at its input and at its norm's output, [B, T, D]."""
    caught: list[torch.Tensor] = []
    handle = norm.register_forward_hook(lambda _module, _args, output: caught.append(output))
    with torch.enable_grad():
        input_BTD = input_BTD.float().requires_grad_()
        output_BTD = block(input_BTD)
    handle.remove()
    return torch.autograd.grad(output_BTD, [input_BTD, *caught], behind_BTD)
