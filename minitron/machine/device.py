"""Where a run computes."""

import functools
import gc
import os
import sys

import torch

from minitron.machine.memory import process_share_bytes
from minitron.machine.memory_plan import MemoryPlan
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


def bf16_pays(device: torch.device) -> bool:
    """Whether a layer is trained more quickly with products of bf16: on every GPU that is used, and on processors with instructions for them (a step of a
    feed-forward layer of 504 and 1,152 on 2,048 tokens: 0.11 s in place of 0.23 on an EPYC with AVX-512 and no AMX)."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
    return process_share_bytes()


def check_on_gpu(plan: MemoryPlan, device: torch.device) -> None:
    """Raises ValueError where a GPU has less than the plan wants. On a CPU, where layers go by blocks, less is taken, and nothing is refused by it."""
    if device.type == "cuda":
        plan.check(*process_memory_bytes(device))


def let_go() -> None:
    """Give what torch's allocator keeps of a GPU's memory back, so that the next stage, or another process, finds it free."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
