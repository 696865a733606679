"""The plan before the work: how long it takes to be made, whole process, and how near it comes to what finished runs took.

Run: .venv/bin/python benchmarks/plan.py [--repeats N] [SUMMARY.JSON …], such as runs/tiny/summary.json after `make demo` and runs/smollm2/summary.json after
`make real`, on the machine that they were made on. Bars: the whole within 1.5 times of what was taken, stages of more than 30 seconds within twice.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PLANS = {"tiny": ["experiment=tiny"], "nano2": ["experiment=nano2", "plan.device=h100-80", "plan.gpus=8"]}
LONG_SECONDS = 30


def seconds_of(overrides: list[str]) -> float:
    """A whole process of stage=plan, from the interpreter's start to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "minitron.run", "stage=plan", *overrides], cwd=REPOSITORY, check=True, capture_output=True)
    return time.perf_counter() - started


def compared(summary: dict) -> list[tuple[str, float, float]]:
    """(stage, planned and taken seconds) of what was done, by laps."""
    plan = summary["plan"]
    laps = (("first lap, ", plan["depth_lap"]), ("", plan["stages"]))
    return [(lap + name, both["planned"]["seconds"], both["taken"]["seconds"]) for lap, stages in laps for name, both in stages.items() if both["taken"]]


def off(planned: float, taken: float) -> float:
    """How many times one of them is the other, 1 and above."""
    return max(planned / taken, taken / planned)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("summaries", nargs="*", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for overrides in PLANS.values():
        seconds_of(overrides)  # the rate is measured, and files are read once
    times = {name: statistics.median(seconds_of(overrides) for _ in range(options.repeats)) for name, overrides in PLANS.items()}
    for name, seconds in times.items():
        print(f"stage=plan of {name:<6} {seconds:6.2f} s")
    ratios = {}
    for path in options.summaries:
        rows = compared(json.loads(path.read_text()))
        print(f"\n{path}\n{'stage':<28} {'planned':>9} {'taken':>9} {'off by':>7}")
        for name, planned, taken in rows:
            times_off = f"{off(planned, taken):>7.2f}" if taken > LONG_SECONDS else ""
            print(f"{name:<28} {planned:>7.1f} s {taken:>7.1f} s {times_off}".rstrip())
        planned, taken = (sum(column) for column in list(zip(*rows, strict=True))[1:])
        worst = max((off(*both) for _, *both in rows if both[1] > LONG_SECONDS), default=1.0)
        print(f"{'all':<28} {planned:>7.1f} s {taken:>7.1f} s {off(planned, taken):>7.2f}")
        ratios |= {f"{path.parent.name}_planned_over_taken": round(planned / taken, 3), f"{path.parent.name}_worst_stage": round(worst, 3)}
    print(json.dumps({"benchmark": "plan", "ratios": ratios, "seconds": {name: round(seconds, 3) for name, seconds in times.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
