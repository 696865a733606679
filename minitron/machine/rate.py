"""How fast this machine multiplies matrices, measured once and kept; and how long work takes, said for people. Loads no torch."""

import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.machine.kept import read_kept, write_kept

if TYPE_CHECKING:
    import torch

# Of the square matrices whose product is timed. BLAS gives one that is small enough to one thread: over in microseconds, it is as quick beside other work,
# which a product of all threads is not, since they wait for each other.
MEASURED_SIZE, MEASURED_SIZE_BY_ONE, MEASURED_SIZE_ON_GPU = 768, 96, 1024
BY_ALL_THREADS = 0.93  # of what one does, times their number: found with two
MEASURED_SECONDS = 0.3
MOST_TRIES = 5  # while other work runs; the best of them stays
KEPT_FILE = "rates.json"  # by processor and threads


def product_rate() -> float:
    """FLOP/s of a product of float32 matrices on this machine's processor, by numpy; kept once it was measured while nothing else ran."""
    name, kept = f"{_processor()}, {num_threads()} threads", _kept_rates()
    found = kept.get(name, {"flops_per_second": 0.0, "tries": 0})
    if found["tries"] >= MOST_TRIES:
        return found["flops_per_second"]
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * num_threads():  # other work can only have slowed it down
        rate, tries = max(BY_ALL_THREADS * num_threads() * _measured(MEASURED_SIZE_BY_ONE), found["flops_per_second"]), found["tries"] + 1
    else:
        rate, tries = _measured(MEASURED_SIZE), MOST_TRIES
    write_kept(KEPT_FILE, kept | {name: {"flops_per_second": rate, "tries": tries}})
    return rate


def num_threads() -> int:
    """Threads that numpy and torch compute with here: OMP_NUM_THREADS, else the cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_product_rate(device: "torch.device", dtype: "torch.dtype") -> float:
    """A GPU's rate of matrix products, measured in a few milliseconds."""
    import torch

    matrix = torch.randn(MEASURED_SIZE_ON_GPU, MEASURED_SIZE_ON_GPU, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for it
        seconds.append(time.perf_counter() - started)
    return 2 * MEASURED_SIZE_ON_GPU**3 / min(seconds)


def duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:,.0f} minutes" if hours * 60 >= 1.5 else f"{hours * 3600:,.0f} seconds"
    return f"{hours / 8766:,.1f} years" if hours > 8766 else f"{hours:,.1f} hours"


def _measured(size: int) -> float:
    import numpy as np

    matrix = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    product, fastest, began = np.empty_like(matrix), float("inf"), time.perf_counter()
    while time.perf_counter() - began < MEASURED_SECONDS:
        started = time.perf_counter()
        np.matmul(matrix, matrix, out=product)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest


def _processor() -> str:
    """The processor's model and its widest instructions that numpy and torch may use: virtual machines of one model differ in those."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.partition("\n\n")[0].splitlines() if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    widest = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in named.get("flags", "").split()]
    return " ".join([named.get("model name", platform.machine()), *widest])


def _kept_rates() -> dict[str, Any]:
    """By processor and threads; without what is no rate."""
    return {name: found for name, found in read_kept(KEPT_FILE).items() if _is_rate(found)}


def _is_rate(found: Any) -> bool:
    try:
        return found["flops_per_second"] > 0 and found["tries"] > 0
    except (TypeError, KeyError):
        return False
