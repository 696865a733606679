"""Checkpoints streamed piece by piece: a model never has to be in memory, nor has a tensor.

Reading goes through plain file reads, not a memory map, so that what was read does not count as resident
memory. The safetensors format (header length, JSON header, raw bytes) is written directly because the
library's writer needs a whole shard in memory at once.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from memory_budget.units import format_gib
from minitron.store import write_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FINGERPRINT_BYTES = 4096  # of each tensor
# Large enough for a disk's full rate, small enough that a piece is still in the processor's cache when it is cut and written.
PIECE_BYTES = 2**24
# Carried over byte for byte from the teacher's folder, where present.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies on disk; `name` is the name in the file, `offset` counts from the file's start."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return int(torch.Size(self.shape).numel())


class Checkpoint:
    """The safetensors files of one model folder: names, shapes and dtypes read at once, weights on demand."""

    def __init__(self, folder: Path, *, file: str | None = None):
        """Read every shard's header. Raises ValueError for a missing folder, shard or tensor, or a truncated file.

        `file` is the one file to read where it is not named as a model's, a saved state's say.
        """
        self.folder = Path(folder)
        files, indexed = _shard_files(self.folder) if file is None else ([self.folder / file], set())
        self.files = files
        self.entries = {entry.name: entry for path in files for entry in read_header(path)}
        missing = sorted(indexed - set(self.entries))
        if missing:
            raise ValueError(f"checkpoint {self.folder}: tensor {missing[0]} is listed in {INDEX_FILE} but in none of its shards")

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, in its stored dtype and shape."""
        entry = self.entries[name]
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.offset)
            return _read_tensor(file, entry, entry.shape)

    def read_rows(self, name: str, most_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor in pieces of at most so many bytes (at least a row), as (number of the first row, rows); a row is an index of the first dimension."""
        entry = self.entries[name]
        rows, *rest = entry.shape
        step = max(1, most_bytes * rows // max(entry.num_bytes, 1))
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.offset)
            for first in range(0, rows, step):
                yield first, _read_tensor(file, entry, (min(step, rows - first), *rest))

    def planned(self, name: str, *, new_name: str, dtype: str) -> "PlannedTensor":
        """A tensor to be written again, under another name and in another dtype, read when its turn comes."""

        def pieces() -> Iterator[torch.Tensor]:
            return (rows.to(DTYPES[dtype]) for _, rows in self.read_rows(name))

        return PlannedTensor(new_name, dtype, self.entries[name].shape, pieces)

    def holds(self, tensor: "PlannedTensor") -> bool:
        """Whether the tensor of that name is the planned one, bit for bit."""
        entry = self.entries.get(tensor.name)
        if entry is None or (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            return False
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.offset)
            return all(same_bits(_read_tensor(file, entry, tuple(piece.shape)), piece) for piece in tensor.pieces())

    @property
    def num_parameters(self) -> int:
        return sum(entry.num_elements for entry in self.entries.values())

    @property
    def fingerprint(self) -> str:
        """12 hex digits over config.json, tokenizer files, the shards' sizes, every tensor's name, dtype and shape, and its first bytes.

        Not over all 24 GB of weights, but two trainings of one architecture, whose headers are equal, differ in every tensor.
        """
        config = b"".join(path.read_bytes() for path in (self.folder / name for name in ("config.json", *COMPANION_FILES)) if path.exists())
        rows = sorted((entry.name, entry.dtype, entry.shape, entry.path.name) for entry in self.entries.values())
        sizes = [(path.name, path.stat().st_size) for path in self.files]
        digest = hashlib.sha256(config + json.dumps([rows, sizes]).encode())
        for entry in sorted(self.entries.values(), key=lambda entry: entry.name):
            with open(entry.path, "rb", buffering=0) as file:
                file.seek(entry.offset)
                digest.update(file.read(min(entry.num_bytes, FINGERPRINT_BYTES)))
        return digest.hexdigest()[:12]


def _read_tensor(file, entry: TensorEntry, shape: tuple[int, ...]) -> torch.Tensor:
    """The next bytes of a file as a tensor. Raises ValueError where they are not all there."""
    tensor = torch.empty(shape, dtype=DTYPES[entry.dtype])
    view, filled = memoryview(_bytes_of(tensor)), 0
    while filled < len(view):
        count = file.readinto(view[filled:])  # one call gives at most 2 GiB
        if not count:
            raise ValueError(f"checkpoint {entry.path}: tensor {entry.name} ends early, {len(view) - filled} bytes are missing")
        filled += count
    return tensor


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality that takes NaNs of the same bits for equal, and 0 and −0 not."""
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(_bytes_of(one.contiguous()), _bytes_of(other.contiguous()))


def _shard_files(folder: Path) -> tuple[list[Path], set[str]]:
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} is not a folder")
    if (folder / INDEX_FILE).exists():
        try:
            weight_map = dict(json.loads((folder / INDEX_FILE).read_text())["weight_map"].items())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"checkpoint {folder / INDEX_FILE} is not a safetensors index with a weight_map ({error})") from None
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for path in files:
            if not path.exists():
                raise ValueError(f"checkpoint {folder}: shard {path.name} is listed in {INDEX_FILE} but missing")
        return files, set(weight_map)
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE], set()
    raise ValueError(f"checkpoint {folder} holds no weights; expected {SINGLE_FILE} or {INDEX_FILE}")


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file. Raises ValueError where the file is truncated or its header unreadable."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + header_bytes > size:
            raise ValueError(f"checkpoint {path} is truncated: {size} bytes do not hold its header")
        try:
            header = json.loads(file.read(header_bytes))
            rows = [(name, row["dtype"], tuple(row["shape"]), *row["data_offsets"]) for name, row in header.items() if name != "__metadata__"]
        except ValueError:
            raise ValueError(f"checkpoint {path} is not a safetensors file: its header is not JSON") from None
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"checkpoint {path} is not a safetensors file: its header does not list tensors") from None
    base = 8 + header_bytes
    entries = []
    for name, dtype, shape, begin, end in rows:
        if base + end > size:
            raise ValueError(f"checkpoint {path} is truncated: tensor {name} ends at byte {base + end}, the file at {size}")
        if dtype not in DTYPES:
            raise ValueError(f"checkpoint {path}: tensor {name} has dtype {dtype}; supported: {', '.join(DTYPES)}")
        entry = TensorEntry(name, path, dtype, shape, base + begin, end - begin)
        if entry.num_bytes != entry.num_elements * DTYPES[dtype].itemsize:
            raise ValueError(f"checkpoint {path}: tensor {name} has {entry.num_bytes} bytes; {dtype} {list(shape)} needs another number")
        entries.append(entry)
    return entries


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to write: its file name, dtype code and shape are known before its values are made.

    `pieces` makes them: one tensor or several that follow each other along the first dimension.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * DTYPES[self.dtype].itemsize


class PlannedWeights:
    """Planned tensors read like those of a Checkpoint that has been written."""

    def __init__(self, tensors: Iterable[PlannedTensor]):
        self.entries = {tensor.name: tensor for tensor in tensors}

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, made anew."""
        return torch.cat(list(self.entries[name].pieces()))


def write_weights(folder: Path, tensors: Iterable[PlannedTensor], *, max_shard_bytes: int, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Write tensors piece by piece into as many shards as needed, with an index when there are several.

    A shard that is already whole (from an interrupted run of the same plan) is kept. `on_bytes` hears how many were
    written or kept. Raises ValueError before anything is written where the disk has too little room.
    """
    shards = _plan_shards(list(tensors), max_shard_bytes)
    names = [SINGLE_FILE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    missing = []
    for file_name, shard in zip(names, shards, strict=True):
        if (folder / file_name).exists() and _holds(folder / file_name, shard):  # renamed into place only when whole
            on_bytes(_num_bytes(shard))
        else:
            missing.append((folder / file_name, shard))
    _check_disk(folder, sum(_num_bytes(shard) for _, shard in missing))
    with ThreadPoolExecutor(max_workers=1) as closer:
        closed = []
        for path, shard in missing:
            file = open(path.with_suffix(".partial"), "wb", buffering=0)  # noqa: SIM115
            _write_shard(file, shard, on_bytes)
            closed.append(closer.submit(_close, file, path))  # waits for the disk while the next one is made
        for each in closed:
            each.result()
    if len(shards) > 1:
        weight_map = {tensor.name: file_name for file_name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(map(_num_bytes, shards))}, "weight_map": weight_map})


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


def _write_shard(file, shard: list[PlannedTensor], on_bytes: Callable[[int], None]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in shard:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.num_bytes]}
        offset += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    _write_all(file, memoryview(struct.pack("<Q", len(encoded)) + encoded))
    for piece in _made_ahead(_checked_pieces(shard)):
        _write_all(file, memoryview(_bytes_of(piece.contiguous())))
        on_bytes(piece.nbytes)


def _close(file, path: Path) -> None:
    """Gives a whole shard its name once the disk has it."""
    os.fsync(file.fileno())
    file.close()
    Path(file.name).rename(path)


def _write_all(file, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]  # one call takes at most 2 GiB


def _checked_pieces(shard: list[PlannedTensor]) -> Iterator[torch.Tensor]:
    for tensor in shard:
        rows = 0
        for piece in tensor.pieces():
            assert piece.dtype == DTYPES[tensor.dtype] and piece.shape[1:] == tensor.shape[1:], f"{tensor.name} differs from its plan"
            rows += len(piece) if piece.ndim else 1
            yield piece
        assert rows == (tensor.shape[0] if tensor.shape else 1), f"{tensor.name} has {rows} rows, not those of its plan"


def _made_ahead(pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same pieces, the next one being made in a thread of its own while one is used."""
    with ThreadPoolExecutor(max_workers=1) as maker:
        pending = maker.submit(next, pieces, None)
        while (piece := pending.result()) is not None:
            pending = maker.submit(next, pieces, None)
            yield piece


def _holds(path: Path, shard: list[PlannedTensor]) -> bool:
    """Whether a file is this shard, not one of a run with another shard size."""
    found = [(entry.name, entry.dtype, entry.shape) for entry in read_header(path)]
    return found == [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard]


def save_model_weights(state: dict[str, torch.Tensor], folder: Path, *, max_shard_bytes: int) -> None:
    """Write tensors already in memory, by their file names, in place of weights that an earlier attempt left."""
    for path in (*folder.glob("model*.safetensors"), folder / INDEX_FILE):
        path.unlink(missing_ok=True)
    codes = {dtype: code for code, dtype in DTYPES.items()}
    planned = [PlannedTensor(name, codes[value.dtype], tuple(value.shape), lambda value=value: [value.detach().cpu()]) for name, value in state.items()]
    write_weights(folder, planned, max_shard_bytes=max_shard_bytes)


def copy_companions(source: Path, folder: Path) -> None:
    """Carry tokenizer, chat template and generation config over, byte for byte."""
    for name in COMPANION_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
