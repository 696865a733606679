"""Several processes of one run, as `accelerate launch` or torchrun start them. With one process everything here is a no-op."""

import os
from typing import Any

import numpy as np


def rank() -> int:
    """This process's number, 0 for the one that writes and speaks."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch(device: str, *, processes_here: int, gpus_here: int) -> None:
    """Raises ValueError where more processes were launched on this machine than it has GPUs, one a process: with none at all, NCCL has nothing to talk over.

    `device` is the setting; with cpu, or auto where there is no GPU, processes talk over gloo, as many as wanted.
    """
    if processes_here == 1 or device == "cpu" or (device == "auto" and gpus_here == 0):
        return
    if gpus_here == 0:
        raise ValueError(f"device is {device}, but torch sees no GPU here, and num_processes puts {processes_here} processes on this machine, each of which "
                         "needs one for NCCL; it must be cpu or auto")  # fmt: skip
    if processes_here > gpus_here:
        raise ValueError(f"num_processes puts {processes_here} processes on this machine, where torch sees {gpus_here} GPU{'s' * (gpus_here > 1)}; "
                         f"it must be at most one a GPU, or device=cpu")  # fmt: skip


def check_this_launch(device: str) -> None:
    """check_launch for the processes that were started with this one."""
    if world_size() > 1:
        import torch

        check_launch(device, processes_here=int(os.environ.get("LOCAL_WORLD_SIZE", world_size())), gpus_here=torch.cuda.device_count())


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """The float64 sum over all processes, given to each."""
    if world_size() == 1:
        return values
    import torch
    import torch.distributed as distributed

    from distill.engines.launch import waiting_group

    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64).copy())
    distributed.all_reduce(tensor, group=waiting_group())
    return tensor.numpy()


def from_first(value: Any) -> Any:
    """Process 0's value, given to each; the others wait for it."""
    if world_size() == 1:
        return value
    import torch.distributed as distributed

    from distill.engines.launch import waiting_group

    box = [value]
    distributed.broadcast_object_list(box, src=0, group=waiting_group())
    return box[0]
