"""Files read and written around the page cache, where what they hold would not stay in it.

A cached page costs a copy and its own bookkeeping, on a virtual machine a second of a core for every GB, and the weights of a large model push each
other out before anything is read twice. O_DIRECT moves whole blocks between disk and memory instead. Where the operating system or the file
system does not have it, files are read and written as always.
"""

import errno
import fcntl
import io
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from minitron.machine.memory import available_memory_bytes

BLOCK_BYTES = 4096  # offsets, lengths and addresses are multiples of it: the largest block of disks in use
BUFFER_BYTES = 2**24
LEAST_BYTES = 2**20  # of a tensor that is read around the cache
_DIRECT = getattr(os, "O_DIRECT", 0)


def would_not_stay(num_bytes: int) -> bool:
    """Whether so many bytes, read or written once, are more than half of what the page cache can have."""
    return bool(_DIRECT) and num_bytes > available_memory_bytes() // 2


def empty_tensor(shape: Sequence[int], dtype: torch.dtype, offset: int, *, direct: bool) -> torch.Tensor:
    """Memory for the tensor that begins at this byte of a file; for `direct` as far into a block as it is there, and with room for whole blocks around it."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if not direct or num_bytes < LEAST_BYTES or offset % dtype.itemsize:
        return torch.empty(shape, dtype=dtype)
    room = torch.empty(num_bytes + 3 * BLOCK_BYTES, dtype=torch.uint8)
    first = BLOCK_BYTES - room.data_ptr() % BLOCK_BYTES + offset % BLOCK_BYTES
    return room[first : first + num_bytes].view(dtype).view(shape)


def fill_tensor(tensor: torch.Tensor, path: Path, offset: int, *, direct: bool) -> int:
    """Set a tensor, an empty_tensor, to the file's bytes from `offset` on. Gives how many of them the file does not have."""
    if direct and tensor.nbytes >= LEAST_BYTES and _fill_direct(tensor, path, offset):
        return 0
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while len(view) and (count := file.readinto(view)):  # one call gives at most 2 GiB
            view = view[count:]
    return len(view)


def _fill_direct(tensor: torch.Tensor, path: Path, offset: int) -> bool:
    """Whether all of it could be read in whole blocks."""
    storage, before = tensor.untyped_storage(), offset % BLOCK_BYTES
    first, wanted = tensor.data_ptr() - before - storage.data_ptr(), before + tensor.nbytes
    last = first - (-wanted // BLOCK_BYTES) * BLOCK_BYTES
    if first < 0 or last > storage.nbytes() or (storage.data_ptr() + first) % BLOCK_BYTES:
        return False  # memory of another kind
    blocks, done = memoryview(torch.empty(0, dtype=torch.uint8).set_(storage)[first:last].numpy()), 0
    with suppress(OSError):
        file = os.open(path, os.O_RDONLY | _DIRECT)
        try:
            while done < wanted and not done % BLOCK_BYTES and (count := os.preadv(file, [blocks[done:]], offset - before + done)):
                done += count  # whole blocks but at the file's end
        finally:
            os.close(file)
    return done >= wanted


class DirectFile(io.RawIOBase):
    """A file written from its beginning to its end, a buffer of whole blocks at a time."""

    def __init__(self, path: Path):
        """Raises OSError where the file system has no O_DIRECT."""
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _DIRECT, 0o666)
        self.buffer = np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8)  # begins at a page's address
        self.length = self.filled = 0
        self.name = str(path)

    def write(self, data) -> int:
        """Takes what there is room for, and says how much."""
        taken = min(len(data), BUFFER_BYTES - self.filled)
        self.buffer[self.filled : self.filled + taken] = np.frombuffer(data, np.uint8, taken)
        self.filled, self.length = self.filled + taken, self.length + taken
        if self.filled == BUFFER_BYTES:
            self._write_blocks()
        return taken

    def _write_blocks(self) -> None:
        view = memoryview(self.buffer)[: -(-self.filled // BLOCK_BYTES) * BLOCK_BYTES]
        while len(view):
            try:
                view = view[os.write(self.file, view) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct():
                    raise
                fcntl.fcntl(self.file, fcntl.F_SETFL, fcntl.fcntl(self.file, fcntl.F_GETFL) & ~_DIRECT)  # a disk of larger blocks, say
        self.filled = 0

    def _is_direct(self) -> bool:
        return bool(fcntl.fcntl(self.file, fcntl.F_GETFL) & _DIRECT)

    def fileno(self) -> int:
        return self.file

    def flush(self) -> None:
        """The end of the file: its last block is written whole, and what is too much of it cut off."""
        if self.filled:
            self._write_blocks()
            os.ftruncate(self.file, self.length)

    def close(self) -> None:
        if not self.closed:
            try:
                super().close()  # flushes
            finally:
                os.close(self.file)
