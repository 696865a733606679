"""How long work takes: counted work over a pace, this machine's or a named device's. Loads no torch.

What torch's work takes on a processor is told by one product of matrices (machine/rate.py) and the few factors below, which docs/plan.md holds against
what was measured. On a GPU, utilisation is the one factor: a share of the bf16 rate that its maker publishes.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path

from minitron.machine.rate import num_threads, product_rate
from nas.throughput import DEVICES

DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")

# Of a processor. Sources: experiment=tiny and make real on two cores with AVX-512 (AMD EPYC, 200 GFLOP/s), the stages' seconds beside their counted work.
PRODUCTS_SHARE = 0.95  # of numpy's rate, of torch's products in a model
DOUBLES_SHARE = 0.40  # of the same, of products in float64: half the numbers in a register, and a little
NUMBERS_PER_SECOND = 6.0e8  # of a thread: numbers that layers keep, with the several passes over memory that making one takes
CALLS_PER_SECOND = 4.0e3  # sublayers that Python calls with next to nothing to compute
READ_BYTES_PER_SECOND, WRITTEN_BYTES_PER_SECOND = 1.0e9, 4.0e8  # of a disk, read and written with what is checked on the way
DECODED_BYTES_PER_SECOND = 8.0e9  # of a thread: weights that pass by for each token decoded
REFERENCE_FLOPS = 1.0e11  # of a thread, where these were measured
# The slower half of what a processor does goes by its clock and not by the width of its registers; a product does not tell the two apart.
CLOCK_EXPONENT = 0.5

# Of a GPU. MO (NVIDIA/Model-Optimizer, examples/pruning): 95 H100-hours for 1e9 tokens of 9B → 7B are 164 TFLOP/s, 17 % of 989 (docs/scale.md).
UTILISATION = 0.17  # what is computed again, and all between the products, is in it
GPU_CALLS_PER_SECOND = 1.0e4  # kernels' launches bind the smallest work, whatever the card
# TFLOP/s in float32 and float64, by data sheets (without tensor cores but in float64 of a100 and h100): what a compensated cut computes in.
CUT_TFLOPS = {"a10g": (31.2, 0.49), "l4": (30.3, 0.47), "rtx4090": (82.6, 1.29), "a100-40": (19.5, 19.5), "a100-80": (19.5, 19.5), "h100-80": (67.0, 67.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What there is to do. FLOP of matrix `products`, those computed `again` in a backward pass, in float32 whatever a model's precision `singles`, in float64
    `doubles`; `numbers` that layers and logits keep on the way; `calls` of sublayers by Python; bytes `read` and `written`, and `decoded`: of weights for
    tokens one at a time; `serial` seconds of anything else, by the clock of the machine that all this was measured on."""

    products: float = 0
    again: float = 0
    singles: float = 0
    doubles: float = 0
    numbers: float = 0
    calls: float = 0
    read: float = 0
    written: float = 0
    decoded: float = 0
    serial: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, times: float) -> "Work":
        return Work(**{f.name: getattr(self, f.name) * times for f in fields(self)})


@dataclass(frozen=True, slots=True)
class Pace:
    """Units of every kind of work that one process does in a second; `processes` share what can be shared."""

    name: str
    rates: Work
    processes: int = 1

    def seconds(self, work: Work, *, shared: bool = False) -> float:
        """Of all the work; divided by the processes where each takes its share."""
        spent = sum(getattr(work, f.name) / rate for f in fields(work) if (rate := getattr(self.rates, f.name)))
        return spent / (self.processes if shared else 1)


def machine_pace(flops_per_second: float, threads: int, processes: int = 1) -> Pace:
    """Of a processor whose threads together multiply float32 matrices at this rate."""
    clock = (flops_per_second / threads / REFERENCE_FLOPS) ** CLOCK_EXPONENT
    products, doubles = PRODUCTS_SHARE * flops_per_second, DOUBLES_SHARE * flops_per_second
    rates = Work(
        products=products, again=products, singles=products, doubles=doubles,
        numbers=NUMBERS_PER_SECOND * threads * clock, calls=CALLS_PER_SECOND * clock, read=READ_BYTES_PER_SECOND, written=WRITTEN_BYTES_PER_SECOND,
        decoded=DECODED_BYTES_PER_SECOND * threads * clock, serial=clock,
    )  # fmt: skip
    return Pace("this machine", rates, processes)


def device_pace(name: str, gpus: int = 1) -> Pace:
    """Of GPUs of a kind in nas.throughput's table, one a process."""
    device, (singles, doubles) = DEVICES[name], CUT_TFLOPS[name]
    rates = Work(
        products=UTILISATION * device.flops_per_second, singles=0.5e12 * singles, doubles=0.5e12 * doubles, calls=GPU_CALLS_PER_SECOND,
        read=READ_BYTES_PER_SECOND, written=READ_BYTES_PER_SECOND, decoded=0.7 * device.bytes_per_second, serial=1.0,
    )  # fmt: skip
    return Pace(f"{gpus} × {name}", rates, gpus)


def pace_here(kind: str, processes: int = 1) -> Pace | None:
    """Of what this process computes on, a cpu or cuda; None for a GPU that is not in the table."""
    if kind == "cpu":
        return machine_pace(product_rate(), num_threads(), processes)
    known = next((name for gpu in gpu_names() if (name := device_named(gpu))), None)
    return device_pace(known, processes) if known else None


def gpu_names() -> list[str]:
    """NVIDIA GPUs of this machine, by the driver's own words, as far as CUDA_VISIBLE_DEVICES leaves any to see."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return []
    texts = [path.read_text(errors="replace") for path in sorted(DRIVER_FOLDER.glob("*/information"))]
    return [line.partition(":")[2].strip() for text in texts for line in text.splitlines() if line.startswith("Model:")]


def device_named(gpu: str) -> str | None:
    """The device of the table that a driver calls so, NVIDIA A100-SXM4-80GB say; None where there is none."""
    for word, device in (("A10G", "a10g"), ("L4 ", "l4"), ("RTX 4090 ", "rtx4090"), ("A100", "a100-80" if "80GB" in gpu else "a100-40"), ("H100", "h100-80")):
        if word in f"{gpu} ":
            return device
    return None
