"""What the rivals share: what they refuse, the base's residual stream sublayer by sublayer, and a base with fewer layers or neurons.

B batch, T tokens, N tokens of all rows, D hidden. A block is two sublayers: attention, then FFN.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from minitron.families.base import FFN
from minitron.pruning.cut import build_pruned
from minitron.pruning.plan import PruningPlan
from nas.depth import spelled

if TYPE_CHECKING:
    from benchmarks.real_sides import Base


def check_llama(base: Base, method: str) -> None:
    """Raises ValueError for what is no Llama, or one with biases."""
    if base.family.model_type != "llama":
        raise ValueError(f"model_type is {base.family.model_type}; {method} is written here for llama")
    if biases := [name for name, _ in base.model.named_parameters() if name.endswith(".bias")]:
        raise ValueError(f"the base has {biases[0]}; {method} is written here for a Llama without biases")


def check_calibration(calibration: Sequence[torch.Tensor], needed: int, what: str) -> None:
    """Raises ValueError where tokens are fewer than `needed`, or padding is among them."""
    if any(bool((ids_BT < 0).any()) for ids_BT in calibration):
        raise ValueError("calibration has padded rows; rows here must be whole")
    if (tokens := sum(ids_BT.numel() for ids_BT in calibration)) < needed:
        raise ValueError(f"calibration has {tokens:,} tokens; {what} needs at least {needed:,}")


def check_hidden(base: Base, hidden: int) -> None:
    """Raises ValueError for a hidden size that the base cannot be cut to."""
    if not 0 < hidden <= base.architecture.hidden:
        raise ValueError(f"hidden is {hidden}; it must be from 1 to the base's {base.architecture.hidden}")
    student = replace(base.architecture, hidden=hidden)
    for coupling in base.family.couplings:
        if not coupling.holds(student, base.architecture):
            raise ValueError(f"hidden is {hidden}; a Llama needs {coupling}, with {student.num_attention_heads} query heads")


def stored_parameters(model: nn.Module) -> int:
    """All that a model stores: embeddings, head and extra matrices too, what is tied once."""
    return sum(parameter.numel() for parameter in model.parameters())


def residuals(base: Base, ids_BT: torch.Tensor) -> Iterator[torch.Tensor]:
    """The stream [B, T, D] before every sublayer and, last, before the head's norm."""
    parts = base.family.parts(base.model)
    stream_BTD = parts.embed(ids_BT)
    yield stream_BTD
    for sublayer in parts.layers:
        stream_BTD = sublayer(stream_BTD)
        yield stream_BTD


def narrower(base: Base, ffn_kept: Mapping[int, Sequence[int]] | None) -> Base:
    """The base with these neurons of its FFN sublayers alone, as the plain slice has them (PruningPlan.units[FFN]); itself when None. Raises ValueError
    where a sublayer is missing or widths differ."""
    if ffn_kept is None:
        return base
    teacher = base.architecture
    layers, widths = {layer for layer, mixer in enumerate(teacher.mixers) if mixer == "-"}, {len(kept) for kept in ffn_kept.values()}
    if set(ffn_kept) != layers or len(widths) != 1:
        raise ValueError(f"ffn_kept has sublayers {sorted(ffn_kept)} and widths {sorted(widths)}; it must have every FFN sublayer, all of one width")
    student = replace(teacher, ffn=widths.pop())
    plan = PruningPlan(teacher, student, tuple(range(teacher.num_layers)), {FFN: {layer: tuple(kept) for layer, kept in ffn_kept.items()}})
    model = build_pruned(base.family, base.model, plan, base.config)
    return replace(base, model=model, config=base.family.hf_config(base.config, student), architecture=student)


def shallower(base: Base, removed: Collection[int]) -> nn.Module:
    """A model of the base's class without some blocks."""
    kept = tuple(block for block in range(base.architecture.num_layers) if block not in removed)
    student = replace(base.architecture, pattern=spelled(base.architecture, kept))
    return build_pruned(base.family, base.model, PruningPlan(base.architecture, student, kept, {}), base.config)


def turned_readers(weight_D: torch.Tensor, basis_DK: torch.Tensor) -> tuple[torch.Tensor, float]:
    """diag(w)·Q [D, K], by which the readers behind a norm of weights w are multiplied, with the number that the student's norm has in w's stead.

    Any number will do if readers are divided by it; w's root mean square leaves them as large as they were, so that Adam's steps suit them.
    """
    number = weight_D.square().mean().sqrt().item()
    return weight_D[:, None] / number * basis_DK, number
