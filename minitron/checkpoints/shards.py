"""Weights written in the Hub's layout piece by piece: neither a model nor a tensor has to be in memory whole.

The safetensors format (header length, JSON header, raw bytes) is written directly because the library's writer needs a whole shard
in memory at once.
"""

import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
import xxhash

from memory_budget.units import format_gib
from minitron.checkpoints.direct_io import DirectFile, would_not_stay
from minitron.checkpoints.files import DTYPES, INDEX_FILE, SINGLE_FILE, PlannedTensor, bytes_of, read_header
from minitron.checkpoints.stacked import stack_of
from minitron.walk.integrity import written_as
from minitron.walk.store import write_json

AT_ONCE = 2**18  # bytes that are written and then summed up while they are still in the processor's cache


def write_weights(folder: Path, tensors: Iterable[PlannedTensor], *, max_shard_bytes: int, on_bytes: Callable[[int], None] = lambda _: None,
                  direct: bool | None = None) -> None:  # fmt: skip
    """Write tensors piece by piece into as many shards as needed, with an index when there are several.

    A shard that is already whole (from an interrupted run of the same plan) is kept; weights in other files, of a run with another shard size, and
    their index are removed, since each program has its own order of looking at them. `on_bytes` hears how many were written or kept; `direct` says
    whether to write around the page cache, else the size decides. Raises ValueError before anything is written where the disk has too little room.
    """
    shards = _plan_shards(_stacked(tensors), max_shard_bytes)
    names = [SINGLE_FILE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    _remove_others(folder, names)
    missing = []
    for file_name, shard in zip(names, shards, strict=True):
        if (folder / file_name).exists() and _holds(folder / file_name, shard):  # renamed into place only when whole
            on_bytes(_num_bytes(shard))
        else:
            missing.append((folder / file_name, shard))
    _check_disk(folder, sum(_num_bytes(shard) for _, shard in missing))
    direct = would_not_stay(sum(map(_num_bytes, shards))) if direct is None else direct
    with ThreadPoolExecutor(max_workers=1) as writer, ThreadPoolExecutor(max_workers=1) as closer:
        closed = []
        for path, shard in missing:
            file = _open_for_writing(path.with_suffix(".partial"), direct=direct)
            digest = _write_shard(file, shard, writer, on_bytes)
            closed.append(closer.submit(_close, file, path, digest))  # waits for the disk while the next one is made
        for each in closed:
            each.result()
    if len(shards) > 1:
        weight_map = {tensor.name: file_name for file_name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(map(_num_bytes, shards))}, "weight_map": weight_map})


def _stacked(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    """The tensors as files have them: parts of a stack (stacked.py) as one tensor in the first one's place, an expert a piece."""
    together: dict[str, PlannedTensor | dict[tuple[int, int], PlannedTensor]] = {}
    for tensor in tensors:
        stack, *place = stack_of(tensor.name) or (tensor.name,)
        if place:
            together.setdefault(stack, {})[tuple(place)] = tensor
        else:
            together[stack] = tensor
    return [_stack(name, found) if isinstance(found, dict) else found for name, found in together.items()]


def _stack(name: str, parts: dict[tuple[int, int], PlannedTensor]) -> PlannedTensor:
    experts, matrices = (1 + max(place) for place in zip(*parts, strict=True))
    first = parts[0, 0]
    assert len(parts) == experts * matrices and {(part.dtype, part.shape) for part in parts.values()} == {(first.dtype, first.shape)}, f"parts of {name} lack"

    def pieces() -> Iterator[torch.Tensor]:
        for expert in range(experts):
            yield torch.cat([piece for matrix in range(matrices) for piece in parts[expert, matrix].pieces()])[None]

    return PlannedTensor(name, first.dtype, (experts, matrices * first.shape[0], first.shape[1]), pieces)


def _remove_others(folder: Path, names: list[str]) -> None:
    for path in (*folder.glob("model*.safetensors"), folder / INDEX_FILE):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _num_bytes(shard: list[PlannedTensor]) -> int:
    return sum(tensor.num_bytes for tensor in shard)


def _check_disk(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold. What an interrupted run left half written is overwritten."""
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob("*.partial"))
    if free < needed:
        raise ValueError(f"{folder} is on a disk with {format_gib(free)} free; the weights to write there need {format_gib(needed)}")


def _plan_shards(tensors: list[PlannedTensor], max_shard_bytes: int) -> list[list[PlannedTensor]]:
    shards, filled = [[]], 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def _write_shard(file: io.RawIOBase, shard: list[PlannedTensor], writer: ThreadPoolExecutor, on_bytes: Callable[[int], None]) -> str:
    """Pieces are made in the calling thread, where memory let go is used again, the next one while one is being written. Gives the digest of all bytes."""
    state = xxhash.xxh3_64()

    def write(view: memoryview) -> None:
        while len(view):
            taken = file.write(view[:AT_ONCE])
            state.update(view[:taken])
            view = view[taken:]

    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in shard:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.num_bytes]}
        offset += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    written = writer.submit(write, memoryview(struct.pack("<Q", len(encoded)) + encoded))
    for piece in _checked_pieces(shard):
        written.result()
        written = writer.submit(write, memoryview(bytes_of(piece)))
        on_bytes(piece.nbytes)
    written.result()
    return state.hexdigest()


def _open_for_writing(path: Path, *, direct: bool) -> io.RawIOBase:
    if direct:
        with suppress(OSError):
            return DirectFile(path)
    return open(path, "wb", buffering=0)


def _close(file: io.RawIOBase, path: Path, digest: str) -> None:
    """Gives a whole shard its name once the disk has it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    Path(file.name).rename(path)
    written_as(path, digest)


def _checked_pieces(shard: list[PlannedTensor]) -> Iterator[torch.Tensor]:
    for tensor in shard:
        rows = 0
        for piece in tensor.pieces():
            assert piece.dtype == DTYPES[tensor.dtype] and piece.shape[1:] == tensor.shape[1:], f"{tensor.name} differs from its plan"
            rows += len(piece) if piece.ndim else 1
            yield piece
        assert rows == (tensor.shape[0] if tensor.shape else 1), f"{tensor.name} has {rows} rows, not those of its plan"


def _holds(path: Path, shard: list[PlannedTensor]) -> bool:
    """Whether a file is this shard, not one of a run with another shard size."""
    found = [(entry.name, entry.dtype, entry.shape) for entry in read_header(path)]
    return found == [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard]


def save_model_weights(state: dict[str, torch.Tensor], folder: Path, *, max_shard_bytes: int) -> None:
    """Write tensors already in memory, by their file names, in place of weights that an earlier attempt left."""
    _remove_others(folder, [])
    codes = {dtype: code for code, dtype in DTYPES.items()}
    planned = [PlannedTensor(name, codes[value.dtype], tuple(value.shape), lambda value=value: [value.detach().cpu()]) for name, value in state.items()]
    write_weights(folder, planned, max_shard_bytes=max_shard_bytes)
