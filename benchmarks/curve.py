"""How long a better start lasts: held-out loss against tokens of distillation, on the tiny experiment's own cut of a hybrid.

Two starts, the plain slice and the compensated cut of the same plan, and two losses: forward KL, and with it in the first fifth of the steps the mean square
between the teacher's last normed hidden states and the student's, taken through one linear map that is fitted to the start and then stays. Every budget is a
run of its own with its own schedule; each pair of start and loss at the better of two rates, found with the first seed (beyond 260,000 tokens: the better
one there). tokens_ratio of a budget is how many times fewer tokens the compensated start needs for what the slice has after it, read off its own curve
between budgets on logarithms.
What was measured is kept, a line each, in curve.jsonl beside this file, so that sittings add up.
Run: .venv/bin/python benchmarks/curve.py --runs DIR [--budgets 10000 50000 …] [--seeds 3] [--sides NAME …]
"""

import argparse
import copy
import json
import math
import statistics
import sys
from functools import cache
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.compensated import walk  # noqa: E402
from benchmarks.sides import BATCH, Measured, Sides  # noqa: E402
from distill.objectives import LossFunction, head_of  # noqa: E402
from minitron.importance.scores import load_scores  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402
from minitron.pruning.plan import FEED_FORWARD_STEPS, PruningPlan, Recipe, make_plan  # noqa: E402

KEPT = Path(__file__).resolve().with_name("curve.jsonl")
BUDGETS = (10_000, 50_000, 260_000, 2_000_000)
RATES = {"slice": (0.005, 0.002), "compensated": (0.002, 0.001)}
RATED = 260_000  # tokens of the longest budget that is tried at both rates
EARLY, WEIGHT, FITTED_ROWS = 0.2, 1.0, 32
SIDES = ("slice, KL", "compensated, KL", "slice, hidden states early", "compensated, hidden states early")


class Curve:
    """Held-out losses by start, loss, budget, rate and seed."""

    def __init__(self, sides: Sides, plan: PruningPlan, kept: Measured):
        self.sides, self.kept = sides, kept
        makers = {"slice": lambda: sides.sliced(plan), "compensated": lambda: sides.compensated(plan, Recipe(feed_forward_steps=FEED_FORWARD_STEPS))}
        self.starts = {name: cache(make) for name, make in makers.items()}

    def losses(self, side: str, tokens: int, seeds: int) -> list[float]:
        """By seed, at the better rate of the first seed."""
        rate = min(RATES[side.partition(",")[0]], key=lambda rate: self.loss(side, min(tokens, RATED), rate, 0))
        return [self.loss(side, tokens, rate, seed) for seed in range(seeds)]

    def loss(self, side: str, tokens: int, rate: float, seed: int) -> float:
        start, _, how = side.partition(", ")

        def trained() -> float:
            student = copy.deepcopy(self.starts[start]()).requires_grad_(True)
            objective = self.sides.from_teacher if how == "KL" else self._with_hidden_states(student, tokens)
            return self.sides.trained(student, tokens, rate, seed, objective)

        return self.kept.get(f"{side} | {tokens:,} | {rate:g} | {seed}", trained)

    @torch.no_grad()
    def _with_hidden_states(self, student: nn.Module, tokens: int) -> LossFunction:
        rows_BT = torch.from_numpy(self.sides.rows[:FITTED_ROWS].astype("int64"))
        own_NK, wanted_ND = (head_of(model.eval(), rows_BT).hidden_BTD.flatten(0, 1) for model in (student, self.sides.teacher))
        map_KD, scale = torch.linalg.lstsq(own_NK, wanted_ND).solution, wanted_ND.square().mean()
        steps, last = 0, EARLY * tokens / (BATCH * self.sides.rows.shape[1])

        def loss(model: nn.Module, rows_BT: torch.Tensor) -> dict[str, torch.Tensor]:
            nonlocal steps
            means, steps = self.sides.from_teacher(model, rows_BT), steps + 1
            if steps <= last:
                with torch.no_grad():
                    wanted_BTD = head_of(self.sides.teacher, rows_BT).hidden_BTD
                off_BTD = head_of(model, rows_BT).hidden_BTD @ map_KD - wanted_BTD
                means["loss"] = means["loss"] + WEIGHT * off_BTD.square().mean() / scale
            return means

        return loss


def tokens_for(curve: dict[int, float], wanted: float) -> float | None:
    """After how many tokens a curve has come down to a loss; None where it does not within its budgets."""
    points = sorted(curve.items())
    if points[0][1] <= wanted:
        return points[0][0]
    for (before, high), (after, low) in zip(points, points[1:], strict=False):
        if low <= wanted:
            share = (high - wanted) / (high - low)
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return None


def ratios(curves: dict[str, dict[int, list[float]]]) -> dict[str, float | None]:
    """By loss and budget, the median over seeds."""
    found = {}
    for how in ("KL", "hidden states early"):
        plain, ours = (curves.get(f"{start}, {how}", {}) for start in ("slice", "compensated"))
        for budget in plain:
            needed = [tokens_for({tokens: losses[seed] for tokens, losses in ours.items() if tokens <= budget}, wanted)
                      for seed, wanted in enumerate(plain[budget])] if budget in ours else [None]  # fmt: skip
            found[f"{how}, {budget:,}"] = None if None in needed else budget / statistics.median(needed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder for the walk's store; goes on where it was")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--seeds", type=int, default=3, help="orders of the training rows")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--kept", type=Path, default=KEPT, help="file of what was measured")
    options = parser.parse_args()
    walked = walk(options.runs)
    dispatch.install()
    sides = Sides(walked.base, walked.teacher, walked.data)
    scores = load_scores(walked.scores, tokens="mean", samples="l2")
    curve = Curve(sides, make_plan(sides.architecture, walked.architecture, walked.kept_layers, scores), Measured(options.kept))
    curves: dict[str, dict[int, list[float]]] = {side: {} for side in options.sides}
    for budget in sorted(options.budgets):
        for side in options.sides:
            curves[side][budget] = losses = curve.losses(side, budget, options.seeds)
            print(f"{side:<36}{budget:>10,} tokens  {' '.join(f'{loss:.4f}' for loss in losses)}", flush=True)
    print(json.dumps({"benchmark": "curve", "ratios": ratios(curves), "curves": curves}))


if __name__ == "__main__":
    main()
