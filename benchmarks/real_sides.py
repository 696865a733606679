"""The arena's cuts and sides (real_model.py): what is cut, and who cuts it from the same calibration rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from benchmarks.rivals.linear_depth import chosen_run, ghosted, replaceme
from benchmarks.rivals.low_rank_clone import low_rank_clone
from benchmarks.rivals.slicegpt import slicegpt
from memory_budget.architecture import Architecture
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.placement import WholeModel
from minitron.families.base import FFN, Family
from minitron.families.state import load_tensors, model_tensors
from minitron.importance.activations import measure_width
from minitron.importance.scores import aggregate
from minitron.pruning.compensate import Recipe, build_compensated
from minitron.pruning.cut import build_pruned
from minitron.pruning.plan import FEED_FORWARD_STEPS, PruningPlan, make_plan
from minitron.text.samples import batches_of, spread_rows
from nas.depth import spelled

SCORED_ROWS, BATCH, CPU = 32, 4, torch.device("cpu")


@dataclass(frozen=True)
class Base:
    """A model to cut, and what is known of it."""

    family: Family
    model: nn.Module
    config: dict
    architecture: Architecture

    @property
    def placed(self) -> WholeModel:
        return WholeModel(self.family, self.model, self.architecture)

    @cached_property
    def untied(self) -> "Base":
        """The same function with a head of its own."""
        config = self.config | {"tie_word_embeddings": False}
        tensors = model_tensors(self.family, self.model)
        with torch.device("meta"):
            model = self.family.build(config)
        load_tensors(self.family, model, tensors | {"lm_head.weight": tensors["embeddings.weight"].clone()})
        return Base(self.family, model.eval(), config, replace(self.architecture, tied_embeddings=False))


class Calibration:
    """What every side is given: the base, and rows to calibrate on. Scores, of the plain slice's kind, are of 32 rows."""

    def __init__(self, base: Base, train_rows: np.ndarray, samples: int):
        self.base = base
        self.rows = batches_of(spread_rows(train_rows, samples), BATCH, CPU)
        self._scored = batches_of(spread_rows(train_rows, SCORED_ROWS), BATCH, CPU)

    @cached_property
    def width(self):
        return measure_width(self.base.placed, self._scored)

    def plan(self, cut: "Cut", base: Base | None = None) -> PruningPlan:
        """The units with the highest scores; of blocks those that go with the least influence, one measure of all, unless the cut names them."""
        teacher = (base or self.base).architecture
        gone = cut.blocks
        if isinstance(gone, int):
            gone = np.argsort(self.width.block_influence.numpy() if torch.is_tensor(self.width.block_influence) else self.width.block_influence)[:gone].tolist()
        kept = tuple(block for block in range(teacher.num_layers) if block not in gone)
        return make_plan(teacher, replace(teacher, pattern=spelled(teacher, kept), **cut.sizes), kept, aggregate(self.width))


@dataclass(frozen=True)
class Cut:
    """Sizes of the student, and blocks that go: how many, or which."""

    sizes: dict[str, int]
    blocks: int | tuple[int, ...] = ()


CUTS = {
    "hidden 504, FFN 1152": Cut({"hidden": 504, "ffn": 1152}),
    "FFN 1152": Cut({"ffn": 1152}),
    "FFN 768": Cut({"ffn": 768}),
    "4 of 30 blocks": Cut({}, 4),
    "6 of 30 blocks": Cut({}, 6),
    "2 of 3 KV groups": Cut({"num_key_value_heads": 2, "num_attention_heads": 6}),
}
Side = Callable[[Calibration, Cut], nn.Module]


def _plain(calibration: Calibration, cut: Cut, *, untied: bool = False) -> nn.Module:
    base = calibration.base.untied if untied else calibration.base
    return build_pruned(base.family, base.model, calibration.plan(cut, base), base.config)


def _ours(calibration: Calibration, cut: Cut, *, untied: bool = False, **changes: object) -> nn.Module:
    base = calibration.base.untied if untied else calibration.base
    plan = calibration.plan(cut, base)
    recipe = replace(Recipe(directions="loss" if untied else "variance", feed_forward_steps=FEED_FORWARD_STEPS), **changes)
    return build_compensated(base.placed, plan, calibration.rows, recipe, config=base.config)


def _run_removed(calibration: Calibration, cut: Cut) -> nn.Module:
    """Ours, without the blocks that ReplaceMe takes."""
    return _ours(calibration, replace(cut, blocks=tuple(chosen_run(calibration.base, _blocks(cut), calibration.rows))))


def _blocks(cut: Cut) -> int:
    if cut.sizes or not isinstance(cut.blocks, int):
        raise ValueError("cuts blocks alone")
    return cut.blocks


def _ffn_kept(calibration: Calibration, cut: Cut) -> dict | None:
    return calibration.plan(cut).units.get(FFN) if "ffn" in cut.sizes else None


def _hidden(cut: Cut) -> int:
    if "hidden" not in cut.sizes:
        raise ValueError("cuts hidden channels; this cut leaves all of them")
    return cut.sizes["hidden"]


def _slicegpt(calibration: Calibration, cut: Cut) -> nn.Module:
    return slicegpt(calibration.base, _hidden(cut), calibration.rows, ffn_kept=_ffn_kept(calibration, cut))[0]


def _slicegpt_as_small(calibration: Calibration, cut: Cut) -> nn.Module:
    """With as many hidden channels as the tied student's bytes have room for."""
    plan, hidden = calibration.plan(cut), _hidden(cut)
    room = count_total_parameters(plan.student)
    sizes = range(hidden - hidden % 9, 0, -9)  # which a Llama of 9 heads can have
    return next(model for size in sizes if _slicegpt_parameters(calibration.base.architecture, plan.student, size) <= room
                for model in [slicegpt(calibration.base, size, calibration.rows, ffn_kept=_ffn_kept(calibration, cut))[0]])  # fmt: skip


def _slicegpt_parameters(teacher: Architecture, student: Architecture, hidden: int) -> int:
    """Of a head of its own that reads all of the teacher's channels, and a matrix on each of two shortcuts a block, the last one to all channels."""
    small = replace(student, hidden=hidden, tied_embeddings=True)
    shortcuts = (2 * teacher.num_layers - 1) * hidden**2 + hidden * teacher.hidden
    return count_total_parameters(small) + student.vocab * teacher.hidden + shortcuts + small.ffn * (teacher.hidden - hidden)


def _clone(calibration: Calibration, cut: Cut, *, tied: bool = True) -> nn.Module:
    return low_rank_clone(calibration.base, _hidden(cut), calibration.rows, ffn_kept=_ffn_kept(calibration, cut), tied=tied)[0]


SIDES: dict[str, Side] = {
    "plain slice": _plain,
    "plain slice, own head": lambda calibration, cut: _plain(calibration, cut, untied=True),
    "ours": _ours,
    "ours, closed form": lambda calibration, cut: _ours(calibration, cut, feed_forward_steps=0),
    "ours, neurons by scores": lambda calibration, cut: _ours(calibration, cut, feed_forward_steps=0, choose_neurons=False),
    "ours, ridge 0.001": lambda calibration, cut: _ours(calibration, cut, feed_forward_steps=0, choose_neurons=False, ridge=1e-3),
    "ours, own head": lambda calibration, cut: _ours(calibration, cut, untied=True),
    "ours, ReplaceMe's blocks": _run_removed,
    "SliceGPT": _slicegpt,
    "SliceGPT, as small": _slicegpt_as_small,
    "Low-Rank Clone": _clone,
    "Low-Rank Clone, own head": lambda calibration, cut: _clone(calibration, cut, tied=False),
    "ReplaceMe": lambda calibration, cut: replaceme(calibration.base, _blocks(cut), calibration.rows)[0],
    "Ghosted Layers": lambda calibration, cut: ghosted(calibration.base, _blocks(cut), calibration.rows)[0],
}
