"""Cutting a 12B-shaped checkpoint to the published 9B from disk to disk, against a plain copy of the same bytes.

The floor reads every byte of the source that the cut reads and writes as many bytes as the cut writes, by large plain
reads and writes, one after the other as `cp` does. Both sides start with the source dropped from the page cache and end
when the disk has everything (fsync). Scores are random: what is cut costs the same whichever units stay.
Run: .venv/bin/python benchmarks/make_teacher.py --out DIR, then .venv/bin/python benchmarks/prune_12b.py DIR --out EMPTY_DIR
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from memory_budget.architecture import Architecture  # noqa: E402
from memory_budget.hf_config import architecture_from_config, read_config  # noqa: E402
from memory_budget.units import GIB  # noqa: E402
from minitron.checkpoints.files import Checkpoint, PlannedTensor  # noqa: E402
from minitron.checkpoints.publish import check_layer_by_layer, write_companions  # noqa: E402
from minitron.checkpoints.shards import write_weights  # noqa: E402
from minitron.families.base import ATTENTION_HEAD, FFN, HIDDEN, MAMBA_HEAD, Family  # noqa: E402
from minitron.families.known import family_of  # noqa: E402
from minitron.importance.scores import ImportanceScores  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402
from minitron.pruning.disk_to_disk import planned_tensors  # noqa: E402
from minitron.pruning.plan import PruningPlan, make_plan  # noqa: E402
from nas.depth import subsequence_layers  # noqa: E402

# Nemotron-Nano-9B-v2 (arXiv 2508.14444): the published student's depth and widths.
PATTERN, HIDDEN_SIZE, FFN_SIZE = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", 4480, 15680
SHARD_BYTES = int(4.5 * GIB)
COPY_BYTES = 2**26


def random_scores(architecture: Architecture, seed: int) -> ImportanceScores:
    random = np.random.default_rng(seed)
    sites = {(HIDDEN, 0): random.random(architecture.hidden)}
    shapes = {"M": (MAMBA_HEAD, (architecture.mamba_num_heads, architecture.mamba_head_dim)), "-": (FFN, (architecture.ffn,)),
              "*": (ATTENTION_HEAD, (architecture.num_attention_heads, architecture.attention_head_dim))}  # fmt: skip
    for layer, kind in enumerate(architecture.pattern):
        axis, shape = shapes[kind]
        sites[axis, layer] = random.random(shape)
    return ImportanceScores(sites)


def published_student(teacher: Architecture, seed: int) -> PruningPlan:
    student = replace(teacher, pattern=PATTERN, hidden=HIDDEN_SIZE, ffn=FFN_SIZE)
    return make_plan(teacher, student, subsequence_layers(teacher.pattern, PATTERN), random_scores(teacher, seed))


def drop_from_cache(source: Checkpoint) -> None:
    for path in source.files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_copy(source: Checkpoint, names: list[str], written: int, folder: Path) -> float:
    """Seconds of reading the named tensors and writing `written` bytes, turn by turn, in shards."""
    drop_from_cache(source)
    total = sum(source.entries[name].num_bytes for name in names)
    buffer, shards, started = memoryview(bytearray(COPY_BYTES)), 0, time.perf_counter()
    shard, left = None, 0
    for path in source.files:
        with open(path, "rb", buffering=0) as file:
            for entry in sorted((source.entries[name] for name in names if source.entries[name].path == path), key=lambda entry: entry.offset):
                file.seek(entry.offset)
                todo = entry.num_bytes
                while todo:
                    count = file.readinto(buffer[: min(todo, COPY_BYTES)])
                    todo -= count
                    piece = buffer[: count * written // total]
                    if left < len(piece):
                        close_shard(shard)
                        shard, left, shards = open(folder / f"shard-{shards}", "wb", buffering=0), SHARD_BYTES, shards + 1  # noqa: SIM115
                    shard.write(piece)
                    left -= len(piece)
    close_shard(shard)
    return time.perf_counter() - started


def close_shard(shard) -> None:
    if shard is not None:
        os.fsync(shard.fileno())
        shard.close()


def cut(source: Checkpoint, planned: list[PlannedTensor], folder: Path) -> float:
    """Seconds of the prune stage's own work: reading, cutting and writing every tensor."""
    drop_from_cache(source)
    started = time.perf_counter()
    write_weights(folder, planned, max_shard_bytes=SHARD_BYTES)
    return time.perf_counter() - started


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def check(family: Family, planned: list[PlannedTensor], folder: Path, config: dict) -> float:
    """Seconds of the prune stage's own check, with the published config held against what is on disk."""
    started = time.perf_counter()
    written = architecture_from_config(read_config(folder))
    assert (written.pattern, written.hidden, written.ffn) == (PATTERN, HIDDEN_SIZE, FFN_SIZE), f"the config written is that of {written}"
    check_layer_by_layer(folder, family, planned, config)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint that make_teacher.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in, on the disk to be measured; 17 GiB, emptied before and after")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats of both sides; medians are reported")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dispatch.install()
    config, source = read_config(options.folder), Checkpoint(options.folder)
    family, plan = family_of(config), published_student(architecture_from_config(config), options.seed)
    planned = planned_tensors(family, plan, source)
    kept = [name for name in source.entries if is_kept(family.canonical_name(name), plan)]
    read, written = sum(source.entries[name].num_bytes for name in kept), sum(tensor.num_bytes for tensor in planned)
    work = options.out / "prune_12b"
    copies, cuts = [], []
    for _ in range(options.repeats):
        copies.append(plain_copy(source, kept, written, emptied(work)))
        cuts.append(cut(source, planned, emptied(work)))
        print(f"plain copy {copies[-1]:6.1f} s   cut {cuts[-1]:6.1f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    student_config = family.hf_config(config, plan.student)
    write_companions(work, config=student_config, companions=options.folder, card="")
    check_seconds = check(family, planned, work, student_config)
    check_peak, parameters = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, Checkpoint(work).num_parameters
    shutil.rmtree(work)
    copy_seconds, seconds = statistics.median(copies), statistics.median(cuts)
    ratio, gigabytes = seconds / copy_seconds, (read + written) / 1e9
    print(f"{read / GIB:.2f} GiB read, {written / GIB:.2f} GiB written, {parameters:,} parameters, {torch.get_num_threads()} threads")
    print(f"plain copy {copy_seconds:.1f} s at {gigabytes / copy_seconds:.2f} GB/s, cut {seconds:.1f} s, {ratio:.2f} × the copy, peak {peak:.2f} GiB")
    print(f"check (read back, layer by layer) {check_seconds:.1f} s, peak {check_peak:.2f} GiB")
    print(json.dumps({"benchmark": "prune_12b", "ratios": {"time_over_copy": ratio}, "time_over_copy": ratio, "seconds": seconds, "copy_seconds": copy_seconds,
                      "peak_rss_gib": peak, "parameters": parameters, "check_seconds": check_seconds, "check_peak_rss_gib": check_peak,
                      "bytes_read": read, "bytes_written": written}))  # fmt: skip
    return 0


def is_kept(canonical: str, plan: PruningPlan) -> bool:
    """Whether the cut reads this tensor of the teacher."""
    return not canonical.startswith("layers.") or int(canonical.split(".")[1]) in plan.kept_layers


if __name__ == "__main__":
    sys.exit(main())
