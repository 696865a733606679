"""What differs between one process and several: wrapping the model, the sums over processes, and whole tensors for saving.

An engine's gradients are those of the loss summed over all processes. Its `entries` give every weight and every tensor of
the optimisers whole, one at a time, whatever is sharded, so a saved state fits every engine and number of processes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as distributed
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distill.engines.host_memory import keep_in_host_memory
from distill.engines.launch import Launch
from distill.engines.loads import Loads
from distill.optimizers import build_optimizers
from distill.plan import TrainPlan


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a state. `whole` gives it, in the first process on the CPU; all processes must call it, in the order of the entries."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    whole: Callable[[], torch.Tensor]


class Stored(Protocol):
    """The tensors of a saved state."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def whole(self, name: str) -> torch.Tensor: ...

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Some rows, indices of the first dimension."""


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


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers: its longest list of modules that is in no other one."""
    return list(max(_lists_of(model)[0], key=len))


def choices_of(model: nn.Module) -> list[nn.ModuleList]:
    """Lists of modules within layers, such as experts: which of them are called depends on the tokens, so it differs between processes."""
    return _lists_of(model)[1]


def _lists_of(model: nn.Module) -> tuple[list[nn.ModuleList], list[nn.ModuleList]]:
    """The model's lists of modules that are in no other one, and those that are."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    inner = [any(name.startswith(f"{other}.") for other in lists) for name in lists]
    outermost, within = ([module for module, is_inner in zip(lists.values(), inner, strict=True) if is_inner == wanted] for wanted in (False, True))
    return outermost, within


class Engine:
    """One process. The others override what differs."""

    def __init__(self, launch: Launch, model: nn.Module, plan: TrainPlan):
        self.launch, self.model, self.plan = launch, model, plan
        self.device = next(model.parameters()).device
        self.loads = Loads(model)
        for name, parameter in model.named_parameters():
            if plan.frozen and name.endswith(plan.frozen):
                parameter.requires_grad_(False)
        self._keep_activations(plan)
        self.wrapped = self._wrap(Caller(model))
        self.parameters = dict(model.named_parameters())

    def _wrap(self, caller: Caller) -> nn.Module:
        self.optimizers = build_optimizers(caller.model, self.plan)
        return caller

    def measure(self, function: Callable[..., Any], rows_BT: torch.Tensor) -> Any:
        """The function's value on the model and rows, which it takes to the device itself, under the plan's precision.

        Weights are cast where they are used, once each: kept in autocast's cache, all of them would be there in bf16 as well until the call ends.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16", cache_enabled=False):
            return self.wrapped(function, rows_BT)

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

    def _keep_activations(self, plan: TrainPlan) -> None:
        """What layers keep for the backward pass: everything, their input, or their input in the host's memory."""
        if self.plan.gradient_checkpointing:  # of the phase before
            self.model.activation_checkpointing_disable()
        if plan.gradient_checkpointing:
            self.model.activation_checkpointing_enable(every_n_layers=plan.checkpoint_every)
        if plan.gradient_checkpointing == "host":
            keep_in_host_memory(self.model)

    def start_phase(self, plan: TrainPlan) -> None:
        """Another plan with a fresh optimiser."""
        self._keep_activations(plan)
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
        return [Entry(f"model.{name}", tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: self._whole(tensor)) for name, tensor in tensors.items()]

    def optimizer_state(self) -> list[Entry]:
        """Tensors of the optimisers as `optimizer.<parameter's name>.<key>`."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return [
            Entry(f"optimizer.{names[id(parameter)]}.{key}", tuple(value.shape), value.dtype, lambda value=value: self._whole(value))
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, value in ((key, torch.as_tensor(value)) for key, value in sorted(state.items()))
        ]

    def entries(self) -> list[Entry]:
        return self.weights() + self.optimizer_state()

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        return whole.cpu() if self.launch.rank == 0 else whole  # the others would copy it for nothing

    @torch.no_grad()
    def restore(self, stored: Stored) -> None:
        """Take over a saved state; of a tensor in slices a process reads its own rows alone."""
        names = set(stored.names())
        for entry_name, tensor in [*self.parameters.items(), *self.model.named_buffers()]:
            if f"model.{entry_name}" in names:
                tensor.copy_(_stored_like(stored, f"model.{entry_name}", tensor).to(tensor.dtype))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = self._restored(parameter, group, stored)

    def _restored(self, parameter: torch.Tensor, group: dict, stored: Stored) -> dict:
        prefix = f"optimizer.{next(name for name, value in self.parameters.items() if value is parameter)}."
        state = {}
        for name in stored.names():
            if name.startswith(prefix) and "." not in name.removeprefix(prefix):
                if stored.shape(name) == tuple(parameter.shape):
                    value = _stored_like(stored, name, parameter)
                else:
                    value = stored.whole(name)
                    moves = value.ndim or group.get("fused")  # AdamW counts its steps on the CPU unless fused
                    # bitsandbytes counts its steps with a plain number
                    value = int(value) if value.dtype == torch.int64 else value.to(parameter.device if moves else "cpu")
                state[name.removeprefix(prefix)] = value
        return state


def _stored_like(stored: Stored, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A stored tensor of another one's shape on its device, in slices where that is, and of its own type."""
    if not isinstance(tensor, DTensor):
        return stored.whole(name).to(tensor.device)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape[1:]) == tuple(tensor.shape[1:]), "slices are rows"
    own = stored.rows(name, offset[0], offset[0] + shape[0]).to(tensor.device)
    return DTensor.from_local(own, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def like(whole: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of another and of its type, in slices where that is."""
    return _sliced(whole.to(tensor.dtype), tensor)


def _sliced(whole: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The same, of its own type."""
    whole = whole.to(tensor.device)
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None) if isinstance(tensor, DTensor) else whole
