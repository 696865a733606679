"""Engines of torch's own: a replica in every process (DDP), or a slice of every tensor (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as distributed
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from distill.engines.engine import Caller, Engine, Unread, layers_of, like
from distill.engines.launch import Launch
from distill.optimizers import build_optimizers
from distill.plan import TrainPlan


class DataParallel(Engine):
    """A replica in every process; gradients are averaged while the last micro-batch's backward pass runs."""

    def _wrap(self, caller: Caller) -> nn.Module:
        devices = [self.device.index] if self.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(caller, device_ids=devices, gradient_as_bucket_view=True)  # else gradients are held twice
        self.optimizers = build_optimizers(caller.model, self.plan)
        return wrapped

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self.wrapped.no_sync():
                yield


class Sharded(Engine):
    """FSDP2: every process keeps its slice of each tensor; a layer is whole only while it runs."""

    def __init__(self, launch: Launch, model: nn.Module | Unread, plan: TrainPlan):
        self.unread = model if isinstance(model, Unread) else None
        super().__init__(launch, self.unread.model if self.unread else model, plan)

    def _wrap(self, caller: Caller) -> nn.Module:
        if self.plan.optimizer == "adamw_8bit":
            raise ValueError("train.optimizer is adamw_8bit, which cannot work on slices of tensors; under FSDP2 it must be adamw or muon")
        if self.unread:
            self.device = self.unread.device
        shard(caller, self.device, bf16=self.plan.precision == "bf16", unread=self.unread)
        self.optimizers = build_optimizers(caller.model, self.plan)
        return caller


def shard(caller: Caller, device: torch.device, *, bf16: bool, unread: Unread | None = None) -> None:
    """FSDP2 over all processes, layer by layer. With bf16 the layers compute in it, and gradients are summed in float32.

    What is `unread` is read now, a tensor at a time, of which every process keeps its slice.
    """
    mesh = torch.distributed.init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in layers_of(caller.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(caller, mesh=mesh, mp_policy=policy)
    if unread:
        caller.to_empty(device=device)
        if getattr(caller.model, "all_tied_weights_keys", None):
            caller.model.tie_weights()  # to_empty makes one parameter of each name
        with torch.no_grad():
            for name, tensor in [*caller.model.named_parameters(), *caller.model.named_buffers()]:
                tensor.copy_(like(unread.read(name), tensor))
