"""The memory filter of the search over a grid of about 10^7 architectures, and whether it gives the scalar calculator's bytes.

One core: the filter is numpy's elementwise arithmetic, which uses no threads. Its rate is architectures looked at per second, from
the space to the columns of those that fit the published budget.
Run: .venv/bin/python benchmarks/search.py [--repeats N]
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from memory_budget.architecture import Architecture  # noqa: E402
from memory_budget.budget import PRESETS  # noqa: E402
from memory_budget.calculator import memory_report  # noqa: E402
from memory_budget.parameters import count_total_parameters  # noqa: E402
from memory_budget.workload import Workload  # noqa: E402
from nas.candidates import Candidates, enumerate_fitting  # noqa: E402
from nas.depth import kept_layers  # noqa: E402
from nas.filters import Filters  # noqa: E402
from nas.shortlist import diversified  # noqa: E402
from nas.space import SearchSpace, check_space  # noqa: E402
from nas.throughput import DEVICES, Serving  # noqa: E402

TEACHER = Architecture(
    model_type="nemotron_h", pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", hidden=5120, vocab=131072, ffn=20480,
    num_attention_heads=40, num_key_value_heads=8, attention_head_dim=128,
    mamba_num_heads=128, mamba_head_dim=80, mamba_num_groups=8, mamba_state_size=128, mamba_conv_kernel=4,
)  # fmt: skip
SPACE = SearchSpace(
    num_layers=tuple(range(52, 63)), hidden=tuple(range(4480, 5121, 32)), ffn=tuple(range(13440, 20481, 32)),
    mamba_num_heads=(96, 104, 112, 120, 128), mamba_head_dim=tuple(range(40, 81, 4)), num_attention_heads=(16, 24, 32, 40), floors={"*": 4},
)  # fmt: skip
LAYERS = {depth: kept_layers(TEACHER.pattern, range(TEACHER.num_layers), depth, SPACE.floors) for depth in SPACE.num_layers}
WORKLOAD, BUDGET_BYTES = Workload(), PRESETS["a10g"].bytes
CHECKED, SHORTLISTED = 10_000, 1_000_000


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def search(**limits) -> tuple[Candidates, int]:
    return enumerate_fitting(TEACHER, SPACE, LAYERS, WORKLOAD, Filters(**{"budget_bytes": BUDGET_BYTES, **limits}))


def check(architectures: list[Architecture], parameters: list[int], total_bytes: list[int]) -> None:
    """The scalar calculator's side: one architecture after the other, to the byte."""
    for architecture, number, size in zip(architectures, parameters, total_bytes, strict=True):
        assert (count_total_parameters(architecture), memory_report(architecture, WORKLOAD).total) == (number, size), architecture


def sample(fitting: Candidates, number: int, random: np.random.Generator) -> tuple[list[Architecture], list[int], list[int]]:
    rows = random.choice(len(fitting), number, replace=False)
    return [fitting.architecture(row) for row in rows], fitting.parameters[rows].tolist(), fitting.total_bytes[rows].tolist()


def filtering(repeats: int) -> dict:
    """Rates and seconds of the filter, after holding random rows, half within the budget and half above it, to the scalar calculator."""
    check_space(SPACE, TEACHER)
    random = np.random.default_rng(0)
    fitting, num_looked_at = search()
    above, _ = search(budget_bytes=2**50, min_bytes=BUDGET_BYTES + 1)
    assert len(fitting) + len(above) == num_looked_at == SPACE.size, "every architecture is on one side of the budget"
    samples = [sample(side, CHECKED // 2, random) for side in (fitting, above)]
    del above
    some = fitting.take(random.choice(len(fitting), SHORTLISTED, replace=False))
    limits = {"max_parameters": 9 * 10**9, "min_tokens_per_second": 200, "serving": Serving(device=DEVICES["a10g"])}
    sides = {
        "memory filter": search,
        "all filters": lambda: search(**limits),
        "scalar calculator": lambda: [check(*columns) for columns in samples],
        "shortlist": lambda: diversified(some, some.parameters / 1e10, 64),
    }
    times = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(timed(side))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "seconds": seconds,
        "num_architectures": num_looked_at,
        "num_fitting": len(fitting),
        "num_checked": CHECKED,
        "architectures_per_second": num_looked_at / seconds["memory filter"],
        "all_filters_per_second": num_looked_at / seconds["all filters"],
        "scalar_per_second": CHECKED / seconds["scalar calculator"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats of every side; medians are reported")
    repeats = parser.parse_args().repeats
    figures = filtering(repeats)
    ratios = {"filter_over_scalar": figures["architectures_per_second"] / figures["scalar_per_second"]}
    report(figures, ratios, repeats)


def report(figures: dict, ratios: dict[str, float], repeats: int) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{figures['num_architectures']:,} architectures, {figures['num_fitting']:,} within {BUDGET_BYTES / 2**30:.2f} GiB")
    print(f"  {figures['num_checked']:,} random ones equal the scalar calculator's to the byte")
    for name, seconds in figures["seconds"].items():
        print(f"  {name:<24} {seconds:13.3f} s")
    for name in ("architectures_per_second", "all_filters_per_second", "scalar_per_second"):
        print(f"  {name:<24} {figures[name]:13,.0f}")
    for name, ratio in ratios.items():
        print(f"  {name:<24} {ratio:13,.3f}")
    print(f"  peak resident memory     {peak:12.2f} GiB")
    print(json.dumps({"benchmark": "search", "ratios": ratios, **figures, "peak_rss_gib": peak, "repeats": repeats}))


if __name__ == "__main__":
    main()
