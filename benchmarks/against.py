"""This checkout against another one, say of the commit before: the same works of ours in a process each, in turns, so that a busy machine is as busy for both.

Works: width and layer scoring (scoring.py), a small model forward and backward and the scan at the 12B's shape (ssd.py), the distillation loss
(distill_loss.py), a step of distillation (distill_step.py), one thread. Printed: the other's median seconds, ours over theirs by pairs as a median with
the interval that holds it with 95 % confidence (order statistics; nothing less than 6 pairs has one).
Run: .venv/bin/python benchmarks/against.py --other DIR [--repeats 7] [--works NAME …]
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve()
LOSS_TOKENS = 512  # of the distillation loss, in place of the benchmark's thousands: at a vocabulary of 131,072 those take minutes


def works() -> dict[str, Callable[[], object]]:
    """What is timed, of the checkout that comes first on the path."""
    import numpy as np
    import torch

    from benchmarks import distill_loss, distill_step, scoring, ssd

    torch.set_num_threads(1)
    getattr(scoring, "dispatch", None).install() if hasattr(scoring, "dispatch") else scoring.ssd.install()
    scoring.ROUNDS = 1
    torch.manual_seed(0)
    scored = scoring.FAMILY.build(scoring.FAMILY.hf_config(scoring.TINY_CONFIG, scoring.ARCHITECTURE)).eval().requires_grad_(False)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, scoring.ARCHITECTURE.vocab, (scoring.ROWS, scoring.TOKENS)))
    placed = scoring.WholeModel(scoring.FAMILY, scored, scoring.ARCHITECTURE)
    trained = ssd.FAMILY.build(ssd.FAMILY.hf_config(ssd.TINY_CONFIG, ssd.ARCHITECTURE)).eval()
    tokens = torch.randint(ssd.ARCHITECTURE.vocab, (ssd.ROWS, ssd.TOKENS))
    distill_loss.TOKENS = LOSS_TOKENS
    inputs, ours = distill_loss.build_inputs(), distill_loss.build_side("ours")
    sizes = distill_step.Sizes()
    step = distill_step.our_side(distill_step.build_rows(sizes), *distill_step.build_models(sizes))

    def forward_backward() -> None:
        trained.zero_grad(set_to_none=True)
        ssd.next_token_objective(trained, tokens).backward()

    return {
        "width scoring": lambda: scoring.measure_width(placed, [ids]),
        "layer scoring": lambda: scoring.swept_rounds(scored, ids),
        "model, forward and backward": forward_backward,
        "distillation loss": lambda: distill_loss.run_side(ours, inputs),
        "distillation step": lambda: step(1),
    }


def serve() -> None:
    """Does the work whose name comes in a line, and says how long it took."""
    known = works()
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        known[line.strip()]()
        print(time.perf_counter() - started, flush=True)


class Side:
    """A checkout's process."""

    def __init__(self, checkout: Path):
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "AGAINST_SERVE": "1"}
        self.process = subprocess.Popen([sys.executable, str(HERE)], cwd=checkout, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def answer(self) -> str:
        """The next line it says."""
        if not (line := self.process.stdout.readline()):
            sys.exit("error: --other: its process has ended; what it said stands above")
        return line

    def seconds(self, work: str) -> float:
        print(work, file=self.process.stdin, flush=True)
        return float(self.answer())


def interval(ratios: list[float]) -> tuple[float, float] | None:
    """The narrowest pair of order statistics that holds the median with 95 % confidence, None where there are too few."""
    ordered, number = sorted(ratios), len(ratios)
    outside = 0.0
    for low in range(number // 2):
        outside += math.comb(number, low) / 2**number
        if 2 * outside > 0.05:
            return None if low == 0 else (ordered[low - 1], ordered[number - low])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, required=True, help="the other checkout")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of each work")
    parser.add_argument("--works", nargs="+", help="some of them; all where none is named")
    options = parser.parse_args()
    own, other = Side(HERE.parent.parent), Side(options.other.resolve())
    for side in (own, other):
        assert side.answer() == "ready\n"
    found = {}
    for work in options.works or ["width scoring", "layer scoring", "model, forward and backward", "distillation loss", "distillation step"]:
        for side in (own, other):  # once unmeasured
            side.seconds(work)
        pairs = []
        for number in range(options.repeats):
            first, second = (own, other) if number % 2 else (other, own)
            one, two = first.seconds(work), second.seconds(work)
            pairs.append((one, two) if number % 2 else (two, one))
        ratios, theirs = [mine / theirs for mine, theirs in pairs], statistics.median(theirs for _, theirs in pairs)
        found[work] = {"ratio": statistics.median(ratios), "interval": interval(ratios), "seconds": theirs}
        shown = "–" if found[work]["interval"] is None else " to ".join(f"{bound:.3f}" for bound in found[work]["interval"])
        print(f"{work:<28} {theirs:8.3f} s   ours over theirs {found[work]['ratio']:.3f} ({shown})", flush=True)
    print(json.dumps({"benchmark": "against", "repeats": options.repeats, "ratios": {work: one["ratio"] for work, one in found.items()}, "works": found}))


if __name__ == "__main__":
    serve() if os.environ.get("AGAINST_SERVE") else main()
