"""The students that benchmarks/claims.py compares, each made from a seed, and what is measured of them.

A seed stands for the calibration rows, the random choices and initialisations, and the order of the training rows; the teacher is one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import nn

from benchmarks.sides import FORWARD_BATCH, Measured, Sides
from distill.objectives import next_token_objective
from memory_budget.architecture import Architecture
from minitron.families.base import MAMBA_HEAD
from minitron.families.nemotron_h import FAMILY
from minitron.importance.activations import measure_width
from minitron.importance.layers import Block, SweepLimits, measure_round
from minitron.importance.removal import LayerRules, rank_iteratively, rank_once
from minitron.importance.scores import ImportanceScores, WidthSums, aggregate
from minitron.pruning.compensate import Recipe
from minitron.pruning.plan import FEED_FORWARD_STEPS, PruningPlan, make_plan
from minitron.text.samples import batches_of

WIDTH_ROWS, LAYER_ROWS, COMPENSATED_ROWS = 64, 16, 32  # conf's scoring.samples and layer_samples, the tiny experiment's screen.cut_samples
RULES = LayerRules(floors={"*": 2}, ceilings={})  # the tiny experiment's search.floors
RECIPE = Recipe(feed_forward_steps=FEED_FORWARD_STEPS)  # the default cut's
RATES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08)
FIRST_RATE = 0.005  # distill.train.learning_rate


@dataclass(frozen=True, slots=True)
class Student:
    """`name` says all that it is made of: what was measured of it is kept under that."""

    name: str
    build: Callable[[], nn.Module]


Side = Callable[[int], Student]  # of a seed


def group_blind(plan: PruningPlan, scores: ImportanceScores, *, by_score: bool = False) -> PruningPlan:
    """As many Mamba heads by the same scores, chosen over all groups at once and dealt to the student's groups in their old order.

    Where groups do not give the same number, some heads then read another group's B and C and share another group's norm.
    With `by_score` the best come first, as a sort leaves them, and land in whatever group.
    """
    heads = {}
    for layer in plan.units[MAMBA_HEAD]:
        best_first = np.argsort(-scores.mamba_heads(layer), kind="stable")[: plan.student.mamba_num_heads].tolist()
        heads[layer] = tuple(best_first if by_score else sorted(best_first))
    return replace(plan, units={**plan.units, MAMBA_HEAD: heads})


def moved_share(plan: PruningPlan) -> float:
    """The share of kept Mamba heads that are in another group than they were."""
    before, after = (sizes.mamba_num_heads // sizes.mamba_num_groups for sizes in (plan.teacher, plan.student))
    kept = plan.units[MAMBA_HEAD].values()
    return float(np.mean([head // before != position // after for heads in kept for position, head in enumerate(heads)]))


def kept_of(removed: Sequence[int], num_layers: int) -> tuple[int, ...]:
    return tuple(layer for layer in range(num_layers) if layer not in removed)


class Students:
    """Every way to a student of one teacher."""

    def __init__(self, sides: Sides, measured: Measured):
        self.sides, self.measured, self.teacher = sides, measured, sides.architecture
        self.width_sums, self.all_layers = cache(self.width_sums), tuple(range(self.teacher.num_layers))

    def rows(self, seed: int, number: int) -> list[torch.Tensor]:
        """Calibration rows of a seed."""
        chosen = np.random.default_rng([seed, number]).choice(len(self.sides.rows), number, replace=False)
        return batches_of(self.sides.rows[np.sort(chosen)], FORWARD_BATCH, "cpu")

    def width_sums(self, seed: int) -> WidthSums:
        return measure_width(self.sides.placed, self.rows(seed, WIDTH_ROWS))

    def scores(self, seed: int) -> ImportanceScores:
        return aggregate(self.width_sums(seed))

    def plan(self, seed: int, student: Architecture, kept: tuple[int, ...] | None = None) -> PruningPlan:
        return make_plan(self.teacher, student, kept or self.all_layers, self.scores(seed))

    def _cut(self, how: str, seed: int, student: Architecture, kept: tuple[int, ...] | None, make: Callable[[], nn.Module]) -> Student:
        sizes = f"hidden {student.hidden}, FFN {student.ffn}, {student.mamba_num_heads} heads"
        layers = " ".join(map(str, kept)) if kept else "all"
        only_depth = replace(self.teacher, pattern=student.pattern) == student
        return Student(f"{how} {sizes}, layers {layers}" + ("" if only_depth and how == "slice" else f", seed {seed}"), make)

    def sliced(self, seed: int, student: Architecture, kept: tuple[int, ...] | None = None) -> Student:
        return self._cut("slice", seed, student, kept, lambda: self.sides.sliced(self.plan(seed, student, kept)))

    def compensated(self, seed: int, student: Architecture, kept: tuple[int, ...] | None = None) -> Student:
        calibration = self.rows(seed, COMPENSATED_ROWS)
        return self._cut("compensated", seed, student, kept, lambda: self.sides.compensated(self.plan(seed, student, kept), RECIPE, calibration))

    def chosen_at_random(self, seed: int, student: Architecture) -> Student:
        """Units of every axis by chance; heads still as many from every group."""

        def build() -> nn.Module:
            generator = np.random.default_rng(seed)
            scores = ImportanceScores({site: generator.random(values.shape) for site, values in sorted(self.scores(seed).sites.items())})
            return self.sides.sliced(make_plan(self.teacher, student, self.all_layers, scores))

        return self._cut("random units", seed, student, None, build)

    def blind_plan(self, seed: int, student: Architecture, *, by_score: bool) -> PruningPlan:
        return group_blind(self.plan(seed, student), self.scores(seed), by_score=by_score)

    def group_blind(self, seed: int, student: Architecture, *, by_score: bool) -> Student:
        how = "group-blind by score" if by_score else "group-blind"
        return self._cut(how, seed, student, None, lambda: self.sides.sliced(self.blind_plan(seed, student, by_score=by_score)))

    def untrained(self, seed: int, student: Architecture) -> Student:
        def build() -> nn.Module:
            torch.manual_seed(seed)
            return FAMILY.build(FAMILY.hf_config(self.sides.config, student)).eval()

        return self._cut("untrained", seed, student, None, build)

    def removal_order(self, seed: int, number: int, *, iterative: bool) -> list[int]:
        """The first layers to go, by logits asked again after every removal (MSE, normalised) or by block influence."""
        pattern, target = self.teacher.pattern, self.teacher.num_layers - number

        def by_logits() -> list[int]:
            block = Block(self.rows(seed, LAYER_ROWS))
            ask = lambda kept, removable: measure_round(self.sides.placed, block, kept, removable, "mse", SweepLimits()).scores("mse", normalised=True)  # noqa: E731
            return [removal.layer for removal in rank_iteratively(pattern, target, RULES, ask)]

        if not iterative:
            return [removal.layer for removal in rank_once(pattern, target, RULES, dict(enumerate(self.width_sums(seed).block_influence)))]
        return self.measured.get(f"{number} layers by logits, seed {seed}", by_logits)

    def without(self, removed: Sequence[int]) -> tuple[Architecture, tuple[int, ...]]:
        """The teacher without these layers, and the layers that stay."""
        kept = kept_of(removed, self.teacher.num_layers)
        return replace(self.teacher, pattern="".join(self.teacher.pattern[layer] for layer in kept)), kept

    def widths(self, pattern: str) -> list[Architecture]:
        """The tiny experiment's space of widths at this pattern."""
        teacher = self.teacher
        step = teacher.mamba_num_groups
        hidden = range(-(-teacher.hidden * 5 // 8 // 16) * 16, teacher.hidden + 1, 16)
        ffn, heads = range(teacher.ffn // 2, teacher.ffn + 1, 64), range(-(-teacher.mamba_num_heads * 3 // 4 // step) * step, teacher.mamba_num_heads + 1, step)
        return [replace(teacher, pattern=pattern, hidden=d, ffn=f, mamba_num_heads=m) for d, f, m in product(hidden, ffn, heads)]


class Bench(Students):
    """Losses of students, before and after training, a list entry per seed."""

    def __init__(self, sides: Sides, measured: Measured, *, seeds: int, tokens: int):
        super().__init__(sides, measured)
        self.seeds, self.tokens = range(seeds), tokens
        self.rates: dict[str, float] = {}

    def untouched(self, side: Side) -> list[float]:
        """Held-out losses as they are cut."""
        return [self.measured.get(f"{student.name}: as it is", lambda build=student.build: self.sides.loss(build())) for student in map(side, self.seeds)]

    def trained(self, side: Side, seed: int, rate: float, *, on_text: bool = False) -> float:
        """Held-out loss after distillation, or after as many tokens of next-token training."""
        student, objective = side(seed), next_token_objective if on_text else None
        name = f"{student.name}: {self.tokens} tokens {'of text' if on_text else 'distilled'}, rate {rate:g}, order {seed}"
        return self.measured.get(name, lambda: self.sides.trained(student.build(), self.tokens, rate, seed + 1, objective))

    def tuned(self, label: str, side: Side, *, on_text: bool = False) -> list[float]:
        """The same for every seed, at the side's own best rate of the first seed."""
        rate = best_rate(lambda rate: self.trained(side, 0, rate, on_text=on_text))
        self.rates[label] = rate
        losses = [self.trained(side, seed, rate, on_text=on_text) for seed in self.seeds]
        print(f"  {label:48}rate {rate:<7g}{' '.join(f'{loss:.4f}' for loss in losses)}", flush=True)
        return losses


def best_rate(loss_at: Callable[[float], float], first: float = FIRST_RATE) -> float:
    """From a first rate up the grid, or else down it, for as long as the loss falls; so the best one has been passed on both sides."""
    found = RATES.index(first)
    for step in (1, -1):
        moved = False
        while 0 <= found + step < len(RATES) and loss_at(RATES[found + step]) < loss_at(RATES[found]):
            found, moved = found + step, True
        if moved:
            break
    return RATES[found]
