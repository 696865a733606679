"""The field's claims about pruning and distillation, in miniature: every one as paired differences of held-out loss over seeds.

The teacher is the tiny experiment's, which comes with the package. Students are cut
from it and trained in this process with the experiment's own optimiser; each side at its own best learning rate, found on the first seed by
walking a grid from the experiment's rate for as long as the loss falls. A gain is what the claim's side is better by, in nats per token: the
mean over seeds with its 95 % interval by Student's t. A claim holds where the interval lies above 0, does not hold where it lies below,
and is not decided where it holds 0. What a seed stands for: see claim_students.py.
Run: .venv/bin/python benchmarks/claims.py --runs DIR [--claims NAME …] [--seeds 3] [--tokens 16384]
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.claim_students import Bench, Side, moved_share  # noqa: E402
from benchmarks.ladder import kendall  # noqa: E402
from benchmarks.sides import Measured, Sides, walk_pipeline  # noqa: E402
from memory_budget.architecture import Architecture  # noqa: E402
from memory_budget.calculator import memory_report  # noqa: E402
from memory_budget.parameters import count_total_parameters  # noqa: E402
from memory_budget.workload import Workload  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402

WORKLOAD = Workload(context_tokens=4096, batch=1)  # the tiny experiment's
REMOVED = (3, 6)  # layers, of 21; the last one is what widths are held against
HELD_OUT_ROWS = 48  # 12,288 tokens, the same for all
MOST_TRIED = 12  # widths of one size that are ranked by zero-shot loss
# Quantiles of Student's t at 97.5 % for 1, 2, … degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Losses of the side that a claim says is lower, and of the other, a seed each."""

    text: str
    claimed: Sequence[float]
    other: Sequence[float]

    @property
    def gains(self) -> list[float]:
        return [other - claimed for claimed, other in zip(self.claimed, self.other, strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval, by Student's t of n − 1 degrees of freedom (Student 1908)."""
    return statistics.mean(values), T_QUANTILES[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5


def verdict(mean: float, half: float) -> str:
    if abs(mean) <= half:
        return "not decided"
    return "holds" if mean > 0 else "does not hold"


def both(bench: Bench, text: str, claimed: tuple[str, Side], other: tuple[str, Side]) -> Iterator[Comparison]:
    """Two sides as they are cut, and distilled."""
    yield Comparison(f"{text}, as cut", bench.untouched(claimed[1]), bench.untouched(other[1]))
    if bench.tokens:
        yield Comparison(f"{text}, distilled", bench.tuned(*claimed), bench.tuned(*other))


def standard(bench: Bench) -> Architecture:
    """The cut that most claims are about: the tiny experiment's narrowest widths but for hidden, all layers."""
    teacher = bench.teacher
    return replace(teacher, hidden=teacher.hidden * 3 // 4, ffn=teacher.ffn // 2, mamba_num_heads=teacher.mamba_num_heads * 3 // 4)


def sliced(bench: Bench, student: Architecture | None = None, kept: tuple[int, ...] | None = None) -> Side:
    return lambda seed: bench.sliced(seed, student or standard(bench), kept)


def compensated_cut(bench: Bench, student: Architecture | None = None, kept: tuple[int, ...] | None = None) -> Side:
    return lambda seed: bench.compensated(seed, student or standard(bench), kept)


def distillation(bench: Bench) -> Iterator[Comparison]:
    on_text = bench.tuned("slice, trained on text", sliced(bench), on_text=True)
    yield Comparison("distillation < next-token training", bench.tuned("slice", sliced(bench)), on_text)


def importance(bench: Bench) -> Iterator[Comparison]:
    random = lambda seed: bench.chosen_at_random(seed, standard(bench))  # noqa: E731
    yield from both(bench, "important units < random units", ("slice", sliced(bench)), ("random units", random))


def groups(bench: Bench) -> Iterator[Comparison]:
    """Half of the Mamba heads and nothing else."""
    student = replace(bench.teacher, mamba_num_heads=bench.teacher.mamba_num_heads // 2)
    for label, by_score in (("blind", False), ("blind, by score", True)):
        moved = statistics.mean(moved_share(bench.blind_plan(seed, student, by_score=by_score)) for seed in bench.seeds)
        print(f"  heads {label}: {moved:.1%} of those kept stand in another group", flush=True)
        side: Side = lambda seed, by_score=by_score: bench.group_blind(seed, student, by_score=by_score)  # noqa: E731
        yield from both(bench, f"group-aware heads < {label}", ("half the heads, aware", sliced(bench, student)), (f"half the heads, {label}", side))


def depth_order(bench: Bench) -> Iterator[Comparison]:
    def side(number: int, *, iterative: bool) -> tuple[str, Side]:
        order = lambda seed: bench.removal_order(seed, REMOVED[-1], iterative=iterative)[:number]  # noqa: E731
        return f"{number} layers, {'iterative' if iterative else 'block influence'}", lambda seed: bench.sliced(seed, *bench.without(order(seed)))

    for number in REMOVED:
        yield from both(bench, f"iterative < block influence, {number} layers", side(number, iterative=True), side(number, iterative=False))


def depth_cut(bench: Bench, number: int) -> tuple[Architecture, tuple[int, ...]]:
    """By the first seed's order, so that all seeds have one size to match."""
    return bench.without(bench.removal_order(0, REMOVED[-1], iterative=True)[:number])


def of_size(architectures: Sequence[Architecture], size: Callable[[Architecture], int], wanted: int, within: float = 0.01) -> list[Architecture]:
    """Those whose size is the one wanted to within a share of it, the nearest first; the nearest alone where there is none."""
    nearest = sorted(architectures, key=lambda one: abs(size(one) - wanted))
    return [one for one in nearest if abs(size(one) - wanted) <= within * wanted] or nearest[:1]


def width_or_depth(bench: Bench) -> Iterator[Comparison]:
    depth, kept = depth_cut(bench, REMOVED[-1])
    sizes: dict[str, Callable[[Architecture], int]] = {"parameters": count_total_parameters, "bytes": lambda one: memory_report(one, WORKLOAD).total}
    for (what, size), (how, cut) in product(sizes.items(), {"sliced": sliced, "compensated": compensated_cut}.items()):
        fitting = of_size(bench.widths(bench.teacher.pattern), size, size(depth))[:MOST_TRIED]
        width = min(fitting, key=lambda one, cut=cut: bench.untouched(cut(bench, one))[0])
        print(f"  {what}: depth {size(depth):,}, {depth.pattern}; width {size(width):,}, {width.hidden} {width.ffn} {width.mamba_num_heads}", flush=True)
        yield from both(bench, f"width < depth, equal {what}, {how}", (f"width, equal {what}, {how}", cut(bench, width)),
                        (f"{REMOVED[-1]} layers, first seed's, {how}", cut(bench, depth, kept)))  # fmt: skip


def start(bench: Bench) -> Iterator[Comparison]:
    untrained = lambda seed: bench.untrained(seed, standard(bench))  # noqa: E731
    yield from both(bench, "pruned start < random start", ("slice", sliced(bench)), ("untrained", untrained))


def ranking(bench: Bench) -> Iterator[Comparison]:
    """Kendall's τ of zero-shot losses with those after distillation, over candidates of equal parameters (to 3 %); against no relation, τ = 0."""
    deepest, deepest_kept = depth_cut(bench, REMOVED[-1])
    middle, middle_kept = depth_cut(bench, REMOVED[0])
    wanted = count_total_parameters(deepest)
    candidates: list[Side] = [sliced(bench, deepest, deepest_kept)]
    for pattern, kept, number in ((middle.pattern, middle_kept, 2), (bench.teacher.pattern, None, 4)):
        fitting = of_size(bench.widths(pattern), count_total_parameters, wanted, within=0.03)
        fitting.sort(key=lambda one: (one.hidden, one.ffn, one.mamba_num_heads))
        chosen = {round(place * (len(fitting) - 1) / (number - 1)) for place in range(number)}
        candidates += [sliced(bench, fitting[place], kept) for place in sorted(chosen)]
    zero_shot = [bench.untouched(side) for side in candidates]
    distilled = [[bench.trained(side, seed, 0.005) for seed in bench.seeds] for side in candidates]
    for side, before, after in zip(candidates, zero_shot, distilled, strict=True):
        print(f"  {side(0).name:66}{statistics.mean(before):.4f} -> {statistics.mean(after):.4f}", flush=True)
    taus = [kendall([losses[seed] for losses in zero_shot], [losses[seed] for losses in distilled]) for seed in bench.seeds]
    yield Comparison(f"zero-shot rank foretells: −τ of {len(candidates)}", [-tau for tau in taus], [0.0] * len(taus))


def compensated(bench: Bench) -> Iterator[Comparison]:
    yield from both(bench, "compensated < slice", ("compensated", compensated_cut(bench)), ("slice", sliced(bench)))


CLAIMS = {one.__name__: one for one in (distillation, importance, groups, depth_order, width_or_depth, start, ranking, compensated)}
ABOUT_TRAINING = ("distillation", "ranking")


def open_bench(options) -> Bench:
    """The tiny experiment's teacher, and what was measured so far of what is cut from it."""
    data, teacher = (walk_pipeline(options.runs, "claims", f"stage={stage}", "depth_lap.enabled=false") for stage in ("data", "teacher"))
    teacher, rows = Path(teacher["models"]["teacher"]["path"]), Path(data["stages"]["data"]["path"])
    dispatch.install()
    sides = Sides(teacher, teacher, rows, held_out_rows=HELD_OUT_ROWS)
    return Bench(sides, Measured(options.runs / "claims" / f"{teacher.parent.name}.jsonl"), seeds=options.seeds, tokens=options.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder for what is measured; goes on where it was")
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS), metavar="NAME", help=", ".join(CLAIMS))
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, len(T_QUANTILES) + 2), metavar=f"2 to {len(T_QUANTILES) + 1}")
    parser.add_argument("--tokens", type=int, default=16_384, help="of every training; 0 compares as cut alone, without the claims about training")
    options = parser.parse_args()
    bench = open_bench(options)
    base = bench.measured.get("the teacher", lambda: bench.sides.loss(bench.sides.model))
    print(f"teacher {count_total_parameters(bench.teacher):,} parameters, held-out loss {base:.4f} nats/token; {options.tokens:,} tokens", flush=True)
    found: dict[str, list[Comparison]] = {}
    for name in options.claims:
        if not options.tokens and name in ABOUT_TRAINING:
            continue
        print(name, flush=True)
        found[name] = list(CLAIMS[name](bench))
    print(f"\n{'claim':<44}{'claimed':>9}{'other':>9}{'gain':>9}{'95 % ±':>9}   n = {options.seeds}")
    ratios, rows = {}, []
    for name, comparisons in found.items():
        for one in comparisons:
            mean, half = interval(one.gains)
            print(f"{one.text:<44}{statistics.mean(one.claimed):>9.4f}{statistics.mean(one.other):>9.4f}{mean:>9.4f}{half:>9.4f}   {verdict(mean, half)}")
            ratios[one.text] = round(mean, 5)
            rows.append({"claim": name, "text": one.text, "claimed": one.claimed, "other": one.other, "gain": mean, "half": half,
                         "verdict": verdict(mean, half)})  # fmt: skip
    print(json.dumps({"benchmark": "claims", "ratios": ratios, "base_loss": base, "tokens": options.tokens, "seeds": options.seeds,
                      "rates": bench.rates, "claims": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
