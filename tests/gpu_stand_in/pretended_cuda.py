"""A pretended CUDA device: tensors that say they are on cuda:0 while their numbers are the CPU's.

`Pretended` wraps a CPU tensor. Every operation passes through `dispatch`, which refuses what CUDA refuses (tensors of two devices, indices on the
GPU for a CPU tensor, a generator of the other device), computes on the CPU, wraps what would be on the GPU, and counts where the host would have
to wait for the device. Nothing here knows the project: its files are told from transformers' by their path.

What it cannot see: speeds, streams, and the rounding of bf16 kernels. Autocast casts what is named here, without its cache of cast weights; memory inside
of a kernel is what KernelMemory says.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pretended_memory import Allocator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
PROJECT, TRANSFORMERS, OTHER = "project", "transformers", "other"

aten = torch.ops.aten
ALLOCATOR = Allocator(80 * 2**30)
SYNCS: Counter[tuple[str, str, str]] = Counter()  # (what waits, whose line it is, file:line)
TRANSFERS: Counter[tuple[str, str, str]] = Counter()  # copies to the device, and copies that do not wait

COPIES = {aten.copy_.default, aten.set_.source_Tensor, aten._has_compatible_shallow_copy_type.default}
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
STRICT = {"mm", "addmm", "bmm", "baddbmm", "cat", "stack", "embedding", "index_select", "gather", "scatter", "convolution"}  # no CPU scalar either
# Of autocast's two lists for CUDA (torch's autocast_mode.h), what may be called here, by the names of Python's functions.
LOWER = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"}
HIGHER = {"pow", "__pow__", "square", "rsqrt", "exp", "log", "log1p", "expm1", "softmax", "log_softmax", "sum", "prod", "norm", "cumsum", "softplus"}
WAITING = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.equal.default, aten.bincount.default}


class Pretended(torch.Tensor):
    """A tensor on the pretended device. To C++ it is a tensor without memory (meta), to Python one on cuda:0."""

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor, requires_grad: bool = False) -> "Pretended":
        made = torch.Tensor._make_wrapper_subclass(cls, on_cpu.shape, strides=on_cpu.stride(), storage_offset=on_cpu.storage_offset(),
                                                   dtype=on_cpu.dtype, device=torch.device("meta"), requires_grad=requires_grad)  # fmt: skip
        made.on_cpu = on_cpu
        ALLOCATOR.hold(on_cpu)
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)
    data = property(lambda self: self.detach(), lambda self, value: self._take(value))

    def _take(self, value: torch.Tensor) -> None:
        if (value.dtype, value.shape) != (self.dtype, self.shape):
            raise NotImplementedError("the pretended device cannot change a tensor's dtype or shape in place; do it on the CPU")
        self.on_cpu = value.on_cpu

    def __repr__(self, **_settings: Any) -> str:
        return f"Pretended({self.on_cpu})"

    def get_device(self) -> int:
        return 0

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_index(index), value)

    def tolist(self) -> Any:
        count(SYNCS, "item")
        return self.on_cpu.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first (at {place()})")

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, device: Any = None, requires_grad: bool = False) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype).to(device or CUDA).requires_grad_(requires_grad)

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.on_cpu.untyped_storage()

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        copied = type(self)(self.on_cpu.clone(), self.requires_grad)
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _load, (self.on_cpu,)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if torch.is_autocast_enabled("cuda"):
            args = _autocast(function, args)
        return torch._C._disabled_torch_function_impl(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, _types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class Pretence(TorchDispatchMode):
    """While it is entered, in this thread, what is made on `cuda` is made on the pretended device."""

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class PretendedGenerator(torch.Generator):
    """A generator made for one of the devices; its numbers are the CPU's. Operations are given another Python object for the same one in C++."""

    of_gpu: ClassVar[dict[int, torch.Generator]] = {}  # by address, and kept, so that no other one gets it

    def __new__(cls, device: Any = "cpu") -> "PretendedGenerator":
        made = super().__new__(cls)
        if is_cuda(device):
            cls.of_gpu[made._cdata] = made
        return made


def _load(on_cpu: torch.Tensor) -> torch.Tensor:
    return Pretended(on_cpu)


def _index(index: Any) -> Any:
    """An index whose lists and arrays are CPU tensors, as CUDA takes them: C++ would make them where the wrapper is, without numbers."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.as_tensor(index) if isinstance(index, list | range | np.ndarray) else index


def _autocast(function: Callable, args: tuple) -> tuple:
    """The arguments as CUDA's autocast casts them, for what models call: products in the lower precision, powers and the like in float32."""
    name = getattr(function, "__name__", "")
    wanted = torch.get_autocast_dtype("cuda") if name in LOWER else torch.float32 if name in HIGHER else None
    if wanted is None:
        return args
    return tuple(value.to(wanted) if isinstance(value, Pretended) and value.is_floating_point() and value.dtype != wanted else value for value in args)


def unwrap(value: Any) -> Any:
    return value.on_cpu if isinstance(value, Pretended) else value


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def owner_and_place() -> tuple[str, str]:
    """Whose the innermost line is that belongs to the project or to transformers, and where it is."""
    return next(_lines(), (OTHER, "?"))


def place() -> str:
    """The innermost line of the project's own."""
    return next((place for owner, place in _lines() if owner == PROJECT), "?")


def _lines() -> Iterator[tuple[str, str]]:
    """Lines of the project and of transformers that are being run, from the innermost on."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/transformers/" in path:
            yield TRANSFORMERS, f"transformers/{path.rpartition('/transformers/')[2]}:{frame.f_lineno}"
        with suppress(ValueError):
            relative = Path(path).relative_to(REPOSITORY)
            if HERE not in Path(path).parents and not relative.parts[0].startswith("."):
                yield PROJECT, f"{relative}:{frame.f_lineno}"
        frame = frame.f_back


def count(counter: Counter, what: str) -> None:
    counter[(what, *owner_and_place())] += 1


def dispatch(function: Callable, args: tuple, kwargs: dict) -> Any:
    """One operation, as CUDA would take or refuse it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    if function is aten._to_copy.default:
        return _copied(args[0], dict(kwargs))
    if "device" in kwargs and _is_meta(kwargs["device"]) and (on_gpu or function is aten.scalar_tensor.default):
        kwargs = {**kwargs, "device": CUDA}  # C++, which sees the wrapper's own device, asks for a tensor beside it
    if on_gpu and any(tensor.is_meta for tensor in tensors):
        raise NotImplementedError(f"C++ has made a tensor without numbers for {function.name()} at {place()}; the pretended device must make it")
    made_on_gpu = bool(on_gpu) if kwargs.get("device") is None else is_cuda(kwargs["device"])
    if not on_gpu and not made_on_gpu and "pin_memory" not in kwargs:
        _check_generator(function, kwargs, made_on_gpu=False)
        return function(*args, **kwargs)
    _check_devices(function, args, tensors, on_gpu)
    _check_generator(function, kwargs, made_on_gpu)
    _count_waits(function, args, on_gpu)
    result = _computed(function, *tree_map(unwrap, (args, _on_cpu(kwargs))))
    # What is changed in place, or given as out=, is given back itself; so is a CPU tensor that is copied into.
    given = {id(tensor): tensor for tensor in tensors} | {id(tensor.on_cpu): tensor for tensor in on_gpu}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, Pretended):
            return value
        if id(value) in given:
            if given[id(value)].shape != value.shape:
                raise NotImplementedError(f"{function.name()} changes a tensor's shape in place, which the pretended device cannot (at {place()})")
            return given[id(value)]
        return Pretended(value) if made_on_gpu else value

    return tree_map(wrap, result)


def _on_cpu(kwargs: dict) -> dict:
    changed = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    return changed | ({"device": torch.device("cpu")} if is_cuda(kwargs.get("device")) else {})


def _computed(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Products with float32 sums of 16-bit factors (`out_dtype`) exist on CUDA alone: here they are float products."""
    name = function.name()
    if name.startswith(("aten::mm.dtype", "aten::addmm.dtype")):
        product = (torch.mm if "::mm" in name else torch.addmm)(*(factor.float() for factor in args[: 2 if "::mm" in name else 3]))
        return kwargs["out"].copy_(product) if "out" in kwargs else product
    return function(*args, **kwargs)


def _copied(source: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """`Tensor.to`: between the devices, or on one of them."""
    device, waits = kwargs.pop("device", None), not kwargs.get("non_blocking", False)
    kwargs.pop("pin_memory", None)
    from_gpu = isinstance(source, Pretended)
    if not from_gpu and not is_cuda(device):
        return aten._to_copy.default(source, **kwargs, **({} if device is None else {"device": device}))
    if source.is_meta:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    to_gpu = device is None or is_cuda(device) or _is_meta(device)
    if from_gpu != to_gpu:
        count(SYNCS if from_gpu and waits else TRANSFERS, "to host" if from_gpu else "to device")
    copied = aten._to_copy.default(unwrap(source), **kwargs)
    return Pretended(copied) if to_gpu else copied


def _check_devices(function: Callable, args: tuple, tensors: list, on_gpu: list) -> None:
    """Raises RuntimeError for tensors of both devices, where CUDA would."""
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
    if not on_cpu or not on_gpu or function in COPIES:
        return
    name = function.name().split("::")[1]
    if function in INDEXING:
        if not isinstance(args[0], Pretended):
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor (cpu), in {name} at {place()}")
        on_cpu = [value for value in args[2:] if isinstance(value, torch.Tensor) and not isinstance(value, Pretended)]  # CPU indices are taken
    if any(tensor.dim() > 0 for tensor in on_cpu) or (on_cpu and name.split(".")[0] in STRICT):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! in {name} at {place()}")


def _check_generator(function: Callable, kwargs: dict, made_on_gpu: bool) -> None:
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in PretendedGenerator.of_gpu) != made_on_gpu:
        wanted, found = ("cuda", "cpu") if made_on_gpu else ("cpu", "cuda")
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}' in {function.name()} at {place()}")


def _count_waits(function: Callable, args: tuple, on_gpu: list) -> None:
    if function is aten._local_scalar_dense.default:
        count(SYNCS, "item")
    elif function in WAITING or (function is aten.repeat_interleave.Tensor):
        count(SYNCS, function.name().split("::")[1].split(".")[0])
    elif function in INDEXING and any(isinstance(index, Pretended) and index.dtype in (torch.bool, torch.uint8) for index in args[1] or ()):
        count(SYNCS, "boolean index")
    elif function is aten.copy_.default and isinstance(args[0], Pretended) != isinstance(args[1], Pretended):
        to_gpu, waits = isinstance(args[0], Pretended), not (len(args) > 2 and args[2])
        count(TRANSFERS if to_gpu or not waits else SYNCS, "to device" if to_gpu else "to host")


@dataclass(frozen=True, slots=True)
class KernelMemory:
    """Bytes that the kernel whose place is taken would keep for its backward pass beside its inputs, and those it takes while either pass runs."""

    keeps: int = 0
    keeps_result: bool = False
    forward: int = 0
    backward: int = 0


class _OnCpu(torch.autograd.Function):
    """A function of CPU tensors applied to tensors of the pretended device; the backward pass computes it anew. What is kept is counted by `memory`."""

    @staticmethod
    def forward(ctx, function, memory, *tensors):
        ctx.function, ctx.memory, ctx.number = function, memory, len(tensors)
        ctx.set_materialize_grads(False)  # C++ would make zeros without memory
        with _disable_current_modes(), torch.no_grad(), ALLOCATOR.inside(memory.forward):
            results = function(*map(unwrap, tensors))
            wrapped = Pretended(results) if isinstance(results, torch.Tensor) else tuple(map(Pretended, results))
            kept = [Pretended(torch.empty(memory.keeps, dtype=torch.uint8))] if memory.keeps and any(ctx.needs_input_grad) else []
        ctx.save_for_backward(*tensors, *kept, *([wrapped] if memory.keeps_result else []))
        return wrapped

    @staticmethod
    def backward(ctx, *gradients):
        saved = ctx.saved_tensors  # all of it, to the end
        with _disable_current_modes(), torch.enable_grad():
            inputs = [None if tensor is None else unwrap(tensor).detach().requires_grad_(needed)
                      for tensor, needed in zip(saved[: ctx.number], ctx.needs_input_grad[2:], strict=True)]  # fmt: skip
            results = ctx.function(*inputs)
            results = [results] if isinstance(results, torch.Tensor) else results
            pairs = [(result, unwrap(gradient)) for result, gradient in zip(results, gradients, strict=True) if gradient is not None and result.requires_grad]
            wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
            found = iter(_gradients(pairs, wanted))
        made = [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]
        with ALLOCATOR.inside(ctx.memory.backward):
            return None, None, *(None if gradient is None else Pretended(gradient) for gradient in made)


def _gradients(pairs: list[tuple[torch.Tensor, torch.Tensor]], wanted: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    results, gradients = zip(*pairs, strict=True)
    return torch.autograd.grad(results, wanted, gradients, allow_unused=True)


def on_cpu(function: Callable[..., Any], *tensors: torch.Tensor | None, memory: KernelMemory = KernelMemory()) -> Any:  # noqa: B008
    """function(*tensors), tensors of the pretended device, as one operation of it."""
    return _OnCpu.apply(function, memory, *tensors)
