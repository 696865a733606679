"""Experts dropped from the trained tiny mixture (benchmarks/tiny_moe): what a plain drop adds to the held-out loss, by every ranking, and what is left of
that in a compensated cut.

A quarter and a half of the experts of every layer go, ranked on calibration rows that a seed draws: by frequency, activation norm, REAP and at random; the
router chooses among those that stay. The compensated cut is that of the ranking by REAP, whole and by its parts. Both sides are then distilled on the same
tokens, each at the best of the rates. `over_plain` is what the compensated cut adds over what the plain drop of the same experts adds, the mean of the seeds;
`after` the loss of the compensated student less that of the plain one, after distillation.
What was measured lies in the --runs folder and is not measured again.
Run: .venv/bin/python benchmarks/moe.py --runs DIR [--seeds 3] [--rows 256] [--recipes compensated …] [--tokens 100000] [--rates 0.0015 0.0005]
"""

import argparse
import json
import statistics
import sys
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import FORWARD_BATCH, Measured, Sides, walk_pipeline  # noqa: E402
from minitron.families.base import EXPERT  # noqa: E402
from minitron.importance.activations import measure_width  # noqa: E402
from minitron.importance.scores import ImportanceScores, aggregate  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402
from minitron.pruning.plan import LOCAL_STEPS, PruningPlan, Recipe, make_plan  # noqa: E402
from minitron.settings.teachers import TRAINING_FILE  # noqa: E402
from minitron.text.samples import batches_of  # noqa: E402

TEACHER = Path(__file__).resolve().parent / "tiny_moe"
SHARES = (0.25, 0.5)  # of the experts, dropped
RANKINGS = ("frequency", "activation", "reap", "random")
OFF = {"refit_reading": False, "refit_writing": False, "refit_experts": False, "refit_shared": False}
COMPENSATED = {"local_steps": LOCAL_STEPS}
RECIPES = {"compensated": COMPENSATED, "closed form": {}, "experts in closed form": OFF | {"refit_experts": True},
           "shared in closed form": OFF | {"refit_shared": True},
           "experts, trained": OFF | COMPENSATED | {"refit_experts": True}}  # fmt: skip


class Mixture:
    """The teacher, rows drawn by a seed, and plans that drop experts by a ranking."""

    def __init__(self, sides: Sides, seed: int, rows: int):
        drawn = np.random.default_rng(seed).choice(len(sides.rows), rows, replace=False)
        self.sides, self.seed = sides, seed
        self.cut: dict[tuple[str, float], nn.Module] = {}
        self.calibration = batches_of(sides.rows[np.sort(drawn)], FORWARD_BATCH, "cpu")

    @cached_property
    def scores(self) -> ImportanceScores:
        return aggregate(measure_width(self.sides.placed, self.calibration))

    def plan(self, ranking: str, share: float) -> PruningPlan:
        teacher = self.sides.architecture
        scores = replace(self.scores, rank="reap" if ranking == "random" else ranking)
        if ranking == "random":
            drawn = np.random.default_rng(self.seed)
            scores = replace(scores, sites={site: drawn.random(value.shape) if site[0] == EXPERT else value for site, value in scores.sites.items()})
        student = replace(teacher, moe_num_experts=round(teacher.moe_num_experts * (1 - share)))
        return make_plan(teacher, student, tuple(range(teacher.num_layers)), scores)

    def added(self, ranking: str, share: float) -> float:
        """Nats per token that the plain drop adds."""
        return self.sides.loss(self.sides.sliced(self.plan(ranking, share))) - self.sides.loss(self.sides.model)

    def student(self, side: str, share: float) -> nn.Module:
        """The plain drop by REAP, or the compensated cut by a recipe; one of them is kept."""
        if (side, share) not in self.cut:
            plan = self.plan("reap", share)
            made = self.sides.sliced(plan) if side == "plain" else self.sides.compensated(plan, Recipe(**RECIPES[side]), self.calibration)
            self.cut = {(side, share): made}
        return self.cut[side, share]

    def compensated(self, recipe: str, share: float) -> float:
        return self.sides.loss(self.student(recipe, share)) - self.sides.loss(self.sides.model)

    def distilled(self, side: str, share: float, tokens: int, rate: float) -> float:
        """Held-out loss after so many tokens."""
        return self.sides.trained(deepcopy(self.student(side, share)), tokens, rate, self.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0015, 0.0005])
    options = parser.parse_args()
    dispatch.install()
    walked = walk_pipeline(options.runs, "data", "experiment=tiny", "device=cpu", "depth_lap.enabled=false", "stage=data")
    sides = Sides(TEACHER, TEACHER, Path(walked["stages"]["data"]["path"]))
    digest = json.loads((TEACHER / TRAINING_FILE).read_text())["digest"]
    kept = Measured(options.runs / f"moe-{digest}-{options.rows}.jsonl")
    result = {"benchmark": "moe", "rows": options.rows, "seeds": options.seeds, "base": kept.get("base", lambda: sides.loss(sides.model))}
    result["dropped"] = {f"{share:.0%}": measured(sides, kept, share, options) for share in SHARES}
    result["ratios"] = {f"over_plain_{name}": part["over_plain"] for name, part in result["dropped"].items()}
    print(json.dumps(result))


def measured(sides: Sides, kept: Measured, share: float, options: argparse.Namespace) -> dict[str, object]:
    """Everything of one share of the experts, means over the seeds."""
    mixtures, means = [Mixture(sides, seed, options.rows) for seed in range(options.seeds)], {}

    def mean(name: str, measure) -> float:
        values = [kept.get(f"{name} {share} seed {mixture.seed}", partial(measure, mixture)) for mixture in mixtures]
        means[name] = round(statistics.fmean(values), 4)
        print(f"{share:.0%} dropped: {name:24} {means[name]:8.4f}   {' '.join(f'{value:.4f}' for value in values)}", flush=True)
        return statistics.fmean(values)

    for ranking in RANKINGS:
        mean(f"plain {ranking}", lambda mixture, ranking=ranking: mixture.added(ranking, share))
    for recipe in dict.fromkeys(["compensated", *options.recipes]):
        mean(recipe, lambda mixture, recipe=recipe: mixture.compensated(recipe, share))
    found = {"added": means, "over_plain": round(means["compensated"] / means["plain reap"], 3)}
    if options.tokens:
        best = {}
        for side in ("plain", "compensated"):
            name = f"{side} after {options.tokens:,}"
            best[side] = min(mean(f"{name} at {rate:g}", lambda mixture, side=side, rate=rate: mixture.distilled(side, share, options.tokens, rate))
                             for rate in options.rates)  # fmt: skip
        found["after"] = round(best["compensated"] - best["plain"], 4)
    return found


if __name__ == "__main__":
    main()
