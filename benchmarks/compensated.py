"""The compensated cut against the plain slice, on the tiny experiment's own cut: the loss that each adds, and the tokens that win it back.

The tiny experiment is walked up to its pruned student first, once per --runs folder. The same plan is then cut by every method from the
same base, and the losses are those of held-out rows that chose nothing. A second, harder cut of the same base stands beside it.
Both sides are then distilled with the experiment's own optimiser, each at its best learning rate of one grid, found with the
first seed. tokens_ratio is the smallest share of the tokens, each share with a schedule of its own, after which the compensated
student is no worse than the slice after all of them: median over the seeds, null where no share below 1 was enough.
What was measured lies in the --runs folder, by the key of the pruned student, and is not measured again; the same command beside it
with --backwards shares the work.
Run: .venv/bin/python benchmarks/compensated.py --runs DIR [--seeds 3] [--tokens 260000] [--rates 0.01 0.005 0.002 0.001]
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import Measured, Sides, walk_pipeline  # noqa: E402
from memory_budget.architecture import Architecture  # noqa: E402
from minitron.importance.scores import load_scores  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402
from minitron.pruning.compensate import Recipe  # noqa: E402
from minitron.pruning.plan import PruningPlan, make_plan  # noqa: E402

SHARES = (0.0, 0.1, 0.2, 0.3, 0.5)
RECIPES = {
    "rotation": Recipe(refit_reading=False, refit_writing=False),
    "rotation by variance": Recipe("variance", refit_reading=False, refit_writing=False),
    "rotation, reading": Recipe(refit_writing=False),
    "rotation, writing": Recipe(refit_reading=False),
    "reading, writing": Recipe(directions=None),
    "all, by variance": Recipe("variance"),
    "compensated": Recipe(),
}


@dataclass(frozen=True, slots=True)
class Walked:
    """What the tiny experiment left: folders of the base, of the teacher, of the data and of the scores, the chosen cut and its stage's key."""

    base: Path
    teacher: Path
    data: Path
    scores: Path
    architecture: Architecture
    kept_layers: tuple[int, ...]
    key: str


def walk(runs: Path) -> Walked:
    """`stage=prune` of the tiny experiment, in this folder's store."""
    summary = walk_pipeline(runs, "compensated", "stage=prune")
    folder = Path(summary["stages"]["prune"]["path"])
    store = folder.parent.parent
    plan = json.loads((folder / "plan.json").read_text())
    base = store / "distill" / summary["depth_lap"]["stages"]["distill"]["key"]
    teacher, data = Path(summary["models"]["teacher"]["path"]), Path(summary["stages"]["data"]["path"])
    scores = Path(summary["stages"]["score"]["path"]) / "scores.safetensors"
    return Walked(base / "checkpoint", teacher, data, scores, Architecture(**plan["student"]), tuple(plan["kept_layers"]), folder.name)


def harder(student: Architecture) -> Architecture:
    """Two thirds of the hidden width again, and half of the neurons."""
    return replace(student, hidden=student.hidden * 2 // 3, ffn=student.ffn // 2)


def measure_damage(sides: Sides, plan: PruningPlan, measured: Measured) -> dict[str, float]:
    """Nats per token that each method adds to the base's held-out loss."""
    student, teacher = plan.student, plan.teacher
    sizes = (f"{student.hidden} of {teacher.hidden} hidden, {student.ffn} of {teacher.ffn} neurons, {student.mamba_num_heads} of "
             f"{teacher.mamba_num_heads} Mamba heads")  # fmt: skip
    base = measured.get("base", lambda: sides.loss(sides.model))
    print(f"\n{sizes}; base {base:.3f} nats/token", flush=True)
    makers = {"slice": lambda: sides.sliced(plan)} | {name: lambda recipe=recipe: sides.compensated(plan, recipe) for name, recipe in RECIPES.items()}
    added = {}
    for name, make in makers.items():
        added[name] = measured.get(f"{sizes}: {name}", lambda make=make: sides.loss(make())) - base
        print(f"  {name:20}{added[name]:+8.4f} nats/token {added[name] / added['slice']:8.3f} of the slice's", flush=True)
    return added


def best_rate(losses: dict[float, float]) -> float:
    return min(losses, key=losses.get)


class Distilled:
    """Held-out losses of both sides after so many tokens, at a rate, with a seed."""

    def __init__(self, sides: Sides, plan: PruningPlan, measured: Measured):
        self.sides, self.measured = sides, measured
        makers = {"slice": lambda: sides.sliced(plan), "compensated": lambda: sides.compensated(plan, Recipe())}
        self.start = {name: cache(partial(_with_state, make)) for name, make in makers.items()}

    def loss(self, name: str, tokens: int, rate: float, seed: int) -> float:
        def trained() -> float:
            student, state = self.start[name]()
            student.load_state_dict(state)
            return self.sides.trained(student, tokens, rate, seed)

        return self.measured.get(f"{name}, {tokens} tokens, rate {rate:g}, seed {seed}", trained)


def _with_state(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    student = make()
    return student, {name: value.clone() for name, value in student.state_dict().items()}


def measure_tokens(distilled: Distilled, options) -> dict:
    """Held-out losses of both sides after every share of the tokens, per seed, each at its best rate."""
    results: dict[str, dict[float, list[float]]] = {"slice": {}, "compensated": {}}
    rates: dict[str, dict[float, float]] = {"slice": {}, "compensated": {}}
    work = [("slice", 1.0), *(("compensated", share) for share in (*SHARES, 1.0))]
    for name, share in reversed(work) if options.backwards else work:
        tokens = int(options.tokens * share)
        found = {rate: distilled.loss(name, tokens, rate, 0) for rate in (options.rates if share else options.rates[:1])}
        rate = rates[name][share] = best_rate(found)
        losses = results[name][share] = [found[rate], *(distilled.loss(name, tokens, rate, seed) for seed in range(1, options.seeds))]
        tried = ", ".join(f"{key:g}: {value:.4f}" for key, value in found.items())
        print(f"  {name:14}{tokens:>9,} tokens  rate {rate:<7g}{' '.join(f'{loss:.4f}' for loss in losses)}   (first seed at {tried})", flush=True)
    return {"results": results, "rates": rates}


def tokens_ratio(results: dict[str, dict[float, list[float]]]) -> float | None:
    """The median over seeds of the smallest share whose loss is at most the slice's after all tokens."""
    shares = [min((share for share, losses in results["compensated"].items() if losses[seed] <= wanted), default=float("inf"))
              for seed, wanted in enumerate(results["slice"][1.0])]  # fmt: skip
    middle = statistics.median(shares)
    return middle if middle < 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder for the walk's store; goes on where it was")
    parser.add_argument("--seeds", type=int, default=3, help="orders of the training rows")
    parser.add_argument("--tokens", type=int, default=260_000, help="of the slice's distillation; 260,000 are those of the tiny experiment")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.005, 0.002, 0.001], help="the grid of learning rates, the same for both sides")
    parser.add_argument("--backwards", action="store_true", help="distil in the other order, beside a process that does not")
    options = parser.parse_args()
    walked = walk(options.runs)
    dispatch.install()
    sides = Sides(walked.base, walked.teacher, walked.data)
    scores = load_scores(walked.scores, tokens="mean", samples="l2")
    plan = make_plan(sides.architecture, walked.architecture, walked.kept_layers, scores)
    measured = Measured(options.runs / "measured" / f"{walked.key}.jsonl")
    damage = measure_damage(sides, plan, measured)
    harder_damage = measure_damage(sides, make_plan(sides.architecture, harder(walked.architecture), walked.kept_layers, scores), measured)
    print(f"\nheld-out nats/token after distillation, {options.seeds} seeds")
    found = measure_tokens(Distilled(sides, plan, measured), options)
    results = found["results"]
    difference = statistics.mean(results["compensated"][1.0]) - statistics.mean(results["slice"][1.0])
    ratios = {"damage_ratio": damage["compensated"] / damage["slice"], "tokens_ratio": tokens_ratio(results), "final_loss_difference": difference}
    print(json.dumps({"benchmark": "compensated", "ratios": ratios, "damage": damage, "harder_damage": harder_damage, "tokens": options.tokens, **found}))


if __name__ == "__main__":
    main()
