"""A checkpoint of published shape with seeded random weights, written shard by shard in the Hub's layout.

Run: .venv/bin/python benchmarks/make_teacher.py --preset nano2-12b --out DIR   (24.6 GB; --preset nano3-30b --layers 10: 12.3 GB)
"""

import argparse
import json
import math
import resource
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from memory_budget.architecture import Architecture  # noqa: E402
from memory_budget.hf_config import architecture_from_config, read_config  # noqa: E402
from memory_budget.parameters import count_total_parameters  # noqa: E402
from memory_budget.units import GIB  # noqa: E402
from minitron.checkpoints.files import PIECE_BYTES, PlannedTensor  # noqa: E402
from minitron.checkpoints.shards import write_weights  # noqa: E402
from minitron.families.nemotron_h import FAMILY  # noqa: E402
from minitron.families.table import BUFFER, expected_shape, required_names, row_of  # noqa: E402
from minitron.settings.teachers import CONF_FOLDER  # noqa: E402
from minitron.walk.store import write_json  # noqa: E402

PRESETS = {name: CONF_FOLDER / "architectures" / f"nemotron-{file}.json" for name, file in (("nano2-12b", "nano-12b-v2-base"), ("nano3-30b", "3-nano-30b-a3b"))}


def random_rows(name: str, shape: tuple[int, ...], first: int, seed: int) -> torch.Tensor:
    """Rows of a tensor from `first` on, `shape` in all, of a size that keeps activations near 1, bf16, and float32 of a router's correction; the same for the
    same arguments."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {first}".encode()) + seed)
    if name.endswith("A_log"):
        return torch.log(1 + 15 * torch.rand(shape, generator=generator)).bfloat16()
    if name.endswith("dt_bias"):
        steps = torch.exp(torch.rand(shape, generator=generator) * math.log(100) + math.log(1e-3))
        return (steps + torch.log(-torch.expm1(-steps))).bfloat16()
    if BUFFER.search(name):
        return 0.01 * torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return (1 + 0.1 * torch.randn(shape, generator=generator)).bfloat16()
    scale = 1.0 if name.startswith("embeddings") else math.prod(shape[1:]) ** -0.5
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, scale, generator=generator)


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """A tensor in pieces."""
    step = max(1, PIECE_BYTES // (2 * math.prod(shape[1:])))
    return (random_rows(name, (min(step, shape[0] - first), *shape[1:]), first, seed) for first in range(0, shape[0], step))


def planned_tensors(architecture: Architecture, seed: int) -> Iterator[PlannedTensor]:
    for name in required_names(FAMILY, architecture):
        row = row_of(FAMILY, architecture, name)
        shape = expected_shape(FAMILY, architecture, row)
        yield PlannedTensor(FAMILY.file_name(name), "F32" if row.buffer else "BF16", shape, lambda name=name, shape=shape: random_tensor(name, shape, seed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="nano2-12b")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="the first so many layers alone")
    parser.add_argument("--pattern", help="layers of these kinds in place of the published ones, M-* say")
    options = parser.parse_args()
    config = read_config(PRESETS[options.preset])
    architecture = architecture_from_config(config)
    architecture = replace(architecture, pattern=options.pattern or architecture.pattern[: options.layers])
    size = 2 * count_total_parameters(architecture)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        write_weights(options.out, planned_tensors(architecture, options.seed), max_shard_bytes=int(4.5 * GIB))
    except ValueError as error:  # too little room on the disk
        print(f"error: --out: {error}", file=sys.stderr)
        return 2
    write_json(options.out / "config.json", FAMILY.hf_config(config, architecture) | {"dtype": "bfloat16"})
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{options.out}: {size / GIB:.2f} GiB in {seconds:.0f} s, peak resident memory {peak:.2f} GiB")
    print(json.dumps({"benchmark": "make_teacher", "parameters": size // 2, "seconds": seconds, "peak_rss_gib": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
