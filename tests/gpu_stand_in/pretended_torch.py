"""What of torch itself must know of the pretended device: the queries of torch.cuda, and what makes, keeps and reads tensors past the dispatcher.

`install` changes this process for good, so it is for processes of their own, and comes before the project is imported.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pretended_kernels
import torch
from pretended_cuda import ALLOCATOR, CUDA, SYNCS, KernelMemory, Pretence, Pretended, PretendedGenerator, count, is_cuda, on_cpu, unwrap
from torch.autograd.graph import _engine_run_backward
from torch.utils._pytree import tree_map

NAME, CAPABILITY = "NVIDIA H100 80GB HBM3 (pretended)", (9, 0)


def install(total_gib: float | None = None) -> None:
    """Pretend, in this process from here on, that there is one CUDA device of so many GiB (PRETENDED_GIB of the environment, else 80)."""
    ALLOCATOR.total = int((total_gib or float(os.environ.get("PRETENDED_GIB", "80"))) * 2**30)
    torch._C._ensureCUDADeviceGuardSet()  # autograd asks for one
    _answer_queries()
    _make_on_device()
    _keep_and_read()
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()  # wrappers cannot be inference tensors
    torch.nn.functional.scaled_dot_product_attention = attention
    torch.Tensor.backward = backward
    pretended_kernels.install()
    _enter_in_threads()
    Pretence().__enter__()


def _answer_queries() -> None:
    properties = SimpleNamespace(name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=ALLOCATOR.total, multi_processor_count=132)
    answers = {
        "_lazy_init": None, "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "set_device": None,
        "is_bf16_supported": True, "get_device_name": NAME, "get_device_capability": CAPABILITY, "get_device_properties": properties,
        "empty_cache": None, "manual_seed": None, "manual_seed_all": None, "set_rng_state": None, "ipc_collect": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_args, answer=answer, **_settings: answer)
    cuda = torch.cuda
    cuda.get_rng_state = lambda *_: torch.zeros(8, dtype=torch.uint8)
    cuda.synchronize = lambda *_: count(SYNCS, "synchronize")
    cuda.mem_get_info = lambda *_: (ALLOCATOR.free, ALLOCATOR.total)
    cuda.memory_allocated = cuda.memory_reserved = lambda *_: ALLOCATOR.allocated
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *_: ALLOCATOR.peak
    cuda.reset_peak_memory_stats = lambda *_: ALLOCATOR.reset_peak()
    cuda.memory_stats = lambda *_: {"requested_bytes.all.current": ALLOCATOR.requested, "allocated_bytes.all.current": ALLOCATOR.allocated,
                                    "allocated_bytes.all.peak": ALLOCATOR.peak}  # fmt: skip
    cuda.Stream, cuda.Event = _Stream, _Stream
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.stream = cuda.device = lambda *_: nullcontext()


class _Stream:
    """A stream or an event: all work is done in the order in which it is asked for."""

    def __init__(self, *_args: Any, **_settings: Any) -> None:
        self.device = CUDA

    def synchronize(self) -> None:
        count(SYNCS, "synchronize")

    def record(self, *_: Any) -> "_Stream":
        return self

    def query(self) -> bool:
        return True

    wait = wait_stream = wait_event = record_event = record
    elapsed_time = staticmethod(lambda *_: 1.0)


def _make_on_device() -> None:
    """Python data becomes tensors before the dispatcher is asked; generators belong to a device."""
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, _moved(getattr(torch, name)))
    torch.Generator = PretendedGenerator
    torch.Tensor.to, torch.Tensor.cuda = _numbered(torch.Tensor.to), lambda self, device=None, non_blocking=False, **_: self.to(CUDA, non_blocking=non_blocking)
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.Tensor.is_pinned = lambda self, *_: False
    torch.Tensor.record_stream = lambda self, _stream: None


def _numbered(to: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`cuda` alone is the device's number 0; C++ would ask the driver for it."""

    def number(value: Any) -> Any:
        return CUDA if isinstance(value, str | torch.device) and str(value) == "cuda" else value

    return functools.wraps(to)(lambda self, *args, **settings: to(self, *map(number, args), **{name: number(value) for name, value in settings.items()}))


def _moved(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def made(data: Any, *args: Any, device: Any = None, pin_memory: bool = False, requires_grad: bool = False, **settings: Any) -> torch.Tensor:
        if isinstance(data, Pretended):
            result = data.to(device=device, **settings)
        else:
            result = make(data, *args, **settings, **({} if is_cuda(device) else {"device": device}))
            result = result.to(device) if is_cuda(device) else result
        return result.requires_grad_() if requires_grad else result

    return made


def _keep_and_read() -> None:
    """Files hold no device of ours: tensors are written from the CPU and read to where the caller says."""
    import safetensors.torch as safetensors

    save, load, save_file, load_file = torch.save, torch.load, safetensors.save_file, safetensors.load_file

    def to(device: Any, values: Any) -> Any:
        return tree_map(lambda value: Pretended(value) if isinstance(value, torch.Tensor) and is_cuda(device) else value, values)

    torch.save = functools.wraps(save)(lambda values, file, **settings: save(tree_map(unwrap, values), file, **settings))
    torch.load = functools.wraps(load)(lambda file, map_location=None, **settings: to(map_location, load(file, map_location="cpu", **settings)))
    safetensors.save_file = functools.wraps(save_file)(
        lambda tensors, path, **settings: save_file({name: unwrap(tensor) for name, tensor in tensors.items()}, path, **settings)
    )
    safetensors.load_file = functools.wraps(load_file)(lambda path, device="cpu", **settings: to(device, load_file(path, **settings)))


def _enter_in_threads() -> None:
    """A dispatch mode belongs to one thread: work given to others enters it there."""
    submit = ThreadPoolExecutor.submit

    def pretending(self: ThreadPoolExecutor, function: Callable, /, *args: Any, **settings: Any):
        def run() -> Any:
            with Pretence():
                return function(*args, **settings)

        return submit(self, run)

    ThreadPoolExecutor.submit = pretending


def backward(self: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
    """Tensor.backward for a loss; torch's own has nothing that is computed again within it pass through a subclass's functions, so that nothing were cast."""
    first = torch.ones_like(self) if gradient is None else gradient
    _engine_run_backward((self,), (first,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """torch's attention, on the pretended device as one operation."""
    if not isinstance(query, Pretended):
        return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if not all(isinstance(tensor, Pretended | None) for tensor in (key, value, attn_mask)):
        raise RuntimeError("Expected query, key, value and attn_mask to be on the same device, cuda:0")

    def computed(query, key, value, mask):
        return _ATTENTION(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    if torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    return on_cpu(computed, query, key, value, attn_mask, memory=_attention_memory(query, key))


def _attention_memory(query: torch.Tensor, key: torch.Tensor) -> KernelMemory:
    """Flash attention's (torch's mha_bwd): the result and a sum for every query are kept; backward, a float32 gradient of the queries, one sum more, and,
    where heads share keys, the gradients of keys and values by head. In float32 with shared keys torch has no fused kernel (its _scaled_dot_product_attention_
    math): the scores [B, Q, T, T] are kept, forward with what the softmax makes of them, backward with two gradients.
    """
    sums, shared = 4 * query.numel() // query.shape[-1], query.shape[1] != key.shape[1]
    scores = 4 * query.numel() // query.shape[-1] * key.shape[2] if shared and query.dtype == torch.float32 else 0
    gradients = 4 * query.numel() if query.itemsize == 2 else 0
    kept = scores if torch.is_grad_enabled() and query.requires_grad else 0
    inside = gradients + sums + shared * 2 * query.numel() * query.itemsize
    return KernelMemory(keeps=sums + scores, keeps_result=True, forward=13 * scores // 4 - kept, backward=inside + 2 * scores)


_ATTENTION = torch.nn.functional.scaled_dot_product_attention
