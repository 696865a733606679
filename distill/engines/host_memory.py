"""Layers' inputs in the host's memory between the forward and the backward pass, so that a long row takes as much of a GPU whatever the number of layers.

Activation checkpointing keeps the input of every layer; at 262,144 tokens those of 56 layers are 131 GB in bf16. Here each goes to pinned memory on a stream
of its own while the next layer computes, and comes back, one layer ahead of its need, while the layer above is computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


@dataclass(slots=True)
class _Kept:
    """A tensor in the host's memory, an empty one where it came from, the one that was kept before it, and its copy there once that is under way."""

    host: torch.Tensor
    empty: torch.Tensor
    before: "_Kept | None"
    fetched: torch.Tensor | None = None


class HostStore:
    """Where a model's checkpointed layers keep their inputs. On a CPU, whose memory is the host's, they stay where they are."""

    def __init__(self):
        self.last: _Kept | None = None
        self.copies: torch.cuda.Stream | None = None

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """torch's checkpoint, with what it keeps that gradients flow through in this store."""
        with saved_tensors_hooks(self._keep, self._take):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor | _Kept:
        if tensor.device.type == "cpu" or not tensor.requires_grad:  # masks and positions are shared by all layers
            return tensor
        self.copies = self.copies or torch.cuda.Stream(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
        self.copies.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.copies):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self.copies)
        self.last = _Kept(host, tensor.detach().new_empty(0), self.last)
        return self.last

    def _take(self, kept: torch.Tensor | _Kept) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        tensor = self._fetch(kept)
        torch.cuda.current_stream(kept.empty.device).wait_stream(self.copies)
        if kept.before is not None:
            self._fetch(kept.before)
        kept.fetched, kept.before, self.last = None, None, kept.before
        return tensor

    def _fetch(self, kept: _Kept) -> torch.Tensor:
        """The copy back, begun now if it was not before."""
        if kept.fetched is None:
            with torch.cuda.stream(self.copies):
                kept.fetched = kept.empty.new_empty(kept.host.shape).copy_(kept.host, non_blocking=True)
            kept.fetched.record_stream(torch.cuda.current_stream(kept.empty.device))
        return kept.fetched


def keep_in_host_memory(model: nn.Module) -> None:
    """Has every layer that is checkpointed keep its input in one store."""
    store = HostStore()
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False) and hasattr(layer, "_gradient_checkpointing_func"):
            layer._gradient_checkpointing_func = store.checkpoint
