"""A dataset of the Hub, streamed, and kept on disk as far as it was read: text is read twice, held-out documents first, and a stream comes once."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from minitron.formats.blocks import Block
from minitron.formats.files import blocks_of
from minitron.settings.data import DataSettings
from minitron.settings.hub import said_while_waiting
from minitron.sources.pieces import Names, Piece, fields_of, reading_of

KEPT_FILE = "hub.jsonl"
RECORDS_AT_ONCE = 256


class HubSource:
    """`scratch` gets hub.jsonl, a record a line; whoever is done with the source deletes it."""

    num_bytes = None

    def __init__(self, data: DataSettings, scratch: Path, title: str):
        self.data, self.path, self.title, self.fields = data, scratch / KEPT_FILE, title, fields_of(data)
        self.complete = self.path.with_suffix(".complete")  # there once the Hub has no more than what is kept
        self._reading = None

    def pieces(self, start: Mapping[str, Any] | None = None) -> Iterator[Piece]:
        number, most = start["documents"] if start else 0, self.data.max_documents
        for block in self._blocks(start["inside"] if start else None):
            self._reading = self._reading or reading_of(block, self.fields)
            count = block.count if most is None else min(block.count, most - number)
            if count <= 0:
                return
            names, number = Names(self.data.dataset, number, count), number + count
            yield Piece(block, names, self._reading, {"documents": number, "inside": block.place})

    def _blocks(self, inside: Mapping[str, Any] | None) -> Iterator[Block]:
        """What is kept, then what the Hub has beyond it."""
        number = 0
        self._cut_short()
        if self.path.exists() and self.path.stat().st_size > 0:
            if inside is not None and self._reading is None:
                self._reading = reading_of(next(blocks_of(self.path)), self.fields)
            for block in blocks_of(self.path, inside):
                yield replace(block, file=self.data.dataset)
            with self.path.open("rb") as file:
                number = sum(1 for _ in file)
        if not self.complete.exists():
            yield from self._streamed(number)

    def _cut_short(self) -> None:
        """Take off the line that an interrupted run left half written."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            whole = max((file.tell() for line in iter(file.readline, b"") if line.endswith(b"\n")), default=0)
            file.truncate(whole)

    def _streamed(self, number: int) -> Iterator[Block]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _named_errors(f"data.dataset: {self.title}"):
            with said_while_waiting(self.title):
                records = iter(_dataset(self.data).skip(number))
                some = list(islice(records, RECORDS_AT_ONCE))
            while some:
                lines = [json.dumps(record, default=str).encode() + b"\n" for record in some]
                with self.path.open("ab") as file:
                    file.writelines(lines)
                    end = file.tell()
                yield Block(file=self.data.dataset, first=number, count=len(lines), kind="lines", payload=lines, num_bytes=sum(map(len, lines)),
                            place={"document": number + len(lines), "byte": end})  # fmt: skip
                number += len(lines)
                some = list(islice(records, RECORDS_AT_ONCE))
        self.complete.touch()


def _dataset(data: DataSettings) -> Any:
    """`datasets.load_dataset` in streaming mode, without bars, and without its log lines: its errors say the same."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return datasets.load_dataset(data.dataset, name=data.dataset_config, revision=data.dataset_revision, split=data.dataset_split, streaming=True)


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """Turns what the library or the network can do wrong into a ValueError that begins with `what`."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{what} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from None
