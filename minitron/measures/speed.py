"""How fast a model reads prompts and goes on from them, and the memory that takes, at stated lengths. B sequences, T tokens."""

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.batches import PADDING, plain_ids
from minitron.settings.evaluate import SpeedSettings

REPETITIONS = 3
CACHES = ("past_key_values", "cache_params")  # what models of transformers call theirs; those of Mamba-2 alone the latter


def make_prompts(rows_RT: np.ndarray, input_tokens: int, batch: int) -> torch.Tensor:
    """Prompts int64 [batch, input_tokens]: the rows' real tokens in their order, from the beginning again where they do not suffice."""
    return torch.from_numpy(np.resize(plain_ids(rows_RT[rows_RT != PADDING]), (batch, input_tokens)).astype(np.int64))


def measure_speed(model: nn.Module, prompts_BT: torch.Tensor, lengths: SpeedSettings, *, can_decode: bool) -> dict[str, Any]:
    """Seconds and tokens per second of prefill (the prompts read, the first token known) and of decoding, greedy, each the best of three;
    and the most bytes alive at once, weights included. Of a model that `can_decode` says cannot (families.known) only prefill is measured.

    Bytes are those of PyTorch's allocator on a GPU. On CPU, where nobody counts, they are of all tensors alive at once; what a
    single operation uses inside itself is not seen there.
    """
    output_tokens = lengths.output_tokens if can_decode else 0
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    with _peak_bytes(prompts_BT.device) as peak:  # the warm-up too
        _generate(model, prompts_BT, output_tokens, use_cache=can_decode)
    times = [_generate(model, prompts_BT, output_tokens, use_cache=can_decode) for _ in range(REPETITIONS)]
    prefill, decode = (min(column) for column in zip(*times, strict=True))
    return {
        "input_tokens": lengths.input_tokens, "output_tokens": lengths.output_tokens, "batch": lengths.batch,
        "prefill_seconds": prefill, "prefill_tokens_per_second": prompts_BT.numel() / prefill,
        "decode_tokens_per_second": output_tokens * len(prompts_BT) / decode if can_decode else None,
        "peak_bytes": weights + peak(), "weights_bytes": weights, **machine_of(prompts_BT.device),
    }  # fmt: skip


def decode_tokens_per_second(model: nn.Module, prompt_T: torch.Tensor, new_tokens: int) -> float:
    """Greedy decoding speed with the model's own cache, batch 1, after the prompt [T] is read; best of three."""
    return new_tokens / min(_generate(model, prompt_T[None], new_tokens, use_cache=True)[1] for _ in range(REPETITIONS))


def machine_of(device: torch.device) -> dict[str, Any]:
    """What speeds depend on beside the model: the device's name, and on CPU the threads."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": device.type, "threads": torch.get_num_threads()}


@torch.no_grad()
def _generate(model: nn.Module, prompts_BT: torch.Tensor, new_tokens: int, *, use_cache: bool) -> tuple[float, float]:
    """Seconds of prefill and of decoding `new_tokens` more."""
    started = time.perf_counter()
    output = model(prompts_BT, use_cache=use_cache, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    token.sum().item()  # waits for an accelerator to finish
    read = time.perf_counter()
    for _ in range(new_tokens):
        output = model(token, **{name: output[name] for name in CACHES if name in output}, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    token.sum().item()
    return read - started, time.perf_counter() - read


@contextmanager
def _peak_bytes(device: torch.device) -> Iterator:
    """Yields a function that gives, afterwards, the most bytes that were alive at once beyond those there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with _LiveTensors() as live:
        yield lambda: live.peak


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of every storage made while it is entered, until it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), before)
        return made

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        if id(storage) in before or storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.bytes -= size
