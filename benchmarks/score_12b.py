"""Width importance and block influence of a 12B-shaped checkpoint on a small machine, streamed, against its floor.

The floor is the larger of reading the file once (at the rate of a plain read of one shard) and the arithmetic of the
matrix products (2 · parameters of the layers · tokens) at the measured bf16 matrix rate; all measured in this run.
Run: .venv/bin/python benchmarks/make_teacher.py --out DIR, then .venv/bin/python benchmarks/score_12b.py DIR
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from memory_budget.hf_config import architecture_from_config, read_config  # noqa: E402
from memory_budget.parameters import count_parameters  # noqa: E402
from minitron.checkpoints.placement import StreamedModel  # noqa: E402
from minitron.families.known import family_of  # noqa: E402
from minitron.importance.activations import measure_width  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402


def matrix_rate(seconds: float = 5.0) -> float:
    """FLOP/s of bf16 products of an FFN's shape, all threads."""
    a, b = torch.randn(1024, 5120).bfloat16(), torch.randn(20480, 5120).bfloat16()
    torch.nn.functional.linear(a, b)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        torch.nn.functional.linear(a, b)
        done += 2 * 1024 * 5120 * 20480
    return done / (time.perf_counter() - started)


def read_rate(path: Path, most: int = 2**32) -> float:
    """Bytes/s of reading a file from disk: its pages are dropped from the cache first."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer, total, started = bytearray(2**24), 0, time.perf_counter()
        while total < most and (count := file.readinto(buffer)):
            total += count
        return total / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--row", type=int, default=1024, help="tokens per row")
    options = parser.parse_args()
    dispatch.install()
    config = read_config(options.folder)
    architecture = architecture_from_config(config)
    model = StreamedModel(family_of(config), options.folder, config, architecture, torch.device("cpu"))
    ids = torch.randint(architecture.vocab, (options.tokens // options.row, options.row), generator=torch.Generator().manual_seed(0))

    flops_rate, bytes_rate = matrix_rate(), read_rate(model.checkpoint.files[0])
    counts = count_parameters(architecture)
    flops = 2 * (counts["mamba"] + counts["attention"] + counts["ffn"]) * ids.numel()
    size = sum(entry.num_bytes for entry in model.checkpoint.entries.values())
    floor = max(size / bytes_rate, flops / flops_rate)

    laps, started = [time.perf_counter()], time.perf_counter()

    def on_layer() -> None:
        laps.append(time.perf_counter())
        kind = architecture.pattern[len(laps) - 2]
        print(f"layer {len(laps) - 2:2d} {kind}  {laps[-1] - laps[-2]:6.1f} s", flush=True)

    sums = measure_width(model, list(ids.split(1)), on_layer)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(sums.sums)} sites, {sums.num_tokens:,} tokens, {size / 2**30:.1f} GiB: {seconds:.0f} s; floor {floor:.0f} s, the larger of")
    arithmetic = f"{flops / flops_rate:.0f} s at {flops_rate / 1e12:.3f} bf16 TFLOP/s"
    print(f"  reading, {size / bytes_rate:.0f} s at {bytes_rate / 1e9:.2f} GB/s, and arithmetic, {arithmetic}")
    print(f"  over floor {seconds / floor:.2f}, peak resident memory {peak:.2f} GiB")
    result = {"benchmark": "score_12b", "ratios": {"over_floor": seconds / floor}, "over_floor": seconds / floor, "seconds": seconds, "peak_rss_gib": peak,
              "floor_seconds": floor, "flops_per_second": flops_rate, "read_bytes_per_second": bytes_rate, "tokens": sums.num_tokens}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
