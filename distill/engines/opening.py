"""Which engine a launch gets, and where the frozen teacher goes."""

from torch import nn

from distill.engines.engine import Caller, Engine, Unread
from distill.engines.launch import Launch, join_processes
from distill.engines.parallel import DataParallel, Sharded, shard
from distill.plan import TrainPlan


def open_engine(launch: Launch, model: nn.Module | Unread, plan: TrainPlan) -> Engine:
    """The engine of a launch around a model. Raises ValueError for what it cannot do."""
    if launch.engine == "single":
        return Engine(launch, model, plan)
    join_processes()
    if launch.engine == "ddp":
        return DataParallel(launch, model, plan)
    if launch.engine == "fsdp2":
        return Sharded(launch, model, plan)
    from distill.engines.zero import Zero  # DeepSpeed is an extra

    return Zero(launch, model, plan)


def place_teacher(launch: Launch, teacher: nn.Module | Unread) -> nn.Module:
    """The frozen teacher, called as `placed(function, *arguments)`; in slices where the student is."""
    unread = teacher if isinstance(teacher, Unread) else None
    caller = Caller((unread.model if unread else teacher).eval().requires_grad_(False))
    if launch.engine == "fsdp2":
        join_processes()
        shard(caller, unread.device if unread else next(teacher.parameters()).device, bf16=False, unread=unread)
    if launch.engine == "zero3":
        join_processes()
        from distill.engines.zero import place_in_slices

        return place_in_slices(caller)
    return caller
