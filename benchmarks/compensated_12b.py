"""The default compensated cut of a few layers of a 12B-shaped checkpoint, at the published 9B's widths: time and memory, planned and measured.

Weights and tokens are random, and so are the directions left out: each layer costs the same whatever is in it. Every kind of layer once is --pattern M-*.
Seconds are from one layer's last matrix to the next one's; the planned ones are those that stage prune says, at the rate of products measured in this run.
Memory is what the process held at the most: the heap keeps what was let go (placement.py), so that holes count.
Run: .venv/bin/python benchmarks/make_teacher.py --pattern 'M-*' --out DIR, then .venv/bin/python benchmarks/compensated_12b.py DIR --out EMPTY_DIR
(some 40 minutes of one core with --rows 8, nearly all of it the feed-forward layer's choice of neurons and the Mamba-2 and feed-forward writers)
"""

import argparse
import json
import resource
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.prune_12b import FFN_SIZE, HIDDEN_SIZE, SHARD_BYTES, emptied, random_scores  # noqa: E402
from benchmarks.rotate_12b import random_directions  # noqa: E402
from memory_budget.hf_config import architecture_from_config, read_config  # noqa: E402
from memory_budget.units import GIB  # noqa: E402
from minitron.checkpoints.files import Checkpoint  # noqa: E402
from minitron.checkpoints.placement import StreamedModel  # noqa: E402
from minitron.families.known import family_of  # noqa: E402
from minitron.machine.pace import pace_here  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402
from minitron.pruning.basis import basis_without  # noqa: E402
from minitron.pruning.compensate import Recipe  # noqa: E402
from minitron.pruning.compensated_cut import MadeWeights  # noqa: E402
from minitron.pruning.cut_cost import CutCost  # noqa: E402
from minitron.pruning.disk_to_disk import planned_tensors  # noqa: E402
from minitron.pruning.plan import FEED_FORWARD_STEPS, make_plan  # noqa: E402

KINDS = {"M": "Mamba-2", "-": "feed-forward", "*": "attention"}
BATCH = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint that make_teacher.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in, emptied before and after")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dispatch.install()
    config, source = read_config(options.folder), Checkpoint(options.folder)
    family, teacher = family_of(config), architecture_from_config(config)
    student = replace(teacher, hidden=HIDDEN_SIZE, ffn=FFN_SIZE)
    plan = make_plan(teacher, student, tuple(range(teacher.num_layers)), random_scores(teacher, options.seed))
    recipe = Recipe(feed_forward_steps=FEED_FORWARD_STEPS)
    cost = CutCost(teacher, student, replace(recipe, directions=None), options.rows, options.rows * options.length, number_bytes=2)
    planned_seconds, planned_bytes = pace_here("cpu").seconds(cost.work), cost.held_bytes
    print(f"{teacher.pattern}, hidden {teacher.hidden:,} → {HIDDEN_SIZE:,}, FFN {teacher.ffn:,} → {FFN_SIZE:,}: {cost.line(pace_here('cpu'))}", flush=True)

    ids = torch.randint(teacher.vocab, (options.rows, options.length), generator=torch.Generator().manual_seed(options.seed))
    basis = basis_without(random_directions(teacher.hidden, teacher.hidden - HIDDEN_SIZE, options.seed))
    base = StreamedModel(family, options.folder, config, teacher, torch.device("cpu"))
    times, folder, before = [time.perf_counter()], emptied(options.out / "compensated"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    made = MadeWeights(base, plan, list(ids.split(BATCH)), basis, recipe, folder, on_layer=lambda: times.append(time.perf_counter()))
    made.write(planned_tensors(family, plan, source), max_shard_bytes=SHARD_BYTES)
    times.append(time.perf_counter())
    peak, written = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)

    # A layer is finished once the base is behind it: its writer and its training, the next one's readers and the choice of its neurons follow on_layer.
    steps = [after - earlier for earlier, after in zip(times, times[1:], strict=False)]
    layers = [f"{KINDS[mixer]} {number}" for number, mixer in enumerate(teacher.mixers)]
    for ahead, behind, seconds in zip(["embeddings", *layers], [*layers, "the end"], steps, strict=True):
        print(f"{f'end of {ahead}, beginning of {behind}':<56} {seconds:8.1f} s")
    seconds = times[-1] - times[0]
    print(f"{seconds:.0f} s, planned {planned_seconds:.0f}; peak {peak:.2f} GiB ({before:.2f} before), planned {planned_bytes / GIB:.2f}; "
          f"{written / GIB:.2f} GiB written, {torch.get_num_threads()} threads")  # fmt: skip
    ratios = {"planned_over_taken": planned_seconds / seconds, "memory_planned_over_taken": planned_bytes / GIB / peak}
    print(json.dumps({"benchmark": "compensated_12b", "ratios": ratios, "seconds": seconds, "planned_seconds": planned_seconds,
                      "peak_rss_gib": peak, "planned_gib": planned_bytes / GIB, "steps": steps,
                      "pattern": teacher.pattern, "tokens": options.rows * options.length}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
