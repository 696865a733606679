"""SliceGPT (Ashkboos et al., arXiv 2401.15024): every block's stream in its own principal directions, the last of which are left out.

With the norms' weights folded into what reads behind them, an RMSNorm does not see an orthogonal matrix, so the stream before each norm may be written in
a basis of its own: the principal directions of what the calibration rows leave there, in the model that is sliced up to there already. Readers become
W·diag(w)·Q, writers Qᵀ·W, and the shortcut past a sublayer, whose two ends have different bases, gets a matrix Q_nextᵀ·Q of its own. The class of Llama has
no place for these, and their 2 matrices a block are parameters as all others. Embeddings are E·Q_first and the head is H·diag(w)·Q_last, so no student is tied.

As in the authors' published program sums are of the stream as it is (`normalised` takes the norm's output, as the paper's formulas have it) and the head's
input is left whole (`slice_head` slices it too). Not done: their damping of the sums, which moves no direction. Beyond the paper: every norm keeps a number
for each channel, so that readers are as large as the base's and the student can be trained; neurons may be cut plainly before.

B batch, T tokens, N tokens of all rows, D hidden of the base, K of the student at a place.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.rivals.walks import check_calibration, check_hidden, check_llama, narrower, stored_parameters, turned_readers
from minitron.families.state import load_tensors, model_tensors

if TYPE_CHECKING:
    from benchmarks.real_sides import Base

ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
TIED = "tied is true; SliceGPT turns embeddings by the first basis and the head by the last norm's weights and basis, so one table cannot be both: tied=False"


class SlicedBlock(nn.Module):
    """A Llama's block with a matrix on each of its two shortcuts."""

    def __init__(self, block: nn.Module, past_attention: torch.Tensor, past_ffn: torch.Tensor):
        super().__init__()
        self.block = block
        self.past_attention, self.past_ffn = nn.Parameter(past_attention), nn.Parameter(past_ffn)

    def forward(self, stream_BTK: torch.Tensor, **how) -> torch.Tensor:
        block = self.block
        middle_BTK = stream_BTK @ self.past_attention.t() + block.self_attn(hidden_states=block.input_layernorm(stream_BTK), **how)[0]
        return middle_BTK @ self.past_ffn.t() + block.mlp(block.post_attention_layernorm(middle_BTK))


@torch.no_grad()
def slicegpt(base: Base, hidden: int, calibration: Sequence[torch.Tensor], *, ffn_kept: Mapping[int, Sequence[int]] | None = None, tied: bool = False,
             slice_head: bool = False, normalised: bool = False) -> tuple[nn.Module, int]:  # fmt: skip
    """The student of this hidden size, and how many parameters it stores. `ffn_kept` are the neurons that stay of every FFN sublayer (PruningPlan.units).

    Raises ValueError for what is no Llama, a tied student, a hidden size that a Llama cannot have, or fewer tokens than the base has channels.
    """
    check_llama(base, "SliceGPT")
    if tied:
        raise ValueError(TIED)
    check_hidden(base, hidden)
    check_calibration(calibration, base.architecture.hidden, "a principal direction for every channel")
    base = narrower(base, ffn_kept)
    bases = sliced_bases(base, [hidden] * base.architecture.num_sublayers + [hidden if slice_head else base.architecture.hidden], calibration, normalised)
    model = _empty(base, bases)
    load_tensors(base.family, model, _tensors(base, bases))
    shortcuts = [(following.t() @ own).float() for own, following in itertools.pairwise(bases)]
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = SlicedBlock(block, *shortcuts[2 * number : 2 * number + 2])
    return model.eval(), stored_parameters(model)


def sliced_bases(base: Base, widths: Sequence[int], calibration: Sequence[torch.Tensor], normalised: bool) -> list[torch.Tensor]:
    """The directions [D, K] kept before every sublayer and the head, orthonormal, float64, each found in the model that is sliced so far."""
    parts, bases = base.family.parts(base.model), []
    streams = [parts.embed(ids_BT) for ids_BT in calibration]
    for sublayer, width in zip([*parts.layers, None], widths, strict=True):
        found_DD = sum(_moment(stream_BTD, normalised) for stream_BTD in streams)
        kept_DK = torch.linalg.eigh(found_DD).eigenvectors.flip(1)[:, :width].contiguous()
        bases.append(kept_DK)
        onto_DD = (kept_DK @ kept_DK.t()).float()
        streams = [stream_BTD @ onto_DD for stream_BTD in streams]
        if sublayer is not None:
            streams = [sublayer(stream_BTD) for stream_BTD in streams]
    return bases


def _moment(stream_BTD: torch.Tensor, normalised: bool) -> torch.Tensor:
    stream_ND = stream_BTD.flatten(0, 1).double()
    if normalised:
        stream_ND = stream_ND * stream_ND.square().mean(1, keepdim=True).rsqrt()
    return stream_ND.t() @ stream_ND


def _empty(base: Base, bases: Sequence[torch.Tensor]) -> nn.Module:
    """A Llama of the student's sizes without numbers. Its norms divide by the length of K channels as if they were D: what was left out counts as nothing."""
    config = base.family.hf_config(base.config, replace(base.architecture, hidden=bases[0].shape[1], tied_embeddings=False))
    with torch.device("meta"):
        model = base.family.build(config)
        width, norm = bases[-1].shape[1], type(model.model.norm)
        model.model.norm = norm(width, eps=model.model.norm.variance_epsilon)
        model.lm_head = nn.Linear(width, base.architecture.vocab, bias=False)
        model.model.layers[-1].mlp.down_proj = nn.Linear(base.architecture.ffn, width, bias=False)
    for module in model.modules():
        if isinstance(module, norm):
            module.variance_epsilon *= base.architecture.hidden / module.weight.numel()
    return model


def _tensors(base: Base, bases: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student's tensors by canonical names."""
    old = {name: tensor.double() for name, tensor in model_tensors(base.family, base.model).items()}
    new = {"embeddings.weight": old["embeddings.weight"] @ bases[0]}

    def read(norm: str, site: int, matrices: Mapping[str, str]) -> None:
        turned_DK, number = turned_readers(old[norm], bases[site])
        width = bases[site].shape[1]
        new[norm] = torch.full((width,), number * (width / base.architecture.hidden) ** -0.5)
        new.update({target: old[source] @ turned_DK for target, source in matrices.items()})

    for layer, mixer in enumerate(base.architecture.mixers):
        readers, writer = (ATTENTION, "o_proj") if mixer == "*" else (FEED_FORWARD, "down_proj")
        read(f"layers.{layer}.norm.weight", layer, {name: name for name in (f"layers.{layer}.mixer.{reader}.weight" for reader in readers)})
        new[f"layers.{layer}.mixer.{writer}.weight"] = bases[layer + 1].t() @ old[f"layers.{layer}.mixer.{writer}.weight"]
    read("norm_f.weight", len(bases) - 1, {"lm_head.weight": "embeddings.weight" if base.architecture.tied_embeddings else "lm_head.weight"})
    return {name: tensor.float() for name, tensor in new.items()}
