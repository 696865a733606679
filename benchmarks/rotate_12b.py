"""Rotating and slicing a 12B-shaped checkpoint to the published 9B, from disk to disk, against the plain cut of the same checkpoint.

The directions left out are random, and nothing is refitted: what a rotation costs is the same whichever they are. Base and student walk --tokens
random tokens for the norms' scales, one number each. The floor is the plain cut and the rotation's matrix products at the rate measured in this run.
Run: .venv/bin/python benchmarks/make_teacher.py --out DIR, then .venv/bin/python benchmarks/rotate_12b.py DIR --out EMPTY_DIR
"""

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.prune_12b import SHARD_BYTES, cut, drop_from_cache, emptied, published_student  # noqa: E402
from memory_budget.hf_config import architecture_from_config, read_config  # noqa: E402
from minitron.checkpoints.files import Checkpoint  # noqa: E402
from minitron.checkpoints.placement import StreamedModel  # noqa: E402
from minitron.checkpoints.publish import write_companions  # noqa: E402
from minitron.families.known import family_of  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402
from minitron.pruning.basis import basis_without  # noqa: E402
from minitron.pruning.compensate import Recipe  # noqa: E402
from minitron.pruning.compensated_cut import MadeWeights  # noqa: E402
from minitron.pruning.disk_to_disk import planned_tensors  # noqa: E402
from minitron.pruning.plan import PruningPlan  # noqa: E402

RECIPE = Recipe(refit_reading=False, refit_writing=False)


def random_directions(width: int, number: int, seed: int) -> torch.Tensor:
    """Orthonormal columns [width, number], float64."""
    return torch.linalg.qr(torch.randn(width, number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def rotation_flops(plan: PruningPlan, shapes: dict[str, tuple[int, ...]]) -> int:
    """Of every matrix that meets the stream times the basis, as a product of two factors (minitron/pruning/basis.py)."""
    hidden, wide = plan.student.hidden, plan.teacher.hidden
    return sum(4 * shape[0] * shape[1] * (wide - hidden) for shape in shapes.values() if len(shape) == 2 and hidden in shape)


def matrix_rate(width: int) -> float:
    """FLOP/s of float32 products of rows with a square matrix, all threads, best of three."""
    rows, matrix, seconds = torch.randn(8192, width), torch.randn(width, width), []
    for _ in range(3):
        started = time.perf_counter()
        rows @ matrix
        seconds.append(time.perf_counter() - started)
    return 2 * 8192 * width**2 / min(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint that make_teacher.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in, on the disk to be measured; 17 GiB, emptied before and after")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dispatch.install()
    config, source = read_config(options.folder), Checkpoint(options.folder)
    family, plan = family_of(config), published_student(architecture_from_config(config), options.seed)
    sliced = planned_tensors(family, plan, source)
    cut_seconds = cut(source, sliced, emptied(options.out / "cut"))
    shutil.rmtree(options.out / "cut")
    print(f"plain cut {cut_seconds:6.1f} s", flush=True)

    drop_from_cache(source)
    folder, started = emptied(options.out / "rotated"), time.perf_counter()
    base = StreamedModel(family, options.folder, {**config, "dtype": "float32"}, plan.teacher, torch.device("cpu"))
    ids = torch.randint(plan.teacher.vocab, (1, options.tokens), generator=torch.Generator().manual_seed(options.seed))
    basis = basis_without(random_directions(plan.teacher.hidden, plan.teacher.hidden - plan.student.hidden, options.seed))
    made = MadeWeights(base, plan, [ids], basis, RECIPE, folder)
    made.write(sliced, max_shard_bytes=SHARD_BYTES)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"rotated   {seconds:6.1f} s, peak {peak:.2f} GiB", flush=True)

    student_config = family.hf_config(config, plan.student)
    write_companions(folder, config=student_config, companions=options.folder, card="")
    started, found = time.perf_counter(), made.check(student_config)
    check_seconds, parameters = time.perf_counter() - started, Checkpoint(folder).num_parameters
    flops, rate = rotation_flops(plan, {tensor.name: tensor.shape for tensor in sliced}), matrix_rate(plan.teacher.hidden)
    floor = cut_seconds + flops / rate
    shutil.rmtree(folder)
    print(f"{parameters:,} parameters, {found}, in {check_seconds:.1f} s, {torch.get_num_threads()} threads")
    print(f"{seconds / cut_seconds:.2f} × the plain cut; floor {floor:.1f} s: the cut and {flops:.2e} FLOP at {rate / 1e9:.0f} GFLOP/s")
    print(json.dumps({"benchmark": "rotate_12b", "ratios": {"time_over_cut": seconds / cut_seconds, "over_floor": seconds / floor}, "seconds": seconds,
                      "cut_seconds": cut_seconds, "peak_rss_gib": peak, "parameters": parameters, "tokens": options.tokens}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
