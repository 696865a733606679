"""Which files a model folder's weights are in, what their headers say, and whether they are quantised: of the files alone, without torch.

The order is that of transformers (modeling_utils.py, _get_resolved_checkpoint_files): `transformers_weights` of config.json, then the whole file, then the
index. Other programs look at the index first, so a folder that has both is told of.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_budget.configs.values import shown
from memory_budget.json_files import LARGEST_INDEX, is_inside, parse_json, read_json
from minitron.families.known import method_of, quantised_by_config

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
LFS_POINTER = b"version https://git-lfs"
LARGEST_HEADER = 10**8  # bytes, of the safetensors format
MOST_BYTES = 2**60  # of a file, and numbers of a dimension
# What a folder without safetensors of its own may hold instead, and what would work.
OTHER_WEIGHTS = (
    ("adapter_model.*", "an adapter (LoRA) and not the model it belongs to; merge it into that one first (peft: merge_and_unload, then save_pretrained)"),
    ("*.bin", "no safetensors; load them with transformers and save_pretrained writes safetensors"),
    ("*.pth", "no safetensors; convert them to a folder of transformers first"),
    ("*.gguf", "a GGUF; teacher.gguf takes one"),
    ("consolidated*.safetensors", "not in transformers' layout; convert them to it first"),
)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files that hold a model's tensors, the tensors that an index promises, and what a person should know of the folder."""

    files: tuple[Path, ...]
    listed: frozenset[str]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """Of one safetensors file: where its tensors' bytes begin, and of every tensor its name, dtype code, shape, first byte and end, counted from there."""

    base: int
    rows: tuple[tuple[str, str, tuple[int, ...], int, int], ...]


def weight_files(folder: Path) -> WeightFiles:
    """Where transformers would read the weights of a folder. Raises ValueError for a folder that it could not load, saying what is there instead."""
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} is not a folder")
    named = _named_in_config(folder)
    if named is not None:
        return _indexed(folder, named, ()) if named.endswith(".index.json") else WeightFiles((_inside(folder, named),), frozenset(), ())
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        others = "; the shards beside it are not" if _shards(folder) else ""
        both = f"{folder} holds {SINGLE_FILE} and {INDEX_FILE}: {SINGLE_FILE} is read, as transformers does{others}. Programs that look at the index first " \
               "read something else or fail: delete the one that is of an earlier save"  # fmt: skip
        return WeightFiles((single,), frozenset(), (both,) if index.exists() else ())
    if index.is_file():
        return _indexed(folder, INDEX_FILE, ())
    if shards := _shards(folder):
        raise ValueError(f"checkpoint {folder} holds no weights that transformers would load; expected {SINGLE_FILE} or {INDEX_FILE}: {shards[0].name} is a "
                         "shard, and the index that lists it is missing; fetch it too, or save the model again")  # fmt: skip
    for pattern, what in OTHER_WEIGHTS:
        if found := sorted(path.name for path in folder.glob(pattern)):
            raise ValueError(f"checkpoint {folder} holds no weights as stages read them; expected {SINGLE_FILE} or {INDEX_FILE}, but {found[0]} is {what}")
    raise ValueError(f"checkpoint {folder} holds no weights; expected {SINGLE_FILE} or {INDEX_FILE}")


def _named_in_config(folder: Path) -> str | None:
    """`transformers_weights`, by which a config.json names the file of weights or the index."""
    try:
        named = read_json(folder / "config.json").get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None
    if named is None or (isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))):
        return named
    raise ValueError(f"checkpoint {folder}: transformers_weights in config.json is {named!r}; it must name a .safetensors or .safetensors.index.json file")


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder by the name that a config or an index gives it. Raises ValueError for one elsewhere or missing."""
    _check_name(folder, name)
    if not (folder / name).is_file():
        raise ValueError(f"checkpoint {folder}: {name} is named as the file of weights but missing")
    return folder / name


def _check_name(folder: Path, name: str) -> None:
    if not is_inside(name):
        raise ValueError(f"checkpoint {folder}: {shown(name)} is named as a file of weights but lies outside of the folder, or is no name of a file")
    if not name.endswith(".safetensors"):
        raise ValueError(f"checkpoint {folder}: {shown(name)} is named as a file of weights; it must be a .safetensors file")


def _indexed(folder: Path, index: str, notes: tuple[str, ...]) -> WeightFiles:
    try:
        weight_map = dict(read_json(folder / index, LARGEST_INDEX)["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {folder / index} is not a safetensors index with a weight_map ({error})") from None
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        _check_name(folder, name)
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder}: shard {name} is listed in {index} but missing{_other_set(folder, set(names))}")
    unlisted = sorted(path.name for path in _shards(folder) if path.name not in names)
    if unlisted:
        notes += (f"{folder} holds {unlisted[0]}{f' and {len(unlisted) - 1} more' if len(unlisted) > 1 else ''}, which {index} does not list: not read",)
    return WeightFiles(tuple(_inside(folder, name) for name in names), frozenset(weight_map), notes)


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("model-*-of-*.safetensors") if SHARD.fullmatch(path.name))


def _other_set(folder: Path, listed: set[str]) -> str:
    """For the message of a missing shard: whether the shards of another save are all there."""
    counts: dict[str, int] = {}
    for path in _shards(folder):
        if path.name not in listed:
            total = SHARD.fullmatch(path.name)[2]
            counts[total] = counts.get(total, 0) + 1
    whole = [total for total, found in counts.items() if found == int(total)]
    return f"; the index is of another save than the {int(whole[0])} shards model-…-of-{whole[0]}.safetensors that are there: give it theirs" if whole else ""


def read_header_rows(path: Path) -> Header:
    """The header of one safetensors file. Raises ValueError where the file cannot be read, is truncated, or its header is none."""
    try:
        return _header_rows(path)
    except OSError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error.strerror}") from None


def _header_rows(path: Path) -> Header:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if size >= 8 + header_bytes > 8 + LARGEST_HEADER:
            raise ValueError(f"checkpoint {path} is not a safetensors file: its header would have {header_bytes:,} bytes, and {LARGEST_HEADER:,} are the most")
        if 8 + header_bytes > size:
            if (start + file.read(len(LFS_POINTER))).startswith(LFS_POINTER):
                raise ValueError(f"checkpoint {path} is a pointer of Git LFS and not the file itself; `git lfs pull` fetches it")
            raise ValueError(f"checkpoint {path} is truncated: {size} bytes do not hold its header")
        try:
            header = parse_json(file.read(header_bytes))
        except ValueError:
            raise ValueError(f"checkpoint {path} is not a safetensors file: its header is not JSON") from None
    try:
        rows = [_header_row(name, row) for name, row in header.items() if name != "__metadata__"]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"checkpoint {path} is not a safetensors file: its header does not list tensors") from None
    return Header(8 + header_bytes, tuple(rows))


def _header_row(name: str, row: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...], int, int]:
    """A row of a header. Raises what a row that is none does."""
    dtype, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
    if not isinstance(dtype, str) or not all(type(size) is int and 0 <= size < MOST_BYTES for size in (*shape, begin, end)) or begin > end:
        raise ValueError
    return name, dtype, shape, begin, end


# Names that quantisers give to what they store beside or in place of a weight, and whose they are.
QUANTISED_NAMES = (
    (re.compile(r"(^|\.)(weight_packed|weight_shape)$"), "compressed-tensors"),
    (re.compile(r"(^|\.)(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(SCB|weight\.(absmax|quant_map|nested_absmax|quant_state\.\w+))$"), "bitsandbytes"),
    (re.compile(r"weight_scale_2$"), "NVFP4"),
    (re.compile(r"(weight|input|output|[kv]|kv|activation)_scale(_inv)?$"), "FP8"),
    (re.compile(r"_(blocks|scales)$"), "MXFP4"),
)
QUANTISED_DTYPES = re.compile(r"F8_\w+|F[46](_\w+)?|[IU][48]")
QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def check_plain_weights(folder: Path, config: Mapping[str, Any], setting: str) -> None:
    """Refuse a quantised checkpoint, by config.json, by a quantiser's own file, or by the tensors' names and dtypes. Raises ValueError.

    `setting` is what named the folder, for the message.
    """
    found = quantised_by_config(config) or _quantised_by_file(folder) or _quantised_by_tensors(folder)
    if found:
        raise ValueError(f"{setting} is {str(folder)!r}, a quantised checkpoint ({found}); stages cut, train and merge plain weights: give the bf16 one")


def _quantised_by_file(folder: Path) -> str | None:
    for name in QUANTISED_FILES:
        if (folder / name).is_file():
            try:
                said = read_json(folder / name)
            except (OSError, ValueError):
                said = {}
            return f"{name} is there ({method_of(said.get('quantization', said) if isinstance(said, Mapping) else {})})"
    return None


def _quantised_by_tensors(folder: Path) -> str | None:
    dtypes = {name: dtype for path in weight_files(folder).files for name, dtype, *_ in read_header_rows(path).rows}
    for pattern, whose in QUANTISED_NAMES:
        if name := next(filter(pattern.search, dtypes), None):
            return f"{whose}: tensor {name}"
    small = ((name, dtype) for name, dtype in dtypes.items() if isinstance(dtype, str) and QUANTISED_DTYPES.fullmatch(dtype))
    return next((f"{'FP8' if dtype.startswith('F8') else dtype}: tensor {name} is {dtype}" for name, dtype in small), None)
