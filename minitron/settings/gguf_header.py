"""What a GGUF file says before its weights begin, and the config.json that follows from it. Standard library only.

The format is llama.cpp's (github.com/ggml-org/ggml, docs/gguf.md): a magic word, metadata as typed keys and values, a table of tensors, then, aligned,
their numbers. Values are read, but of arrays, a vocabulary say, only their length: what a config needs takes milliseconds.
"""

import hashlib
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite, prod
from pathlib import Path
from typing import Any

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4  # of ggml
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's letters of the metadata's types
# Tensors' number formats by ggml's number: name, numbers of a block, bytes of a block.
BLOCKS = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
          10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18),
          23: ("IQ4_XS", 256, 136), 30: ("BF16", 1, 2)}  # fmt: skip
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # whose config.json is known here, and whose model_type is of the same name


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A row of the table; `shape` has the fastest dimension first, `number_format` is ggml's number, `offset` counts from where the numbers begin."""

    name: str
    shape: tuple[int, ...]
    number_format: int
    offset: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        _, numbers, num_bytes = BLOCKS[self.number_format]
        return self.num_elements // numbers * num_bytes


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Metadata (of an array its length) and tensors of a file whose numbers begin at byte `start`."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GGUFTensor, ...]
    start: int

    @property
    def number_formats(self) -> list[str]:
        """The number formats of its matrices, most frequent first."""
        names = [BLOCKS[tensor.number_format][0] for tensor in self.tensors if len(tensor.shape) > 1]
        return sorted(set(names), key=names.count, reverse=True)


def read_gguf_header(path: Path) -> GGUFHeader:
    """Raises ValueError, which begins with "which", for what is no file, no GGUF, or truncated; read once as long as size and time of change stay."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"which cannot be read: {error.strerror}") from None
    if not path.is_file():
        raise ValueError("which is no file; it must be a .gguf file")
    return _read(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: Path, size: int, _changed: int) -> GGUFHeader:
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError("which is no GGUF file: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                metadata, tensors, end = _parse(_Cursor(data))
            except RecursionError:
                raise ValueError("which is no GGUF file: its metadata nests arrays without end") from None
            except (struct.error, IndexError):
                raise ValueError(f"which is truncated: its {size:,} bytes do not hold its header") from None
            except UnicodeDecodeError:
                raise ValueError("which is no GGUF file: a name in its header is no text") from None
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"which is no GGUF file: its general.alignment is {alignment!r}")
    header = GGUFHeader(path, metadata, tensors, -(-end // alignment) * alignment)
    for tensor in tensors:
        if tensor.number_format not in BLOCKS:
            raise ValueError(f"whose tensor {tensor.name} has the number format {tensor.number_format} of ggml; those read are "
                             f"{', '.join(name for name, _, _ in BLOCKS.values())}")  # fmt: skip
        if header.start + tensor.offset + tensor.num_bytes > size:
            raise ValueError(f"which is truncated: tensor {tensor.name} ends at byte {header.start + tensor.offset + tensor.num_bytes:,}, the file at {size:,}")
    return header


class _Cursor:
    """Reads little-endian values one after another. Raises struct.error or IndexError past the end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 0

    def take(self, letters: str) -> tuple:
        values = struct.unpack_from(f"<{letters}", self.data, self.place)
        self.place += struct.calcsize(f"<{letters}")
        return values

    def skip(self, number: int) -> None:
        self.place += number
        if self.place > len(self.data):
            raise IndexError

    def text(self) -> str:
        (length,) = self.take("Q")
        self.skip(length)
        return self.data[self.place - length : self.place].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.take(self._letter(kind))[0]
        of, length = self.take("IQ")
        if of in (STRING, ARRAY):
            for _ in range(length):
                self.skip(self.take("Q")[0]) if of == STRING else self.value(ARRAY)
        else:
            self.skip(length * struct.calcsize(self._letter(of)))
        return length

    @staticmethod
    def _letter(kind: int) -> str:
        if kind not in FORMATS:
            raise ValueError(f"which is no GGUF file: its metadata has a value of type {kind}")
        return FORMATS[kind]


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], tuple[GGUFTensor, ...], int]:
    """Metadata, tensors, and where the table ends."""
    cursor.skip(len(MAGIC))
    version, num_tensors, num_values = cursor.take("IQQ")
    if version not in VERSIONS:
        raise ValueError(f"which is GGUF of version {version}; it must be {' or '.join(map(str, VERSIONS))}")
    metadata = {}
    for _ in range(num_values):
        name = cursor.text()
        metadata[name] = cursor.value(cursor.take("I")[0])
    tensors = []
    for _ in range(num_tensors):
        name, (dimensions,) = cursor.text(), cursor.take("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"which is no GGUF file: tensor {name} has {dimensions:,} dimensions")
        tensors.append(GGUFTensor(name, cursor.take("Q" * dimensions), *cursor.take("IQ")))
    return metadata, tuple(tensors), cursor.place


@lru_cache(maxsize=8)
def _digest(path: Path, size: int, changed: int) -> str:
    header = _read(path, size, changed)
    with path.open("rb", buffering=0) as file:
        return hashlib.sha256(file.read(header.start) + f"{size} {changed}".encode()).hexdigest()[:12]


def gguf_fingerprint(path: Path) -> str:
    """12 hex digits over the header, the size and the time of the last change: whatever is written into the file changes it, and so does a touch."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


def gguf_config(header: GGUFHeader) -> dict[str, Any]:
    """The config.json of the model. Raises ValueError, which begins with "which" or "whose", for one that transformers would load as something else."""
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"whose architecture is {architecture!r}; it must be one of {', '.join(ARCHITECTURES)}")

    def value(name: str, default: Any = None) -> Any:
        found = metadata.get(f"{architecture}.{name}", default)
        if found is None:
            raise ValueError(f"whose metadata lacks {architecture}.{name}")
        if isinstance(found, float) and not isfinite(found):
            raise ValueError(f"whose {architecture}.{name} is {found}; it must be a finite number")
        return _decimal(found) if isinstance(found, float) else found

    def size(name: str, default: Any = None) -> int:
        found = value(name, default)
        if not isinstance(found, int) or found < 1:
            raise ValueError(f"whose {architecture}.{name} is {found!r}; it must be a whole number of at least 1")
        return found

    names = {tensor.name for tensor in header.tensors}
    # transformers passes over both.
    if value("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in names:
        raise ValueError("whose positions are scaled (rope.scaling.type or rope_freqs.weight), which transformers does not read from a GGUF")
    if value("expert_count", 0):
        raise ValueError(f"which has {value('expert_count')} experts; it must be a dense model")
    heads = size("attention.head_count")
    head_dim = size("attention.key_length", metadata.get(f"{architecture}.rope.dimension_count") or size("embedding_length") // heads)
    ids = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{stored}_token_id") for name, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    return {
        "model_type": architecture,
        "vocab_size": size("vocab_size", metadata.get("tokenizer.ggml.tokens")),
        "hidden_size": size("embedding_length"),
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_theta": value("rope.freq_base", 10000.0), "rope_type": "default"},
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in names,
        **{name: token for name, token in ids.items() if token is not None},
    }


def _decimal(value: float) -> float:
    """The shortest decimal that is the same number in float32, which is how the file has it: 1e-05 for 9.999999747378752e-06."""
    stored = struct.pack("<f", value)
    return next(float(text) for digits in range(1, 18) if struct.pack("<f", float(text := f"{value:.{digits}g}")) == stored)
