"""What the tool does on one GPU: the loss, distillation steps, the memory report, scoring and screening, at the 12B's shape.

Weights are random, of the published sizes, made on the device; nothing is downloaded. Both sides of a ratio run in turns, medians.
Model FLOPs utilisation (MFU) counts the products that the models define (minitron/training/time.py), not what checkpointing computes
again, and divides by the vendor's dense bf16 rate where it is known here.
The rows come in the order of their worth. The result's file is written anew after each, so whatever ends the run leaves those before; a row that fails
says why in the file, and the others go on. `--minutes` leaves out rows that would hardly end in time. Whether the kernels give the right numbers is what
tests/minitron/test_gpu.py asks; here it would cost one more set of tuned kernels.
Run: .venv/bin/python benchmarks/gpu.py [--minutes 6] [--out FOLDER]; on a machine without GPU `--device cpu --tiny` runs every row on toys.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import date
from pathlib import Path

STARTED = time.perf_counter()  # importing counts: --minutes is about the whole command
# Before torch and Triton are imported: which kernels were the fastest stays on disk; memory is taken in pieces that grow.
SWITCHES = {"TRITON_CACHE_AUTOTUNING": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
for switch, value in SWITCHES.items():
    os.environ.setdefault(switch, value)

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_rows  # noqa: E402
from benchmarks.gpu_rows import TINY, Figures, Sizes, free_memory, medians  # noqa: E402
from minitron.importance.scores import ImportanceScores  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402
from minitron.mamba.kernels import check_bf16, unusable_kernel  # noqa: E402

__all__ = ["TINY", "Sizes", "measure", "medians"]
Row = Figures | dict[str, str]  # figures, or {"error": why}, or {"skipped": why}


@dataclass(frozen=True)
class Subject:
    """What rows are measured on; the model of the 12B's shape and its scores are made when a row first asks for them."""

    sizes: Sizes
    device: torch.device

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        return gpu_rows.random_model(self.sizes.teacher, self.device, self.dtype)

    @functools.cached_property
    def scores(self) -> ImportanceScores:
        return gpu_rows.width_scores(self.model, self.sizes, self.device)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def _small_pair(subject: Subject) -> Figures:
    sizes = subject.sizes
    train = gpu_rows.train_settings(sizes, large=False)
    return gpu_rows.distillation(sizes.small_teacher, sizes.small_student, train, sizes.trained[1], subject.device)


def _largest_pair(subject: Subject) -> Figures:
    sizes, train = subject.sizes, gpu_rows.train_settings(subject.sizes, large=True)
    pair = gpu_rows.largest_pair(sizes, train, sizes.trained_large[1], subject.device)
    return gpu_rows.distillation(*pair, train, sizes.trained_large[1], subject.device)


# In the order of their worth, with the seconds that a row is given on one H100 before it is begun: guesses from counts (the first row with Mamba layers
# tunes some 110 kernels, 1 to 2 s each), to be replaced by `row_seconds` of a result. Screening sorts the model's weights, so it comes last.
ROWS: dict[str, tuple[float, Callable[[Subject], Figures]]] = {
    "distillation loss": (15, lambda of: gpu_rows.loss(of.sizes, of.device, of.dtype)),
    "distillation, about 1B": (200, _small_pair),
    "distillation, largest pair": (60, _largest_pair),
    "memory report": (30, lambda of: gpu_rows.memory(of.model, of.sizes, of.device)),
    "width scoring": (20, lambda of: gpu_rows.width_scoring(of.model, of.sizes, of.device)),
    "depth scoring": (40, lambda of: gpu_rows.depth_scoring(of.model, of.sizes, of.device)),
    "zero-shot screening": (30, lambda of: gpu_rows.screening(of.model, of.scores, of.sizes, of.device)),
}


def measure(
    sizes: Sizes, device: torch.device, say: Callable[[str, Row], None], *, only: Collection[str] = (), seconds_left: Callable[[], float] = lambda: math.inf
) -> None:
    """Every row, or only those named, told to `say` as soon as it is there: its figures, why it failed, or why it was left out."""
    subject = Subject(sizes, device)
    for name in only or ROWS:
        (seconds, row), left = ROWS[name], seconds_left()
        if seconds > left:
            say(name, {"skipped": f"{max(0, left):.0f} s are left of the time given, about {seconds:.0f} s are needed"})
            continue
        free_memory(device)
        say(name, _figures_or_error(row, subject))


def _figures_or_error(row: Callable[[Subject], Figures], subject: Subject) -> Row:
    try:
        return row(subject)
    except Exception as error:  # out of memory, a kernel, our own mistake: the other rows are worth having
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500] + f" ({Path(place.filename).name}:{place.lineno})"}


class Result:
    """The result's JSON file, whole at any time: written beside and renamed, after every row."""

    def __init__(self, folder: Path, device: torch.device, *, tiny: bool) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.started = self.row_started = time.perf_counter()
        self.content = {"benchmark": "gpu", "device": name, "date": date.today().isoformat(), "versions": versions(), "tiny": tiny,
                        "switches": {switch: os.environ.get(switch, "") for switch in (*SWITCHES, "MAMBA_DETERMINISTIC")},
                        "seconds": 0.0, "rows": {}, "row_seconds": {}}  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"gpu-{'-'.join(name.lower().split())}-{self.content['date']}.json"

    def add(self, name: str, row: Row) -> None:
        now = time.perf_counter()
        self.content["rows"][name], self.content["row_seconds"][name] = row, now - self.row_started
        self.content["seconds"], self.row_started = now - self.started, now
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        beside.replace(self.path)
        told = (f"{label} {value:,.4g}" if isinstance(value, float | int) else f"{label}: {value}" for label, value in row.items())
        print(f"{name:<27}" + " · ".join(told), flush=True)


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    for name in ("triton", "mamba-ssm", "causal-conv1d"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found | {"cuda": torch.version.cuda or "none"}


def check_device(device: torch.device, *, tiny: bool) -> None:
    """Raises ValueError, one line, where the rows cannot run on this device."""
    dispatch.install()
    if device.type == "cpu":
        if not tiny:
            raise ValueError("--device is cpu, which would take days at the 12B's shape; give --tiny too")
        return
    if not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no CUDA device; try the rows on a CPU with --device cpu --tiny")
    check_bf16(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if told := unusable_kernel():
        raise ValueError(told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toys instead of the 12B's shape")
    parser.add_argument("--minutes", type=float, default=math.inf, help="leave out rows that would hardly end within so many minutes")
    parser.add_argument("--only", action="append", choices=ROWS, default=[], help="measure this row alone; can be given several times")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", help="folder for the result's JSON file")
    options = parser.parse_args()
    device = torch.device(options.device)
    try:
        check_device(device, tiny=options.tiny)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = Result(options.out, device, tiny=options.tiny)
    sizes, ends = TINY if options.tiny else Sizes(), STARTED + 60 * options.minutes
    measure(sizes, device, result.add, only=options.only, seconds_left=lambda: ends - time.perf_counter())
    print(json.dumps(result.content))
    return 1 if any("error" in row for row in result.content["rows"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
