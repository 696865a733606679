"""Which source the settings name, what it is called, what a key says of it: files, a dataset of the Hub, generated problems, or the embedded text."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from minitron.formats.blocks import Block
from minitron.formats.files import blocks_of, cut_of, files_behind, matching_files, text_bytes
from minitron.formats.kinds import TEXT, extension, stem_of
from minitron.settings.data import DataSettings, Embedded
from minitron.settings.hub import HUB_ID
from minitron.settings.rules import key_settings
from minitron.sources.arithmetic import ARITHMETIC_VERSION, problem_documents
from minitron.sources.digests import content_digest
from minitron.sources.document import Document
from minitron.sources.embedded import embedded_documents, text_fingerprint
from minitron.sources.forms import Reading
from minitron.sources.hub import HubSource
from minitron.sources.pieces import Names, Piece, Source, fields_of, reading_of
from minitron.sources.prose import PROSE_VERSION, prose_documents

EMBEDDED_AT_ONCE = 64  # documents of a piece
TOKEN_IDS = "input_ids"


def open_source(data: DataSettings, scratch: Path) -> Source:
    """The source that the settings name; `scratch` is a folder in which a dataset of the Hub is kept as far as it was read. Raises ValueError."""
    if data.files:
        return FileSource(data)
    if data.dataset:
        return HubSource(data, scratch, source_title(data))
    if data.arithmetic.problems:
        documents = problem_documents(data.arithmetic)
    else:
        documents = prose_documents() if data.embedded is Embedded.prose else embedded_documents()
    return DocumentSource(list(islice(documents, data.max_documents)), source_title(data))


class DocumentSource:
    """Documents that are there already."""

    def __init__(self, documents: list[Document], title: str):
        self.documents, self.title = documents, title
        self.num_bytes = sum(len(document.text) for document in documents)

    def pieces(self, start: Mapping[str, Any] | None = None) -> Iterator[Piece]:
        for first in range(start["document"] if start else 0, len(self.documents), EMBEDDED_AT_ONCE):
            some = self.documents[first : first + EMBEDDED_AT_ONCE]
            texts, place = [document.text for document in some], {"document": first + len(some)}
            block = Block(file=self.title, first=first, count=len(some), kind="texts", payload=texts, place=place, num_bytes=sum(map(len, texts)))
            yield Piece(block, tuple(document.name for document in some), None, place)


class FileSource:
    """Local files, those of one name counted on (a/README.txt, b/README.txt)."""

    def __init__(self, data: DataSettings):
        self.data, self.paths, self.fields = data, matching_files(data.files), fields_of(data)
        self.num_bytes = sum(text_bytes(path)[0] for path in self.paths) if data.max_documents is None else None

    def pieces(self, start: Mapping[str, Any] | None = None) -> Iterator[Piece]:
        start = start or {"file": 0, "inside": None, "documents": 0, "stems": {}}
        inside, num_documents, positions = start["inside"], start["documents"], Counter(start["stems"])
        to_come = Counter(stem_of(path) for path in self.paths[start["file"] :])
        for number, path in enumerate(self.paths[start["file"] :], start["file"]):
            stem = stem_of(path)
            for block, reading in self._blocks(path, inside):
                count = min(block.count, self._most - num_documents)
                names = Names(stem, positions[stem], count)
                num_documents, positions[stem] = num_documents + count, positions[stem] + count
                again = {name: position for name, position in positions.items() if to_come[name]}
                yield Piece(block, names, reading, {"file": number, "inside": block.place, "documents": num_documents, "stems": again})
                if num_documents >= self._most:
                    return
            inside, to_come[stem] = None, to_come[stem] - 1
            if to_come[stem] == 0:  # none of that name will come again
                positions.pop(stem, None)

    @property
    def _most(self) -> float:
        return float("inf") if self.data.max_documents is None else self.data.max_documents

    def _blocks(self, path: Path, inside: Mapping[str, Any] | None) -> Iterator[tuple[Block, Reading | None]]:
        cut = cut_of(path, len(self.paths) == 1) if self.data.cut_kib is None else self.data.cut_kib
        is_text = path.is_file() and extension(path) in TEXT
        first = None if is_text else next(blocks_of(path, columns=self._looked_at, cut_kib=cut, block_bytes=2**16), None)
        reading = None if first is None else reading_of(first, self.fields)
        columns = self._looked_at if reading is None else lambda names: [name for name in names if name in reading.columns]
        for block in blocks_of(path, inside, columns=columns, cut_kib=cut):
            yield block, reading

    def _looked_at(self, names: list[str]) -> list[str]:
        """Of a table's columns before it is known what they are: none where token ids are there and no text or conversation that is asked for."""
        asked = [name for name in (self.fields.text, self.fields.messages, self.fields.prompt, self.fields.answer) if name is not None]
        return [] if TOKEN_IDS in names and self.fields.form == "auto" and not set(asked) & set(names) else names


def source_title(data: DataSettings) -> str:
    """What a headline and a model card call the source, e.g. `corpus.jsonl and 2 other files`."""
    if data.files:
        first, *others = matching_files(data.files)
        return first.name + (f" and {len(others):,} other file{'s' if others[1:] else ''}" if others else "")
    if data.dataset:
        return " ".join(filter(None, (data.dataset, data.dataset_config, data.dataset_split, f"at {data.dataset_revision or 'its newest revision'}")))
    if data.arithmetic.problems:
        return "generated problems"
    return f"the Python standard library's {'docstrings and topics' if data.embedded is Embedded.prose else 'sources'}"


def source_identity(data: DataSettings) -> dict[str, Any]:
    """What a key says of the source: the files' names and contents, not where they lie; a dataset's name and revision."""
    if data.files:
        digests = [[path.name, content_digest(path)] for given in matching_files(data.files) for path in files_behind(given)]
        return {"files": digests, "text_field": data.text_field}
    if data.dataset:
        names = ("dataset", "dataset_config", "dataset_revision", "dataset_split", "text_field")
        return {name: getattr(data, name) for name in names}
    if data.arithmetic.problems:
        return {"arithmetic": [ARITHMETIC_VERSION, key_settings(data.arithmetic)]}
    return {"text": text_fingerprint(), **({"prose": PROSE_VERSION} if data.embedded is Embedded.prose else {})}


def check_source(data: DataSettings) -> None:
    """Refuse, without reading any, files that are not there or of unknown kind, and what is no Hub id. Raises ValueError."""
    if data.files:
        matching_files(data.files)
    if data.dataset and not HUB_ID.match(data.dataset):
        raise ValueError(f"data.dataset is {data.dataset!r}; it must be a Hub id of the form owner/name (data.files takes local files)")
    if data.dataset and Path(data.dataset).exists():  # the datasets library would read this instead, and no key would tell
        raise ValueError(f"data.dataset is {data.dataset!r}, and there is such a folder here; it must be a Hub id, local files go in data.files")
