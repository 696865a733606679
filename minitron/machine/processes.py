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
