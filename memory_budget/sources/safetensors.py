"""Shapes of a checkpoint's tensors, out of the headers of its safetensors files: 8 bytes, little-endian, the length of the header; the header, JSON."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from memory_budget.configs.values import shown
from memory_budget.json_files import is_inside, parse_json

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
LARGEST_DIMENSION = 2**53
PACKED_DTYPES = ("I8", "U8", "I32", "I64", "U32")  # stored words that hold several numbers, or none
# Tensors that a quantiser stores beside the packed weights.
SCALES = re.compile(r"(scales?|scale_inv|scale_2|zeros|zero_point|g_idx|absmax|quant_map|quant_state\.\w+|weight_shape|SCB|weight_format)$")
PACKED_NAMES = re.compile(r"(qweight|weight_packed|_blocks)$")

Entry = tuple[str, tuple[int, ...]]
TensorSizes = Mapping[str, Entry]  # (dtype, shape) by name
Reader = Callable[[str, int, int], bytes]  # of a file: so many bytes from there on


@dataclass(frozen=True, slots=True)
class Size:
    """shape: as numbers, not as stored words."""

    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int, int]:
        """(copies, outputs, inputs)."""
        return (1, *self.shape) if len(self.shape) == 2 else self.shape


def tensors_of_folder(folder: Path) -> dict[str, Entry]:
    """Of the whole file, which transformers takes first, else of the shards that the index names, else of all *.safetensors; empty where there are none.

    Raises ValueError for a missing shard and for a file that is none.
    """
    names = [WHOLE] if (folder / WHOLE).is_file() else None
    if names is None and (folder / INDEX).is_file():
        names = shards_of(_index_of(folder))
    names = sorted(path.name for path in folder.glob("*.safetensors")) if names is None else names

    def read(name: str, start: int, length: int) -> bytes:
        try:
            with (folder / name).open("rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from None

    return tensors_of(names, read)


def _index_of(folder: Path) -> bytes:
    try:
        with open(folder / INDEX, "rb") as file:
            return file.read(LARGEST_HEADER)
    except OSError as error:
        raise ValueError(f"{INDEX} cannot be read: {error.strerror}") from None


def shards_of(index: bytes) -> list[str]:
    """File names that an index lists. Raises ValueError where it is none, or names a file elsewhere."""
    try:
        names = set(parse_json(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{INDEX} must be a JSON object with weight_map, file names by tensors") from None
    if odd := [name for name in names if not is_inside(name) or "/" in name or not name.endswith(".safetensors")]:
        raise ValueError(f"{INDEX} names {json.dumps(odd[0])[:80]}; it must name *.safetensors files beside it")
    return sorted(names)


def tensors_of(names: Iterable[str], read: Reader) -> dict[str, Entry]:
    """Shapes of the tensors in such files. Raises ValueError for a file that is no safetensors file."""
    tensors: dict[str, Entry] = {}
    for name in names:
        start = read(name, 0, 8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= LARGEST_HEADER:
            raise ValueError(f"{name} must be a safetensors file: its header's length is none")
        tensors |= _entries(name, read(name, 8, length))
    return tensors


def _entries(name: str, header: bytes) -> dict[str, Entry]:
    try:
        return {tensor: _entry(entry) for tensor, entry in parse_json(header).items() if tensor != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{name} must be a safetensors file: its header is none") from None


def _entry(entry: Mapping[str, Any]) -> Entry:
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or not all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < LARGEST_DIMENSION for size in shape):
        raise ValueError
    return dtype, tuple(shape)


def sizes_of(tensors: TensorSizes, config: Mapping[str, Any]) -> tuple[dict[str, Size], list[str]]:
    """Parameters by name, and notes. Tensors that a quantiser stores beside the weights are left out; packed words are taken apart by the config's bits."""
    bits, is_packed, uncounted, sizes = _bits(config), False, [], {}
    for name, (dtype, shape) in tensors.items():
        if SCALES.search(name) and (dtype in PACKED_DTYPES or f"{name.rpartition('.')[0]}.weight" in tensors or _is_packed_beside(name, tensors)):
            continue
        if dtype in PACKED_DTYPES and (PACKED_NAMES.search(name) or bits and name.endswith("weight")):
            is_packed, width = True, int(dtype[1:])
            shape = _unpacked(name, shape, width // bits if bits and bits <= width else width // 4)
        elif dtype in PACKED_DTYPES or dtype == "BOOL":
            uncounted += [name] if name.endswith("weight") else []  # else buffers: indices, masks
            continue
        sizes[name] = Size(shape)
    notes = ["packed weights are counted by the numbers that they hold, without their scales"] if is_packed else []
    if uncounted:
        first = shown(uncounted[0])
        notes.append(f"{len(uncounted):,} tensors of whole numbers are not counted, {first} the first: the config does not say how they are packed")
    return sizes, notes


def _is_packed_beside(name: str, tensors: TensorSizes) -> bool:
    stem = SCALES.sub("", name)
    return any(stem + packed in tensors for packed in ("qweight", "blocks", "weight_packed", "packed"))


def _unpacked(name: str, shape: tuple[int, ...], each: int) -> tuple[int, ...]:
    """[…, words] → […, words·each]; GPTQ's qweight is packed along its first dimension, AWQ's along its last: the product is the same."""
    if name.endswith("_blocks") and len(shape) >= 3:
        return (*shape[:-2], shape[-2] * shape[-1] * each)
    return (*shape[:-1], shape[-1] * each) if shape else shape


def _bits(config: Mapping[str, Any]) -> int:
    """Bits of a packed number by quantization_config; 0 where it does not say."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return 0
    if settings.get("load_in_4bit") or settings.get("quant_method") == "mxfp4" or "fp4" in str(settings.get("quant_algo")).lower():
        return 4
    groups = settings.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    bits = weights.get("num_bits") if isinstance(weights, Mapping) else settings.get("bits", settings.get("w_bit", 8 if settings.get("load_in_8bit") else 0))
    return bits if isinstance(bits, int) and bits in (2, 3, 4, 8) else 0
