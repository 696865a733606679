"""How well each rung of the search's ladder ranks candidates, against their ranking after long distillation.

Per seed: the tiny teacher is trained anew, a diversified shortlist and the largest architectures that fit are distilled
for long, and every rung is held against that. Kendall's τ of each rung, and the regret of three ways to choose: the loss after
long distillation of what each picks, less the lowest of all. Everything lies in a store of its own, so the command goes on where it was.
Run: .venv/bin/python benchmarks/ladder.py --runs DIR [--seeds 3] [--candidates 12] [--long-tokens 160000]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import combinations
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_LARGEST, NUM_FINALISTS = 2, 4


def walk(options, seed: int, *settings: str, multirun: bool = False) -> subprocess.Popen:
    """`python -m minitron.run` in the background, one thread each, with what all calls of a seed share."""
    shared = (
        f"runs_folder={options.runs}",
        f"run_name=ladder-{seed}",
        f"seed={seed}",
        "teacher.train_anew=true",
        "depth_lap.enabled=false",
        "search.layers.high=null",
    )
    command = [sys.executable, "-m", "minitron.run", *(["-m"] if multirun else []), *shared]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([*command, *settings], env=environment, stdout=subprocess.DEVNULL)


def finished(*processes: subprocess.Popen) -> None:
    for process in processes:
        if process.wait() != 0:
            sys.exit(f"error: {' '.join(process.args)} ended with {process.returncode}")


def summary_of(options, seed: int) -> dict:
    return json.loads((options.runs / f"ladder-{seed}" / "summary.json").read_text())


def screen(options, seed: int, shortlist: tuple[str, ...], names: list[str], tokens: int) -> dict[str, float]:
    """Losses of candidates after a distillation of so many tokens: two processes, half of the names each."""
    halves = [names[0::2], names[1::2]]
    finished(*[walk(options, seed, *shortlist, "stage=screen", f"screen.train.tokens={tokens}", f"run_name=ladder-{seed}-{part}",
                    f"candidate={','.join(half)}", multirun=True) for part, half in enumerate(halves) if half])  # fmt: skip
    finished(walk(options, seed, *shortlist, "stage=search", "search.finalists=1", f"screen.train.tokens={tokens}"))
    losses = {candidate["id"]: candidate["short_distill_loss"] for candidate in summary_of(options, seed)["candidates"]}
    return {name: losses[name] for name in names}


def measure(options, seed: int) -> dict[str, dict[str, float]]:
    """Per candidate its bytes, zero-shot loss and KL, and losses after the short and the long distillation."""
    rows: dict[str, dict[str, float]] = {}
    for kind, size in (("diversified", options.candidates), ("largest", NUM_LARGEST)):
        shortlist = (f"search.shortlist={kind}", f"search.shortlist_size={size}")
        finished(walk(options, seed, *shortlist, "stage=search", "search.finalists=0"))
        entries = {entry["id"]: entry for entry in summary_of(options, seed)["candidates"]}
        short = screen(options, seed, shortlist, list(entries), options.short_tokens)
        long = screen(options, seed, shortlist, list(entries), options.long_tokens)
        for name, entry in entries.items():
            rows[name] = {"bytes": entry["memory_bytes"]["total"], "zero_shot_loss": entry["zero_shot_loss"], "zero_shot_kl": entry["zero_shot_kl"],
                          "short": short[name], "long": long[name]}  # fmt: skip
    return rows


def kendall(first: list[float], second: list[float]) -> float:
    """Kendall's τ: pairs in the same order less pairs in opposite order, over all pairs."""
    order = [((a > b) - (a < b)) * ((c > d) - (c < d)) for (a, c), (b, d) in combinations(zip(first, second, strict=True), 2)]
    return sum(order) / len(order)


def taus(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Kendall's τ of every rung with the long distillation; for memory, the larger counts as the better."""
    long = [row["long"] for row in rows.values()]
    rungs = {name: [row[name] for row in rows.values()] for name in ("zero_shot_loss", "zero_shot_kl", "short")}
    rungs["largest_first"] = [-row["bytes"] for row in rows.values()]
    return {name: kendall(values, long) for name, values in rungs.items()}


def regrets(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Nats per token that each way to choose loses against the best of all candidates."""
    best = min(row["long"] for row in rows.values())
    by_zero_shot = sorted(rows, key=lambda name: rows[name]["zero_shot_loss"])
    picks = {
        "largest_first": max(rows, key=lambda name: rows[name]["bytes"]),
        "zero_shot_only": by_zero_shot[0],
        "ladder": min(by_zero_shot[:NUM_FINALISTS], key=lambda name: rows[name]["short"]),
    }
    return {way: rows[name]["long"] - best for way, name in picks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="runs folder for teachers and screens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=12, help="size of the diversified shortlist")
    parser.add_argument("--short-tokens", type=int, default=24_000)
    parser.add_argument("--long-tokens", type=int, default=160_000)
    options = parser.parse_args()
    tables = {seed: measure(options, seed) for seed in range(options.seeds)}
    for seed, rows in tables.items():
        print(f"seed {seed}: {len(rows)} candidates")
        print(f"  {'candidate':<22} {'MiB':>7} {'zero-shot':>10} {'KL':>7} {'short':>7} {'long':>7}")
        for name, row in sorted(rows.items(), key=lambda item: item[1]["long"]):
            print(f"  {name:<22} {row['bytes'] / 2**20:7.3f} {row['zero_shot_loss']:10.3f} {row['zero_shot_kl']:7.3f} {row['short']:7.3f} {row['long']:7.3f}")
    results = {"tau": [taus(rows) for rows in tables.values()], "regret_nats": [regrets(rows) for rows in tables.values()]}
    means = {what: {name: statistics.mean(one[name] for one in values) for name in values[0]} for what, values in results.items()}
    for what, values in means.items():
        for name, value in values.items():
            spread = ", ".join(f"{one[name]:.3f}" for one in results[what])
            print(f"  {what:<12} {name:<16} {value:7.3f}   ({spread})")
    ratios = {f"tau_{name}": value for name, value in means["tau"].items()} | {f"regret_{name}": value for name, value in means["regret_nats"].items()}
    print(json.dumps({"benchmark": "ladder", "ratios": ratios, **results, "short_tokens": options.short_tokens, "long_tokens": options.long_tokens}))


if __name__ == "__main__":
    main()
