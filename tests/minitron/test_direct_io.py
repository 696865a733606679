"""Reading and writing around the page cache: the same bytes at every offset and length, and the ordinary way where the disk cannot do it."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron.checkpoints.direct_io import BLOCK_BYTES, BUFFER_BYTES, LEAST_BYTES, DirectFile, empty_tensor, fill_tensor, would_not_stay
from minitron.checkpoints.files import Checkpoint, PlannedTensor
from minitron.checkpoints.shards import write_weights
from minitron.machine.memory import available_memory_bytes

MIB = 2**20


def refused(folder: Path) -> bool:
    try:
        DirectFile(folder / "tried").close()
    except OSError:
        return True
    return False


@pytest.fixture
def disk(tmp_path) -> Path:
    if not hasattr(os, "O_DIRECT") or refused(tmp_path):
        pytest.skip("no O_DIRECT here")
    return tmp_path


@pytest.fixture
def file(disk) -> Path:
    """3 MiB and 1,234 bytes."""
    path = disk / "bytes"
    path.write_bytes(np.random.default_rng(0).bytes(3 * MIB + 1234))
    return path


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    import ctypes

    libc, size = ctypes.CDLL(None, use_errno=True), path.stat().st_size
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.parametrize("offset", [0, 2, 8, BLOCK_BYTES - 2, BLOCK_BYTES, 3 * BLOCK_BYTES + 1000])
@pytest.mark.parametrize("num_bytes", [LEAST_BYTES, LEAST_BYTES + 2, 2 * MIB - 6])
def test_a_tensor_read_directly_is_that_of_the_file(file, offset, num_bytes):
    tensor = empty_tensor((num_bytes // 2,), torch.int16, offset, direct=True)
    assert tensor.data_ptr() % BLOCK_BYTES == offset % BLOCK_BYTES and tensor.is_contiguous()
    assert fill_tensor(tensor, file, offset, direct=True) == 0
    assert tensor.numpy().tobytes() == file.read_bytes()[offset : offset + num_bytes]


def test_the_end_of_a_file_within_a_block_is_read(file):
    offset = file.stat().st_size - LEAST_BYTES - 10
    tensor = empty_tensor((LEAST_BYTES + 10,), torch.uint8, offset, direct=True)
    assert fill_tensor(tensor, file, offset, direct=True) == 0
    assert tensor.numpy().tobytes() == file.read_bytes()[offset:]


def test_bytes_that_a_file_does_not_have_are_counted(file):
    offset = file.stat().st_size - LEAST_BYTES
    tensor = empty_tensor((LEAST_BYTES + 10,), torch.uint8, offset, direct=True)
    assert fill_tensor(tensor, file, offset, direct=True) == 10


def test_memory_of_another_kind_and_odd_offsets_are_filled_as_always(file):
    for tensor, offset in ((torch.empty(LEAST_BYTES, dtype=torch.uint8), 5), (empty_tensor((MIB,), torch.int16, 5, direct=True), 5)):
        assert fill_tensor(tensor, file, offset, direct=True) == 0
        assert tensor.numpy().tobytes() == file.read_bytes()[offset : offset + tensor.nbytes]


def test_what_is_read_directly_does_not_stay_in_the_page_cache(file):
    os.sync()
    for direct, stays in ((True, False), (False, True)):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert cached_bytes(file) == 0
        fill_tensor(empty_tensor((2 * MIB,), torch.uint8, 0, direct=direct), file, 0, direct=direct)
        assert (cached_bytes(file) >= 2 * MIB) == stays


@pytest.mark.parametrize("length", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 5])
def test_a_file_written_directly_is_what_was_given(disk, length):
    data, path = np.random.default_rng(1).bytes(length), disk / "written"
    with DirectFile(path) as file:
        for view in (memoryview(data)[:100], memoryview(data)[100:]):
            while len(view):
                view = view[file.write(view) :]
    assert path.read_bytes() == data


def test_a_disk_that_refuses_blocks_is_written_as_always(disk):
    data, path = np.random.default_rng(2).bytes(3 * BLOCK_BYTES + 7), disk / "written"
    for shift in (0, 8):  # memory that begins within a block is refused
        with DirectFile(path) as file:
            file.buffer = np.zeros(BUFFER_BYTES + 2 * BLOCK_BYTES, np.uint8)
            first = -file.buffer.ctypes.data % BLOCK_BYTES + shift
            file.buffer = file.buffer[first : first + BUFFER_BYTES]
            file.write(memoryview(data))
            file.flush()
            assert file._is_direct() == (shift == 0)
        assert path.read_bytes() == data


@pytest.mark.parametrize("direct", [False, True])
def test_weights_written_and_read_either_way_are_the_same(tmp_path, direct):
    random = torch.Generator().manual_seed(0)
    state = {"a": torch.randn(1500, 300, generator=random).bfloat16(), "odd": torch.randn(7, generator=random).bfloat16()}
    state["b"] = torch.randn(900, 700, generator=random)
    codes = {torch.bfloat16: "BF16", torch.float32: "F32"}
    planned = [PlannedTensor(name, codes[value.dtype], tuple(value.shape), lambda value=value: value.split(311)) for name, value in state.items()]
    write_weights(tmp_path, planned, max_shard_bytes=2**30, direct=direct)
    for reading in (False, True):
        checkpoint = Checkpoint(tmp_path, direct=reading)
        assert all(torch.equal(checkpoint.read(name), value) for name, value in state.items())
        assert all(torch.equal(torch.cat([rows for _, rows in checkpoint.read_rows(name, 2 * MIB)]), value) for name, value in state.items())
        assert all(map(checkpoint.holds, planned))


def test_only_what_memory_would_not_hold_goes_around_the_page_cache():
    free = available_memory_bytes()
    assert would_not_stay(free) == hasattr(os, "O_DIRECT") and not would_not_stay(free // 4)
