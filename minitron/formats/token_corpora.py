"""Corpora of ready-made tokens in Megatron-LM's form: all tokens in a .bin, and where sequences and documents lie in an .idx beside it.

The form of the .idx is that of megatron/core/datasets/indexed_dataset.py (and the same in its forerunners): a head, then of S
sequences the lengths (int32 [S], tokens) and the begins (int64 [S], bytes of the .bin), then D boundaries of documents, counted in
sequences (int64 [D], the first is 0), and in some a mode of each sequence (int8 [S]).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.formats.blocks import Block, document_name
from minitron.formats.kinds import TOKENS, TOKENS_INDEX
from minitron.formats.streams import Given, wrong

MAGIC, OLD_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
HEAD = struct.Struct("<9sQBQQ")  # magic, version, code of the type, S, D
# numpy's names. Codes 6 and 7 are floats, single and double in an order that differs between versions; no token is one.
TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
TYPE_BYTES = {"uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint16": 2}
AT_ONCE = 4096  # documents whose boundaries are looked at together


@dataclass(frozen=True, slots=True)
class Head:
    """Of an .idx: the type of the tokens, numpy's name, the number of sequences, and of boundaries of documents."""

    type: str
    num_sequences: int
    num_boundaries: int


def check_pair(path: Path) -> Path:
    """The .idx that belongs to a .bin. Raises ValueError where one of the two is not there."""
    index = path.with_suffix(TOKENS_INDEX)
    if not index.is_file():
        raise wrong(path.name, f"has no {index.name} beside it; a {TOKENS} is read as Megatron-LM writes it, with its {TOKENS_INDEX}")
    if not path.is_file():
        raise wrong(index.name, f"has no {path.name} beside it, which holds its tokens")
    return index


def index_head(path: Path) -> Head:
    """The head of the .idx that belongs to a .bin. Raises ValueError where there is none, or another form's, or it is cut off."""
    index = check_pair(path)
    with index.open("rb") as file:
        data = file.read(HEAD.size)
    if data.startswith(OLD_MAGIC):
        raise wrong(index.name, "is an index of an older form; Megatron-LM's preprocess_data.py writes it anew as mmap")
    if len(data) < HEAD.size or not data.startswith(MAGIC):
        raise wrong(index.name, f"is no index of a token corpus: it must begin with {MAGIC!r} and have {HEAD.size} bytes of head")
    _, version, code, num_sequences, num_boundaries = HEAD.unpack(data)
    if version != 1 or code not in TYPES:
        reason = f"its version is {version}, known is 1" if version != 1 else f"its tokens are of type {code}, known are {', '.join(map(str, TYPES))}"
        raise wrong(index.name, f"cannot be read: {reason}")
    least = HEAD.size + 12 * num_sequences + 8 * num_boundaries
    size = index.stat().st_size
    if size < least:
        raise wrong(index.name, f"is cut off: {num_sequences:,} sequences and {num_boundaries:,} boundaries take {least:,} bytes, it has {size:,}")
    return Head(TYPES[code], num_sequences, num_boundaries)


def token_documents(given: Given, start: dict[str, Any] | None) -> Iterator[Block]:
    """Blocks of kind "tokens"; a document is all sequences between two boundaries."""
    corpus = _Corpus(given)
    document = start["document"] if start else 0
    while document < corpus.num_documents:
        ids, lengths, num_bytes = corpus.read(document)
        end = document + len(lengths)
        yield Block(given.name, document, len(lengths), "tokens", (ids, lengths), {"document": end}, num_bytes)
        document = end


class _Corpus:
    """The two files, mapped; nothing is held."""

    def __init__(self, given: Given) -> None:
        import numpy as np

        self._given, self._index_name = given, given.path.with_suffix(TOKENS_INDEX).name
        head = index_head(given.path)
        index = np.memmap(given.path.with_suffix(TOKENS_INDEX), mode="r")
        ends = np.cumsum([HEAD.size, 4 * head.num_sequences, 8 * head.num_sequences, 8 * head.num_boundaries])
        parts = [index[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]
        self._lengths_S, self._begins_S, self._boundaries_D = (part.view(kind) for part, kind in zip(parts, ("<i4", "<i8", "<i8"), strict=True))
        self._type = np.dtype(head.type).newbyteorder("<")
        self._bin = np.memmap(given.path, mode="r")
        self.num_documents = max(head.num_boundaries - 1, 0)
        self._check()

    def _check(self) -> None:
        num_sequences = len(self._lengths_S)
        if self.num_documents and (self._boundaries_D[0] != 0 or self._boundaries_D[-1] != num_sequences):
            raise wrong(self._index_name, f"is damaged: its documents must reach from sequence 0 to its last of {num_sequences:,}, they reach from "
                                          f"{self._boundaries_D[0]:,} to {self._boundaries_D[-1]:,}")  # fmt: skip
        if num_sequences:
            need, size = int(self._begins_S[-1]) + int(self._lengths_S[-1]) * self._type.itemsize, len(self._bin)
            if need > size:
                raise wrong(self._given.name, f"is cut off: it has {size:,} bytes, and its {TOKENS_INDEX} says at least {need:,}")

    def read(self, document: int) -> tuple[Any, Any, int]:
        """(ids int32 [N], lengths int64 [documents], bytes of the .bin) of the block that begins with `document`."""
        import numpy as np

        boundaries = np.asarray(self._boundaries_D[document : document + AT_ONCE + 1])
        first = int(boundaries[0])
        if (np.diff(boundaries) < 0).any() or boundaries[-1] > len(self._lengths_S):
            raise self._damaged(document, "the boundaries of the documents do not rise")
        lengths = self._lengths_S[first : int(boundaries[-1])].astype(np.int64)
        if (lengths < 0).any():
            raise self._damaged(document, "a sequence has less than no tokens")
        before = np.concatenate([[0], np.cumsum(lengths)])  # tokens before each of these sequences
        tokens = before[boundaries - first]  # and before each of these documents
        count = min(int(np.searchsorted(tokens * self._type.itemsize, self._given.block_bytes)), len(tokens) - 1)
        last = int(boundaries[count])
        ids = self._ids(document, np.asarray(self._begins_S[first:last]), lengths[: last - first])
        return ids, np.diff(tokens[: count + 1]), int(tokens[count]) * self._type.itemsize

    def _ids(self, document: int, begins: Any, lengths: Any) -> Any:
        """The tokens of sequences, one after another, int32."""
        import numpy as np

        num_bytes = lengths * self._type.itemsize
        ends = begins + num_bytes
        if (begins < 0).any() or (ends > len(self._bin)).any():
            raise self._damaged(document, "a sequence lies outside its .bin")
        if not len(begins):
            return np.zeros(0, np.int32)
        if (begins[1:] == ends[:-1]).all():  # as they are written
            data = self._bin[begins[0] : ends[-1]]
        else:
            data = np.concatenate([self._bin[begin:end] for begin, end in zip(begins, ends, strict=True)])
        ids = data.view(self._type)
        if ids.dtype.itemsize > 4 and len(ids) and (ids.max() > np.iinfo(np.int32).max or ids.min() < np.iinfo(np.int32).min):
            raise wrong(document_name(self._given.name, document + 1), "or one soon after has a token id that does not fit in 32 bits")
        return np.array(ids, dtype=np.int32)

    def _damaged(self, document: int, reason: str) -> ValueError:
        return wrong(document_name(self._index_name, document + 1), f"or one soon after is damaged: {reason}")
