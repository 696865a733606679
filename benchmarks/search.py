"""The search's memory filter over a grid of about 10^7 architectures, and zero-shot screening against plain forward passes.

Filter, one core (numpy's elementwise arithmetic uses no threads): architectures looked at per second, from the space to the columns
of those that fit the published budget, held to the scalar calculator's bytes. Screening: seconds to build the views and measure
loss and KL of all candidates, over those of a plain forward pass of every one as a model of its own, and of the teacher once.
Run: .venv/bin/python benchmarks/search.py [--repeats N]
"""

import argparse
import copy
import json
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scoring import ARCHITECTURE as SCREENED  # noqa: E402

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


# What a search shortlists of a model like this: depth, hidden, FFN neurons, Mamba heads.
SIZES = (
    (24, 256, 768, 16), (24, 224, 1024, 16), (24, 192, 768, 16), (22, 256, 1024, 12), (22, 224, 768, 16), (22, 192, 1024, 12), (20, 256, 768, 12),
    (20, 224, 1024, 16),
)  # fmt: skip
BATCHES, ROWS, TOKENS = 4, 8, 256


def screening(repeats: int) -> tuple[dict[str, float], dict]:
    """Ratios and figures of zero-shot screening on views; torch is imported here, the filter does without."""
    import torch

    from minitron.checkpoints.placement import WholeModel
    from minitron.families.nemotron_h import FAMILY
    from minitron.importance.activations import measure_width
    from minitron.importance.scores import aggregate
    from minitron.mamba import dispatch
    from minitron.pruning.cut import build_pruned
    from minitron.pruning.plan import make_plan
    from minitron.pruning.views import SortedTeacher
    from minitron.search.distances import measure_batch
    from minitron.training.tiny_teacher import TINY_CONFIG

    dispatch.install()
    torch.manual_seed(0)
    config = FAMILY.hf_config(TINY_CONFIG, SCREENED)
    teacher = FAMILY.build(config).eval().requires_grad_(False)
    batches = list(torch.randint(SCREENED.vocab, (BATCHES, ROWS, TOKENS)).unbind())
    scores = aggregate(measure_width(WholeModel(FAMILY, teacher, SCREENED), batches[:1]))
    order = [layer for layer in range(SCREENED.num_layers) if SCREENED.pattern[layer] != "*"]
    students = []
    for depth, hidden, ffn, heads in SIZES:
        kept = kept_layers(SCREENED.pattern, order, depth, {})
        students.append((replace(SCREENED, pattern="".join(SCREENED.pattern[k] for k in kept), hidden=hidden, ffn=ffn, mamba_num_heads=heads), kept))
    models = [build_pruned(FAMILY, teacher, make_plan(SCREENED, student, kept, scores), config).requires_grad_(False) for student, kept in students]
    whole = sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())
    plain_teacher = copy.deepcopy(teacher)
    sorted_teacher = SortedTeacher(FAMILY, teacher, config, SCREENED, scores)
    views = [sorted_teacher.view(*student) for student in students]

    @torch.no_grad()
    def forward(some) -> None:
        for ids in batches:
            for model in some:
                model(ids, use_cache=False)

    def screen() -> None:
        made = {str(index): sorted_teacher.view(*student).model for index, student in enumerate(students)}
        for ids in batches:
            measure_batch(sorted_teacher.model, made, ids)

    sides = {"candidates' forward passes": lambda: forward(models), "teacher's forward pass": lambda: forward([plain_teacher]), "screening": screen}
    times = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            times[name].append(timed(side))
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
    needed = seconds["candidates' forward passes"] + seconds["teacher's forward pass"]
    fused = max(view.mamba_copied_bytes for view in views) / whole
    ratios = {
        "screening_over_forward": seconds["screening"] / needed,
        "screening_over_candidates_alone": seconds["screening"] / seconds["candidates' forward passes"],
        "copied_fraction": max(view.copied_bytes for view in views) / whole,
        "copied_mamba_fraction": fused,
    }
    return ratios, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats of every side; medians are reported")
    repeats = parser.parse_args().repeats
    figures = filtering(repeats)
    ratios = {"filter_over_scalar": figures["architectures_per_second"] / figures["scalar_per_second"]}
    of_screening, seconds = screening(repeats)
    ratios |= of_screening
    figures |= {name: of_screening[name] for name in ("screening_over_forward", "copied_fraction")}
    figures["seconds"] |= seconds
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
