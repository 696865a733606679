"""A source as pieces: documents in the order in which they lie there, from any place on.

A document's name is its file's name without folder and extensions (of a Hub dataset, its id) and its position among the documents of that name. The split into
train and held-out goes by the name (`minitron.sources.document`), so the same files split alike wherever they lie. Nothing is shuffled, there is no seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from minitron.formats.blocks import Block, records
from minitron.settings.data import DataSettings
from minitron.sources.document import is_held_out
from minitron.sources.forms import Fields, Reading, recognise

RECOGNISED_BY = 32  # records of a file


@dataclass(frozen=True, slots=True)
class Piece:
    """Documents that follow one another: a block of records, the documents' names, and how a record is read (None: it is text, or token ids).

    `place` is plain values: where the source goes on after the piece. Goes to other processes.
    """

    block: Block
    names: Sequence[str]
    reading: Reading | None
    place: Mapping[str, Any]

    def of_split(self, held_out: bool) -> list[int]:
        """Which of its documents are of that split, by their places in the block."""
        return [place for place, name in enumerate(self.names) if is_held_out(name) == held_out]


@dataclass(frozen=True, slots=True)
class Names(Sequence):
    """Names of documents that are counted on."""

    stem: str
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> str:
        if not 0 <= place < self.count:
            raise IndexError(place)
        return f"{self.stem}/{self.first + place}"


class Source(Protocol):
    """`num_bytes` are those that its pieces' blocks add up to, None where nobody knows."""

    num_bytes: int | None

    def pieces(self, start: Mapping[str, Any] | None = None) -> Iterator[Piece]:
        """From a piece's place on; from the beginning with None."""


def fields_of(data: DataSettings) -> Fields:
    """How records are to be read."""
    return Fields(form=data.form.name, text=data.text_field, messages=data.messages_field, prompt=data.prompt_field, answer=data.answer_field,
                  system=data.system_field)  # fmt: skip


def reading_of(block: Block, fields: Fields) -> Reading | None:
    """How a file's records are read, told by its first block; None for texts and token ids. Raises ValueError naming the file."""
    if block.kind in ("texts", "tokens"):
        return None
    first = [record for _, record in records(block, range(min(block.count, RECOGNISED_BY)))]
    return recognise(first, fields, source=block.file)
