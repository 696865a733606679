"""The compensated cut against the plain slice, on the tiny experiment's own cut: the loss that each adds, and the tokens that win it back.

The tiny experiment is walked up to its pruned student first, once per --runs folder. The same plan is then cut by every method from the
same base, and the losses are those of held-out rows that chose nothing. A second, harder cut of the same base stands beside it.
Both sides are then distilled with the experiment's own optimiser, each at its best learning rate of one grid, found with the
first seed. tokens_ratio is the smallest share of the tokens, each share with a schedule of its own, after which the compensated
student is no worse than the slice after all of them: median over the seeds, null where no share below 1 was enough.
Run: .venv/bin/python benchmarks/compensated.py --runs DIR [--seeds 3] [--tokens 260000] [--rates 0.01 0.005 0.002 0.001]
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import Sides, walk_pipeline  # noqa: E402
from memory_budget.architecture import Architecture  # noqa: E402
from minitron.families import ssd  # noqa: E402
from minitron.importance.scores import load_scores  # noqa: E402
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
    """What the tiny experiment left: folders of the base, of the teacher, of the data and of the scores, and the chosen cut."""

    base: Path
    teacher: Path
    data: Path
    scores: Path
    architecture: Architecture
    kept_layers: tuple[int, ...]


def walk(runs: Path) -> Walked:
    """`stage=prune` of the tiny experiment, in this folder's store."""
    summary = walk_pipeline(runs, "compensated", "stage=prune")
    folder = Path(summary["stages"]["prune"]["path"])
    inputs = json.loads((folder / "done.json").read_text())["inputs"]
    store = folder.parent.parent
    plan = json.loads((folder / "plan.json").read_text())
    base = store / "distill" / summary["depth_lap"]["stages"]["distill"]["key"]
    return Walked(base / "checkpoint", Path(summary["models"]["teacher"]["path"]), Path(summary["stages"]["data"]["path"]),
                  store / "score" / inputs["score"] / "scores.safetensors", Architecture(**plan["student"]), tuple(plan["kept_layers"]))  # fmt: skip


def harder(student: Architecture) -> Architecture:
    """Two thirds of the hidden width again, and half of the neurons."""
    return replace(student, hidden=student.hidden * 2 // 3, ffn=student.ffn // 2)


def measure_damage(sides: Sides, plan: PruningPlan) -> dict[str, float]:
    """Nats per token that each method adds to the base's held-out loss."""
    base = sides.loss(sides.model)
    added = {"slice": sides.loss(sides.sliced(plan)) - base}
    print(f"\n{plan.student.hidden} of {plan.teacher.hidden} hidden, {plan.student.ffn} of {plan.teacher.ffn} neurons, {plan.student.mamba_num_heads} of "
          f"{plan.teacher.mamba_num_heads} Mamba heads; base {base:.3f} nats/token", flush=True)  # fmt: skip
    for name, recipe in RECIPES.items():
        added[name] = sides.loss(sides.compensated(plan, recipe)) - base
    for name, value in added.items():
        print(f"  {name:20}{value:+8.4f} nats/token {value / added['slice']:8.3f} of the slice's", flush=True)
    return added


def best_rate(losses: dict[float, float]) -> float:
    return min(losses, key=losses.get)


def measure_tokens(sides: Sides, plan: PruningPlan, options) -> dict:
    """Held-out losses of both sides after every share of the tokens, per seed, each at its best rate."""
    makers: dict[str, Callable[[], nn.Module]] = {"slice": lambda: sides.sliced(plan), "compensated": lambda: sides.compensated(plan, Recipe())}
    results: dict[str, dict[float, list[float]]] = {"slice": {}, "compensated": {}}
    rates: dict[str, dict[float, float]] = {"slice": {}, "compensated": {}}
    for name, share in [("slice", 1.0), *(("compensated", share) for share in (*SHARES, 1.0))]:
        made, tokens = makers[name](), int(options.tokens * share)
        state = {key: value.clone() for key, value in made.state_dict().items()}

        def after(rate: float, seed: int, made=made, state=state, tokens=tokens) -> float:
            made.load_state_dict(state)
            return sides.trained(made, tokens, rate, seed)

        found = {rate: after(rate, 0) for rate in (options.rates if share else options.rates[:1])}
        rate = rates[name][share] = best_rate(found)
        losses = results[name][share] = [found[rate], *(after(rate, seed) for seed in range(1, options.seeds))]
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
    options = parser.parse_args()
    walked = walk(options.runs)
    ssd.install()
    sides = Sides(walked.base, walked.teacher, walked.data)
    scores = load_scores(walked.scores, tokens="mean", samples="l2")
    plan = make_plan(sides.architecture, walked.architecture, walked.kept_layers, scores)
    damage = measure_damage(sides, plan)
    harder_damage = measure_damage(sides, make_plan(sides.architecture, harder(walked.architecture), walked.kept_layers, scores))
    print(f"\nheld-out nats/token after distillation, {options.seeds} seeds")
    measured = measure_tokens(sides, plan, options)
    results = measured["results"]
    difference = statistics.mean(results["compensated"][1.0]) - statistics.mean(results["slice"][1.0])
    ratios = {"damage_ratio": damage["compensated"] / damage["slice"], "tokens_ratio": tokens_ratio(results), "final_loss_difference": difference}
    print(json.dumps({"benchmark": "compensated", "ratios": ratios, "damage": damage, "harder_damage": harder_damage, "tokens": options.tokens, **measured}))


if __name__ == "__main__":
    main()
