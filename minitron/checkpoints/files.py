"""Checkpoints streamed piece by piece: a model never has to be in memory, nor has a tensor. What a file has stacked is read part by part (stacked.py).

Reading goes through plain file reads, not a memory map, so that what was read does not count as resident
memory, and around the page cache (direct_io.py) where the files are too large to stay in it.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from memory_budget.json_files import read_json
from minitron.checkpoints.direct_io import empty_tensor, fill_tensor, would_not_stay
from minitron.checkpoints.folder import COMPANION_FILES
from minitron.checkpoints.local_paths import is_local
from minitron.checkpoints.stacked import parts_of
from minitron.checkpoints.weight_files import INDEX_FILE, WeightFiles, read_header_rows, weight_files
from minitron.checkpoints.weight_files import SINGLE_FILE as SINGLE_FILE
from minitron.families.config_json import CODE_KEYS
from minitron.families.table import BUFFER

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
# Large enough for a disk's full rate, small enough that a piece is still in the processor's cache when it is cut and written.
PIECE_BYTES = 2**24
COMPANION_CONFIGS = ("tokenizer_config.json", "generation_config.json")
PLACE_ENDINGS = ("name_or_path", "_file")  # of keys of theirs that name a file or folder


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

    def __init__(self, folder: Path, *, file: str | None = None, direct: bool | None = None):
        """Read every shard's header. Raises ValueError for a missing folder, shard or tensor, or a truncated file.

        `file` is the one file to read where it is not named as a model's, a saved state's say; `direct` says whether to read around
        the page cache, else the files' size decides.
        """
        self.folder = Path(folder)
        found = weight_files(self.folder) if file is None else WeightFiles((self.folder / file,), frozenset(), ())
        files = self.files = list(found.files)
        self.notes = found.notes
        stored = [entry for path in files for entry in read_header(path)]
        self.entries = {part.name: part for entry in stored for part in _apart(entry)}
        self.direct = would_not_stay(sum(entry.num_bytes for entry in self.entries.values())) if direct is None else direct
        missing = sorted(found.listed - {entry.name for entry in stored})
        if missing:
            raise ValueError(f"checkpoint {self.folder}: tensor {missing[0]} is listed in {INDEX_FILE} but in none of its shards")

    def empty(self, name: str) -> torch.Tensor:
        """Memory for one whole tensor, in its stored dtype and shape."""
        entry = self.entries[name]
        return empty_tensor(entry.shape, DTYPES[entry.dtype], entry.offset, direct=self.direct)

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One whole tensor, in its stored dtype and shape; `into`, an empty(name), is filled and given."""
        entry = self.entries[name]
        return self._fill(self.empty(name) if into is None else into, entry, entry.offset)

    def read_rows(self, name: str, most_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor in pieces of at most so many bytes (at least a row), as (number of the first row, rows); a row is an index of the first dimension."""
        entry = self.entries[name]
        rows = entry.shape[0]
        step = max(1, most_bytes * rows // max(entry.num_bytes, 1))
        for first in range(0, rows, step):
            yield first, self.read_some(name, first, min(step, rows - first))

    def read_some(self, name: str, first: int, number: int) -> torch.Tensor:
        """So many rows of a tensor from `first` on."""
        entry = self.entries[name]
        offset = entry.offset + first * entry.num_bytes // entry.shape[0]
        piece = empty_tensor((number, *entry.shape[1:]), DTYPES[entry.dtype], offset, direct=self.direct)
        return self._fill(piece, entry, offset)

    def _fill(self, tensor: torch.Tensor, entry: TensorEntry, offset: int) -> torch.Tensor:
        """The file's bytes from `offset` on as a tensor. Raises ValueError where they are not all there."""
        if missing := fill_tensor(tensor, entry.path, offset, direct=self.direct):
            raise ValueError(f"checkpoint {entry.path}: tensor {entry.name} ends early, {missing} bytes are missing")
        return tensor

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
        offset = entry.offset
        for piece in tensor.pieces():
            stored = empty_tensor(piece.shape, piece.dtype, offset, direct=self.direct)
            if not same_bits(self._fill(stored, entry, offset), piece):
                return False
            offset += piece.nbytes
        return True

    @property
    def num_parameters(self) -> int:
        """As transformers counts them: without buffers, of which routers store some."""
        return sum(entry.num_elements for entry in self.entries.values() if not BUFFER.search(entry.name))


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory, or that of a contiguous copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality that takes NaNs of the same bits for equal, and 0 and −0 not."""
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(bytes_of(one), bytes_of(other))


def _apart(entry: TensorEntry) -> list[TensorEntry]:
    """The parts of a stack, any other tensor as it is."""
    width = DTYPES[entry.dtype].itemsize
    parts = [replace(entry, name=name, shape=shape, offset=entry.offset + first * width, num_bytes=shape[0] * shape[1] * width)
             for name, shape, first in parts_of(entry.name, entry.shape)]  # fmt: skip
    return parts or [entry]


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, as it has them. Raises ValueError where the file is truncated or its header unreadable."""
    size, header = path.stat().st_size, read_header_rows(path)
    entries = []
    for name, dtype, shape, begin, end in header.rows:
        if header.base + end > size:
            raise ValueError(f"checkpoint {path} is truncated: tensor {name} ends at byte {header.base + end}, the file at {size}")
        if dtype not in DTYPES:
            raise ValueError(f"checkpoint {path}: tensor {name} has dtype {dtype}; supported: {', '.join(DTYPES)}")
        entry = TensorEntry(name, path, dtype, shape, header.base + begin, end - begin)
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

    def empty(self, name: str) -> torch.Tensor:
        """Memory for one whole tensor."""
        return torch.empty(self.entries[name].shape, dtype=DTYPES[self.entries[name].dtype])

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One whole tensor, made anew; `into`, an empty(name), is filled and given."""
        tensor = self.empty(name) if into is None else into
        for first, piece in self.read_rows(name):
            tensor[first : first + len(piece)] = piece
        return tensor

    def read_rows(self, name: str, most_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
        """Its pieces as they are made, each with the number of its first row."""
        first = 0
        for piece in self.entries[name].pieces():
            yield first, piece
            first += len(piece)


def stored_bytes(folder: Path) -> int:
    """Bytes of a number of a checkpoint, the widest it has."""
    return max(DTYPES[entry.dtype].itemsize for entry in Checkpoint(folder).entries.values())


def copy_companions(source: Path, folder: Path) -> None:
    """Carry tokenizer, chat template and generation config over, byte for byte, but for what speaks of this machine or of code that is not carried over."""
    for name in COMPANION_FILES:
        if (source / name).exists():
            cleaned = _without_places(source, name) if name in COMPANION_CONFIGS else None
            if cleaned is None:
                shutil.copyfile(source / name, folder / name)
            else:
                (folder / name).write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_places(source: Path, name: str) -> dict | None:
    """A config beside the weights without paths of a machine and without `auto_map`; None where it has neither, or cannot be read."""
    try:
        config = read_json(source / name)
    except ValueError:
        return None
    if not isinstance(config, dict):
        return None
    gone = {key for key, value in config.items() if key in CODE_KEYS or (isinstance(value, str) and key.endswith(PLACE_ENDINGS) and is_local(value))}
    kept = {key: value for key, value in config.items() if key not in gone}
    own_class = str(config.get("tokenizer_class") or "no class").removesuffix("Fast") in str(config.get("auto_map"))
    if own_class and (source / "tokenizer.json").exists():
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"  # what any program makes of a tokenizer.json
    return kept if gone else None
