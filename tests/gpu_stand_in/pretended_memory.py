"""The bytes that live tensors of the pretended device hold, and the most that they held at once, as torch.cuda's allocator would report them.

A storage counts once, however many views it has, from the first tensor on it until the last is gone. What a kernel takes inside itself is counted by
what its stand-in says of it.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BLOCK_BYTES = 512  # torch's allocator gives memory in multiples of this


class Allocator:
    """Live and peak bytes: as asked for (`requested`) and in whole blocks (`allocated`)."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.requested = self.allocated = self.peak = 0
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._lock = threading.RLock()  # a finalizer may run in the middle of `hold`

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor that has come to the device."""
        storage = tensor.untyped_storage()
        with self._lock:
            if storage in self._storages or storage.nbytes() == 0 or tensor.is_meta:
                return
            self._storages.add(storage)
            size = storage.nbytes()
            self._add(size)
        weakref.finalize(storage, self._add, -size).atexit = False

    def _add(self, size: int) -> None:
        blocks = -(-abs(size) // BLOCK_BYTES) * BLOCK_BYTES
        with self._lock:
            self.requested += size
            self.allocated += blocks if size > 0 else -blocks
            self.peak = max(self.peak, self.allocated)

    @contextmanager
    def inside(self, size: int) -> Iterator[None]:
        """So many bytes more while a kernel runs."""
        self._add(size)
        try:
            yield
        finally:
            self._add(-size)

    def reset_peak(self) -> None:
        self.peak = self.allocated

    @property
    def free(self) -> int:
        return max(0, self.total - self.allocated)
