"""Checkpoints streamed tensor by tensor: never more than one tensor in memory.

Reading goes through plain file reads, not a memory map, so that what was read does not count as resident
memory. The safetensors format (header length, JSON header, raw bytes) is written directly because the
library's writer needs a whole shard in memory at once.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

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

    def __init__(self, folder: Path):
        """Read every shard's header. Raises ValueError for a missing folder, shard or tensor, or a truncated file."""
        self.folder = Path(folder)
        files, indexed = _shard_files(self.folder)
        self.files = files
        self.entries = {entry.name: entry for path in files for entry in read_header(path)}
        missing = sorted(indexed - set(self.entries))
        if missing:
            raise ValueError(f"checkpoint {self.folder}: tensor {missing[0]} is listed in {INDEX_FILE} but in none of its shards")

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, in its stored dtype and shape."""
        entry = self.entries[name]
        if entry.num_bytes == 0:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        buffer = bytearray(entry.num_bytes)
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.offset)
            if _read_into(file, buffer) != entry.num_bytes:
                raise ValueError(f"checkpoint {entry.path}: tensor {name} ends early")
        return torch.frombuffer(buffer, dtype=DTYPES[entry.dtype]).reshape(entry.shape)

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


def _read_into(file, buffer: bytearray) -> int:
    view, filled = memoryview(buffer), 0
    while filled < len(buffer):
        count = file.readinto(view[filled:])  # one call gives at most 2 GiB
        if not count:
            break
        filled += count
    return filled


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
    """A tensor to write: its file name, dtype code and shape are known before its values are made."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * DTYPES[self.dtype].itemsize


def write_weights(folder: Path, tensors: Iterable[PlannedTensor], *, max_shard_bytes: int, on_tensor: Callable[[int], None] = lambda _: None) -> None:
    """Write tensors one at a time into as many shards as needed, with an index when there are several.

    A shard that is already whole (from an interrupted run of the same plan) is kept. `on_tensor` hears the
    bytes of every tensor written or kept.
    """
    shards = _plan_shards(list(tensors), max_shard_bytes)
    names = [SINGLE_FILE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        _write_shard(folder / file_name, shard, on_tensor)
    if len(shards) > 1:
        weight_map = {tensor.name: file_name for file_name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.num_bytes for shard in shards for tensor in shard)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan_shards(tensors: list[PlannedTensor], max_shard_bytes: int) -> list[list[PlannedTensor]]:
    shards, filled = [[]], 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def _write_shard(path: Path, shard: list[PlannedTensor], on_tensor: Callable[[int], None]) -> None:
    if path.exists() and _holds(path, shard):  # renamed into place only when whole
        for tensor in shard:
            on_tensor(tensor.num_bytes)
        return
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in shard:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.num_bytes]}
        offset += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in shard:
            value = tensor.make()
            assert tuple(value.shape) == tensor.shape and value.dtype == DTYPES[tensor.dtype], f"{tensor.name} differs from its plan"
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy())
            on_tensor(tensor.num_bytes)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _holds(path: Path, shard: list[PlannedTensor]) -> bool:
    """Whether a file is this shard, not one of a run with another shard size."""
    found = [(entry.name, entry.dtype, entry.shape) for entry in read_header(path)]
    return found == [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard]


def save_model_weights(state: dict[str, torch.Tensor], folder: Path, *, max_shard_bytes: int) -> None:
    """Write tensors already in memory, by their file names, in place of weights that an earlier attempt left."""
    for path in (*folder.glob("model*.safetensors"), folder / INDEX_FILE):
        path.unlink(missing_ok=True)
    codes = {dtype: code for code, dtype in DTYPES.items()}
    planned = [PlannedTensor(name, codes[value.dtype], tuple(value.shape), lambda value=value: value.detach().cpu()) for name, value in state.items()]
    write_weights(folder, planned, max_shard_bytes=max_shard_bytes)


def copy_companions(source: Path, folder: Path) -> None:
    """Carry tokenizer, chat template and generation config over, byte for byte."""
    for name in COMPANION_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
