"""How fast a device multiplies matrices, and how long work will take at that rate, said for people."""

import time

import torch

MEASURED_SIZE = 1024  # of the square matrices whose product is timed


def product_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The device's rate of matrix products, measured in a few milliseconds."""
    matrix = torch.randn(MEASURED_SIZE, MEASURED_SIZE, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for it
        seconds.append(time.perf_counter() - started)
    return 2 * MEASURED_SIZE**3 / min(seconds)


def duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:,.0f} minutes" if hours * 60 >= 1.5 else f"{hours * 3600:,.0f} seconds"
    return f"{hours / 8766:,.1f} years" if hours > 8766 else f"{hours:,.1f} hours"
