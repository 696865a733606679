"""Experts of a 30B-A3B-shaped checkpoint scored and 128 of a layer cut to 96, from disk to disk on a small machine, each against its floor.

Scoring's floor is the larger of two: reading the experts that tokens reach and all other tensors that it needs, at the rate of a plain read of one shard;
and the products of matrices (2 · active parameters of the layers · tokens) at the measured bf16 rate of a matrix of an expert's shape. The cut's is that of
prune_12b.py, a plain copy of the bytes that it reads and writes. All is measured in this run. A random router sends about as many tokens to each expert.
Run: .venv/bin/python benchmarks/score_30b.py DIR   (the first 10 of 52 layers, 4 of experts, are made in DIR if they are not there, 12.3 GB; 10 GB more to cut)
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.prune_12b import cut, drop_from_cache, emptied, plain_copy  # noqa: E402
from benchmarks.score_12b import read_rate  # noqa: E402
from memory_budget.architecture import Architecture  # noqa: E402
from memory_budget.hf_config import architecture_from_config, read_config  # noqa: E402
from memory_budget.parameters import layer_parameters  # noqa: E402
from memory_budget.units import GIB  # noqa: E402
from minitron.checkpoints.files import Checkpoint  # noqa: E402
from minitron.checkpoints.placement import StreamedModel  # noqa: E402
from minitron.checkpoints.publish import check_layer_by_layer, write_companions  # noqa: E402
from minitron.families.base import EXPERT  # noqa: E402
from minitron.families.known import family_of  # noqa: E402
from minitron.families.table import names_by_canonical  # noqa: E402
from minitron.importance.activations import measure_width  # noqa: E402
from minitron.importance.scores import ImportanceScores, WidthSums, aggregate  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402
from minitron.pruning.cut import plan_cuts  # noqa: E402
from minitron.pruning.disk_to_disk import planned_tensors  # noqa: E402
from minitron.pruning.plan import PruningPlan, make_plan  # noqa: E402

LAYERS, EXPERTS = 10, 96


def matrix_rate(architecture: Architecture, tokens: int, seconds: float = 5.0) -> float:
    """FLOP/s of bf16 products of one expert's matrix with so many tokens, all threads."""
    given, matrix = torch.randn(tokens, architecture.hidden).bfloat16(), torch.randn(architecture.moe_ffn, architecture.hidden).bfloat16()
    torch.nn.functional.linear(given, matrix)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        torch.nn.functional.linear(given, matrix)
        done += 2 * given.numel() * len(matrix)
    return done / (time.perf_counter() - started)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bytes_needed(model: StreamedModel, sums: WidthSums) -> int:
    """Of the tensors that scoring cannot do without: all but the head and the experts that no token reached."""
    sizes = {name: model.checkpoint.entries[file_name].num_bytes for name, file_name in model.names.items()}
    unreached = [f"layers.{layer}.mixer.experts.{expert}." for (axis, layer), rows in sums.sums.items() if axis == EXPERT
                 for expert, number in enumerate(rows[0]) if number == 0]  # fmt: skip
    return sum(size for name, size in sizes.items() if not name.startswith(("lm_head.", *unreached)))


def scored(model: StreamedModel, ids: torch.Tensor) -> tuple[WidthSums, float]:
    """The sums, and the seconds that they took."""
    drop_from_cache(model.checkpoint)
    pattern, laps = model.architecture.pattern, [time.perf_counter()]

    def on_layer() -> None:
        laps.append(time.perf_counter())
        print(f"layer {len(laps) - 2:2d} {pattern[len(laps) - 2]}  {laps[-1] - laps[-2]:6.1f} s", flush=True)

    sums = measure_width(model, list(ids.split(1)), on_layer)
    return sums, time.perf_counter() - laps[0]


def score(model: StreamedModel, ids: torch.Tensor, repeats: int) -> tuple[WidthSums, dict]:
    """Width and expert scores, and how long they took, the best of some runs, each with its own floor."""
    architecture, found = model.architecture, []
    per_expert = ids.numel() * architecture.moe_experts_per_token // architecture.moe_num_experts
    flops = 2 * ids.numel() * sum(layer_parameters(architecture, letter, active_only=True).total for letter in architecture.pattern)
    for _ in range(repeats):
        flops_rate, bytes_rate = matrix_rate(architecture, per_expert), read_rate(model.checkpoint.files[0])
        sums, seconds = scored(model, ids)
        size = bytes_needed(model, sums)
        floor = max(size / bytes_rate, flops / flops_rate)
        found.append({"over_floor": seconds / floor, "seconds": seconds, "floor_seconds": floor, "flops_per_second": flops_rate,
                      "read_bytes_per_second": bytes_rate, "bytes_needed": size})  # fmt: skip
        print(f"{len(sums.sums)} sites, {sums.num_tokens:,} tokens: {seconds:.1f} s; floor {floor:.1f} s, the larger of reading {size / GIB:.2f} GiB, "
              f"{size / bytes_rate:.1f} s at {bytes_rate / 1e9:.2f} GB/s, and arithmetic, {flops / flops_rate:.1f} s at {flops_rate / 1e12:.3f} bf16 TFLOP/s; "
              f"over floor {seconds / floor:.2f}; peak {peak_gib():.2f} GiB", flush=True)  # fmt: skip
    return sums, min(found, key=lambda one: one["over_floor"])


def cut_and_copy(source: Checkpoint, config: dict, plan: PruningPlan, work: Path, repeats: int) -> dict:
    """The cut against the copy, interleaved; what the last one wrote is read back as the prune stage does."""
    family, dtype = family_of(config), config["dtype"]
    started = time.perf_counter()
    planned = planned_tensors(family, plan, source)
    planning = time.perf_counter() - started  # with the cut, whose tables it is
    names = names_by_canonical(family, plan.teacher, source.entries)
    read_names = [names[one.source] for one in plan_cuts(family, plan, {name: source.entries[file_name].shape for name, file_name in names.items()})]
    read, written = sum(source.entries[name].num_bytes for name in read_names), sum(tensor.num_bytes for tensor in planned)
    copies, cuts = [], []
    for _ in range(repeats):
        copies.append(plain_copy(source, read_names, written, emptied(work)))
        cuts.append(planning + cut(source, planned, emptied(work)))
        print(f"plain copy {copies[-1]:6.1f} s   cut {cuts[-1]:6.1f} s", flush=True)
    peak, student_config = peak_gib(), family.hf_config(config, plan.student) | {"dtype": dtype}
    write_companions(work, config=student_config, companions=source.folder, card="")
    started = time.perf_counter()
    check_layer_by_layer(work, family, planned, student_config)
    check_seconds, parameters = time.perf_counter() - started, Checkpoint(work).num_parameters
    shutil.rmtree(work)
    seconds, copy_seconds = statistics.median(cuts), statistics.median(copies)
    print(f"{read / GIB:.2f} GiB read, {written / GIB:.2f} GiB written, {parameters:,} parameters: plain copy {copy_seconds:.1f} s at "
          f"{(read + written) / copy_seconds / 1e9:.2f} GB/s, cut {seconds:.1f} s ({planning:.2f} s of it planning), {seconds / copy_seconds:.2f} × the copy, "
          f"peak {peak:.2f} GiB; check {check_seconds:.1f} s, peak {peak_gib():.2f} GiB")  # fmt: skip
    return {"cut_over_copy": seconds / copy_seconds, "cut_seconds": seconds, "copy_seconds": copy_seconds, "parameters": parameters, "peak_rss_gib": peak,
            "check_seconds": check_seconds, "check_peak_rss_gib": peak_gib(), "bytes_read": read, "bytes_written": written}  # fmt: skip


def smaller_plan(architecture: Architecture, scores: ImportanceScores) -> PruningPlan:
    return make_plan(architecture, replace(architecture, moe_num_experts=EXPERTS), tuple(range(architecture.num_layers)), scores)


def made(folder: Path) -> Path:
    """The checkpoint, made by another process if it is not there."""
    if not (folder / "config.json").exists():
        script = REPOSITORY / "benchmarks" / "make_teacher.py"
        subprocess.run([sys.executable, str(script), "--preset", "nano3-30b", "--layers", str(LAYERS), "--out", str(folder)], check=True)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the checkpoint is, or is made")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--row", type=int, default=1024, help="tokens per row")
    parser.add_argument("--repeats", type=int, default=2, help="of each side: the best scoring counts, and the medians of cuts and copies")
    options = parser.parse_args(arguments)
    dispatch.install()
    config = read_config(made(options.folder))
    architecture = architecture_from_config(config)
    model = StreamedModel(family_of(config), options.folder, config, architecture, torch.device("cpu"))
    ids = torch.randint(architecture.vocab, (options.tokens // options.row, options.row), generator=torch.Generator().manual_seed(0))
    sums, scoring = score(model, ids, options.repeats)
    tokens = [rows[0].astype(int) for (axis, _), rows in sums.sums.items() if axis == EXPERT]
    fewest, most = min(one.min() for one in tokens), max(one.max() for one in tokens)
    print(f"{len(tokens)} layers of {architecture.moe_num_experts} experts, {fewest} to {most} tokens each")
    cutting = cut_and_copy(model.checkpoint, config, smaller_plan(architecture, aggregate(sums)), options.folder / "cut", options.repeats)
    ratios = {"over_floor": scoring["over_floor"], "cut_over_copy": cutting["cut_over_copy"]}
    print(json.dumps({"benchmark": "score_30b", "ratios": ratios, **scoring, **cutting, "tokens": sums.num_tokens, "threads": torch.get_num_threads()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
