"""What differs between one process and several: wrapping the model, the sums over processes, and whole tensors for saving.

An engine's gradients are those of the loss summed over all processes. Its `entries` give every weight and every tensor of
the optimisers whole, one at a time, whatever is sharded, so a saved state fits every engine and number of processes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.launch import Launch, join_processes
from distill.optimizers import build_optimizers
from distill.plan import TrainPlan


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a state. `whole` gives it on the CPU; all processes must call it, in the order of the entries."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    whole: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Unread:
    """A model on the meta device and a function that gives a tensor of it by name: under FSDP2 no process ever holds it whole."""

    model: nn.Module
    read: Callable[[str], torch.Tensor]
    device: torch.device


class Caller(nn.Module):
    """Runs a function of the model within one forward call: only there do the engines' hooks hold sharded weights whole."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


class Engine:
    """One process. The others override what differs."""

    def __init__(self, launch: Launch, model: nn.Module, plan: TrainPlan):
        self.launch, self.model, self.plan = launch, model, plan
        self.device = next(model.parameters()).device
        if plan.gradient_checkpointing:
            model.activation_checkpointing_enable()
        self.wrapped = self._wrap(Caller(model))
        self.parameters = dict(model.named_parameters())

    def _wrap(self, caller: Caller) -> nn.Module:
        self.optimizers = build_optimizers(caller.model, self.plan)
        return caller

    def measure(self, function: Callable[..., Any], rows_BT: torch.Tensor) -> Any:
        """The function's value on the model and rows, under the plan's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16"):
            return self.wrapped(function, rows_BT.to(self.device))

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; `last` is the one that completes a step's gradients."""
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar. Engines take the mean over processes, a step's loss is a sum over them."""
        (loss * self.launch.world_size).backward()

    def update(self, rate: float) -> float:
        """Move the weights by their gradients and drop these; returns their norm before clipping.

        Where the norm is not finite, the weights stay.
        """
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip_norm)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if norm < float("inf"):  # false for nan too
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
        self.drop_gradients()
        return norm

    def drop_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def start_phase(self, plan: TrainPlan) -> None:
        """Another plan with a fresh optimiser."""
        self.plan = plan
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def sum(self, values: list[float]) -> list[float]:
        """The sums over all processes, given to each."""
        if self.launch.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor)
        return tensor.tolist()

    def weights(self) -> list[Entry]:
        """Parameters and stored buffers as `model.<name>`."""
        stored = set(self.model.state_dict())
        tensors = {**self.parameters, **{name: buffer for name, buffer in self.model.named_buffers() if name in stored}}
        return [Entry(f"model.{name}", tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: _whole(tensor)) for name, tensor in tensors.items()]

    def optimizer_state(self) -> list[Entry]:
        """Tensors of the optimisers as `optimizer.<parameter's name>.<key>`."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return [
            Entry(f"optimizer.{names[id(parameter)]}.{key}", tuple(value.shape), value.dtype, lambda value=value: _whole(value))
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, value in sorted(state.items())
        ]

    def entries(self) -> list[Entry]:
        return self.weights() + self.optimizer_state()

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Any], read: Callable[[str], torch.Tensor]) -> None:
        """Take over a saved state: `tensors` has its names, `read` gives one of them whole."""
        for entry_name, tensor in [*self.parameters.items(), *self.model.named_buffers()]:
            if f"model.{entry_name}" in tensors:
                tensor.copy_(_like(read(f"model.{entry_name}"), tensor))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = self._restored(parameter, group, tensors, read)

    def _restored(self, parameter: torch.Tensor, group: dict, tensors: Mapping[str, Any], read: Callable[[str], torch.Tensor]) -> dict:
        prefix = f"optimizer.{next(name for name, value in self.parameters.items() if value is parameter)}."
        state = {}
        for name in tensors:
            if name.startswith(prefix) and "." not in name.removeprefix(prefix):
                value = read(name)
                moves = value.shape == parameter.shape or group.get("fused")  # AdamW counts its steps on the CPU unless fused
                state[name.removeprefix(prefix)] = _like(value, parameter) if value.shape == parameter.shape else value.to(parameter.device if moves else "cpu")
        return state


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
        with torch.no_grad():
            for name, tensor in [*caller.model.named_parameters(), *caller.model.named_buffers()]:
                tensor.copy_(_like(unread.read(name), tensor))


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers: its longest list of modules."""
    return list(max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len))


def open_engine(launch: Launch, model: nn.Module | Unread, plan: TrainPlan) -> Engine:
    """The engine of a launch around a model. Raises ValueError for what it cannot do."""
    if launch.engine == "single":
        return Engine(launch, model, plan)
    join_processes()
    if launch.engine == "ddp":
        return DataParallel(launch, model, plan)
    if launch.engine == "fsdp2":
        return Sharded(launch, model, plan)
    from distill.zero import Zero  # DeepSpeed is an extra

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
        from distill.zero import place_in_slices

        return place_in_slices(caller)
    return caller


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _like(whole: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of another, in slices where that is."""
    whole = whole.to(tensor.device, tensor.dtype)
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None) if isinstance(tensor, DTensor) else whole
