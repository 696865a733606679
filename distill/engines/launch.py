"""How this process was started: alone, or as one of several by `accelerate launch` or torchrun, and with which engine.

accelerate starts the processes and says by environment variables what was asked for; nothing here guesses. What
would silently train something else (its MULTI_CPU starts one process, an FSDP1 config, a mixed precision that nobody
reads) is refused.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that plans know a launch without torch
    import torch.distributed as distributed


@dataclass(frozen=True, slots=True)
class Launch:
    """`engine` is single, ddp, fsdp2, zero2 or zero3; `rank` counts from 0 to `world_size` - 1."""

    engine: str = "single"
    rank: int = 0
    world_size: int = 1

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds all weights."""
        return self.engine in ("fsdp2", "zero3")


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """The launch that the environment tells of. Raises ValueError for one that would not do what its config says."""
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if environment.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise ValueError(f"accelerate's mixed_precision is {environment['ACCELERATE_MIXED_PRECISION']!r}; it must be 'no', distill.train.precision says it")
    if "WORLD_SIZE" not in environment:
        if by_accelerate and ("MASTER_PORT" in environment or _asked_for(environment) != "ddp"):
            raise ValueError(
                "accelerate was asked for several processes and started one (distributed_type MULTI_CPU does that); take a config of conf/accelerate"
            )
        return Launch()
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    engine = _asked_for(environment)
    return Launch("single" if (engine, world_size) == ("ddp", 1) else engine, rank, world_size)


def _asked_for(environment: Mapping[str, str]) -> str:
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        if environment.get("FSDP_VERSION") != "2":
            raise ValueError(f"accelerate's fsdp_version is {environment.get('FSDP_VERSION')}; it must be 2")
        if environment.get("FSDP_OFFLOAD_PARAMS") == "true":
            raise ValueError("accelerate's fsdp_offload_params is true; it must be false")
        return "fsdp2"
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        if stage not in ("2", "3"):
            raise ValueError(f"accelerate's deepspeed_config has zero_stage {stage}; it must be 2 or 3")
        for part in ("OPTIMIZER", "PARAM"):
            device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE", "none")
            if device != "none":
                raise ValueError(f"accelerate's offload_{part.lower()}_device is {device}; it must be none")
        return f"zero{stage}"
    if environment.get("ACCELERATE_USE_MEGATRON_LM") == "true":
        raise ValueError("accelerate's distributed_type is MEGATRON_LM; it must be MULTI_GPU, FSDP or DEEPSPEED")
    return "ddp"


# What computes in lock-step and is not there after so long hangs, say since a process died; others wait for the first one's own work, which may be days.
COMPUTING, WAITING = timedelta(minutes=30), timedelta(days=7)
_groups: dict[str, "distributed.ProcessGroup"] = {}


def waiting_group() -> "distributed.ProcessGroup":
    """All processes, to wait in for what the first one does alone: gloo, with days of patience."""
    join_processes()
    return _groups["waiting"]


def join_processes() -> None:
    """The group of all processes: gloo for what is in main memory, NCCL for what is on GPUs. Asserts that it is as large as was said."""
    import torch
    import torch.distributed as distributed

    if not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=COMPUTING)
        _groups["waiting"] = distributed.new_group(backend="gloo", timeout=WAITING)
    assert distributed.get_world_size() == int(os.environ["WORLD_SIZE"]), "the group of processes is not the one that was launched"
