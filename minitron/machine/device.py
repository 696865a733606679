"""Where a run computes."""

import functools
import gc
import os
import sys

import torch

from minitron.mamba import dispatch
from minitron.mamba.kernels import check_bf16, unusable_kernel
from minitron.settings.run import Settings


def pick_device(settings: Settings) -> torch.device:
    """The device of the settings; auto takes CUDA where there is one. What computes a Mamba-2 layer there is put in place.

    Raises ValueError where cuda is asked for and there is none, and for a GPU without bf16.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no CUDA device; use cpu or auto")
    dispatch.install()
    if settings.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    check_bf16(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    _say_once(unusable_kernel())
    return device


@functools.cache
def _say_once(wrong: str | None) -> None:
    """Mamba-2 then runs plain torch on the GPU: right, and slow."""
    if wrong:
        print(f"note: {wrong}; going on without it, much slower", file=sys.stderr)


def process_memory_bytes(device: torch.device) -> tuple[int, str]:
    """Memory that this process may take on a device, what torch's allocator has kept for it included, and what to call the place."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept, f"{torch.cuda.get_device_name(device)}"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return available_memory_bytes() // processes, "this machine, by what is free now," + (f" for each of {processes} processes" if processes > 1 else "")


def let_go() -> None:
    """Give what torch's allocator keeps of a GPU's memory back, so that the next stage, or another process, finds it free."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def available_memory_bytes() -> int:
    """Memory that new work can take without swapping, in bytes."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
