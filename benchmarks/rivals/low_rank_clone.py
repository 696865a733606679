"""Low-Rank Clone (Hao et al., arXiv 2505.12781): the student's matrices, embeddings among them, are the teacher's times trained projections of the hidden size.

Trained are the projections, one [D, K] for every matrix, and the norms' weights, for the teacher's logits and for its activations: what every query, key,
value, gate and up matrix gives is to be what the teacher's gives, and what o and down give to be the teacher's through the same projection, so that no
further matrices are needed to compare the two. Loss: KL + next token + clone_weight · mean squares. In the end the products are written out: an ordinary
Llama, tied where the base is (embeddings and head share a projection then, as in the authors' published commands), or not.

The paper leaves the FFN's width as it is. Where it is to be cut here, neurons are cut plainly first (`ffn_kept`); the clone of gate and up looks at those
that stay, that of down at the whole teacher's.

Not the paper's, whose students see 20 billion tokens: the start. Projections drawn at random (`start="random"`) are no model yet after thousands of tokens,
so by default they begin as one rotation to the principal directions of the normalised stream, norms' weights folded in (a tied head's stay in the norm: of the
bases of those directions the one is taken in which they are diagonal). Temperature and rate are arguments for the same reason; the authors' commands have
40, 1e-4 and a clone weight of 0.2. Surmised: mean squares are added up over matrices and layers.

B batch, T tokens, D hidden of the teacher, K of the student, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from benchmarks.rivals.projections import EMBEDDINGS, HEAD, Clone, begun, writes
from benchmarks.rivals.walks import check_calibration, check_hidden, check_llama, narrower, stored_parameters
from distill.chunked_loss import Head, LossRecipe, chunked_loss
from distill.losses import next_token_labels
from minitron.families.state import load_tensors

if TYPE_CHECKING:
    from benchmarks.real_sides import Base

NARROWED = ("gate_proj", "up_proj")
WATCHED = ("q_proj", "k_proj", "v_proj", *NARROWED, "o_proj", "down_proj")
STARTS = ("principal", "random")
Outputs = dict[str, torch.Tensor]


def low_rank_clone(base: Base, hidden: int, calibration: Sequence[torch.Tensor], *, ffn_kept: Mapping[int, Sequence[int]] | None = None,
                   tied: bool | None = None, passes: int = 1, rows_a_step: int = 1, rate: float = 3e-4, temperature: float = 1.0,
                   clone_weight: float = 0.2, start: str = "principal", seed: int = 0,
                   on_step: Callable[[float], None] = lambda _: None) -> tuple[nn.Module, int]:  # fmt: skip
    """The student of this hidden size after `passes` over the calibration rows, and how many parameters it stores. `ffn_kept` are the neurons that stay of
    every FFN sublayer (PruningPlan.units), `tied` None means as the base is. `on_step` hears each step's loss.

    Raises ValueError for what is no Llama, a size that a Llama cannot have, a tied student of an untied base, fewer tokens than the base has channels, no
    pass, or an unknown start.
    """
    tied = base.architecture.tied_embeddings if tied is None else tied
    _check(base, hidden, calibration, tied, passes, start)
    narrow = narrower(base, ffn_kept)
    clone = begun(base, narrow, hidden, calibration if start == "principal" else None, tied, seed)
    student = base.family.build(base.family.hf_config(narrow.config, replace(narrow.architecture, hidden=hidden, tied_embeddings=tied)))
    rows = [row_T[None] for ids_BT in calibration for row_T in ids_BT]
    batches = [torch.cat(rows[first : first + rows_a_step]) for first in range(0, len(rows), rows_a_step)] * passes
    learned = [*clone.projections.values(), *clone.norms.values()]
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warm, (len(batches) - step) / (len(batches) - warm + 1)))
    recipe = LossRecipe(temperature=temperature, cross_entropy_weight=0.5)
    with _watched(base, base.model) as taught, _watched(base, student) as own:
        measure = _losses(base, student, clone, taught, own, ffn_kept, recipe, clone_weight)
        for ids_BT in batches:
            loss = measure(ids_BT)
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            on_step(loss.item())
    load_tensors(base.family, student, {name: tensor.detach().clone() for name, tensor in clone.tensors().items()})
    return student.eval(), stored_parameters(student)


def _check(base: Base, hidden: int, calibration: Sequence[torch.Tensor], tied: bool, passes: int, start: str) -> None:
    check_llama(base, "Low-Rank Clone")
    check_hidden(base, hidden)
    check_calibration(calibration, base.architecture.hidden, "a projection of every channel")
    if tied and not base.architecture.tied_embeddings:
        raise ValueError("tied is true; the base has a head of its own, which one table cannot hold beside its embeddings: tied=False")
    if passes < 1:
        raise ValueError(f"passes is {passes}; it must be 1 or more")
    if start not in STARTS:
        raise ValueError(f"start is {start}; it must be one of {', '.join(STARTS)}")


def _losses(base: Base, student: nn.Module, clone: Clone, taught: Outputs, own: Outputs, ffn_kept: Mapping[int, Sequence[int]] | None, recipe: LossRecipe,
            clone_weight: float) -> Callable[[torch.Tensor], torch.Tensor]:  # fmt: skip
    """The loss of ids [B, T]: temperature²·KL + next token + clone_weight · (mean squares between what matrices give, added up)."""

    def wanted(name: str) -> torch.Tensor:
        if writes(name):
            return taught[name] @ clone.projections[name]
        layer, matrix = int(name.split(".")[1]), name.split(".")[-2]
        return taught[name][..., list(ffn_kept[layer])] if ffn_kept and matrix in NARROWED else taught[name]

    def loss(ids_BT: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher = Head(base.model.model(ids_BT, use_cache=False).last_hidden_state, base.model.lm_head.weight)
        tensors = clone.tensors()
        inside = {base.family.file_name(name).removeprefix("model."): tensor for name, tensor in tensors.items() if name != HEAD}
        hidden_BTK = functional_call(student.model, inside, (ids_BT,), {"use_cache": False}).last_hidden_state
        head = Head(hidden_BTK, tensors.get(HEAD, tensors[EMBEDDINGS]))
        logits = 2 * chunked_loss(head, teacher, recipe, labels_BT=next_token_labels(ids_BT)).loss
        return logits + clone_weight * sum(F.mse_loss(own[name], wanted(name)) for name in own)

    return loss


@contextmanager
def _watched(base: Base, model: nn.Module) -> Iterator[Outputs]:
    """What every matrix of the blocks gave in the model's last forward pass, by the matrix's canonical name."""
    found: Outputs = {}
    handles = []
    for path, module in model.named_modules():
        if path.split(".")[-1] in WATCHED:
            name = base.family.canonical_name(f"{path}.weight")
            handles.append(module.register_forward_hook(lambda _module, _inputs, output, name=name: found.__setitem__(name, output)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
