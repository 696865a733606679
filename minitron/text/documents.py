"""Where the text comes from: the embedded text, generated problems, local files, or a dataset on the Hub, as named documents.

A document's name is its file's name without folder and extension (of a Hub dataset, its id) and its position among the
documents of that name. The split into train and held-out goes by the name (`minitron.text.embedded.Document`), so the
same files split alike wherever they lie. Documents come in the order of the source: nothing is shuffled, there is no seed.
"""

import glob
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from minitron.settings.hub import HUB_ID, said_while_waiting
from minitron.settings.rules import key_settings
from minitron.settings.run import DataSettings, Embedded
from minitron.text.arithmetic import ARITHMETIC_VERSION, problem_documents
from minitron.text.embedded import Document, embedded_documents, text_fingerprint
from minitron.text.prose import PROSE_VERSION, prose_documents
from minitron.text.traces import truncate_reasoning

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": None}  # of the datasets library; a .txt is read whole


def read_documents(data: DataSettings, write_chat: Callable[[list[dict]], str] | None = None) -> Iterator[Document]:
    """The first `data.max_documents` documents of the source the settings name; a text may be empty.

    `write_chat` writes a conversation of `data.messages_field` out as text. Raises ValueError for a source that cannot be
    read and for documents without the text field.
    """
    if data.files:
        documents = _file_documents(matching_files(data.files), partial(_text_of, data, write_chat))
    elif data.dataset:
        documents = _dataset_documents(data, partial(_text_of, data, write_chat))
    elif data.arithmetic.problems:
        documents = problem_documents(data.arithmetic)
    else:
        documents = prose_documents() if data.embedded is Embedded.prose else embedded_documents()
    documents = islice(documents, data.max_documents)
    return (truncate_reasoning(document, data.truncated_share) for document in documents) if data.truncated_share else documents


def source_title(data: DataSettings) -> str:
    """What a headline and a model card call the source, e.g. `corpus.jsonl and 2 other files`."""
    if data.files:
        first, *others = matching_files(data.files)
        return first.name + (f" and {len(others)} other file{'s' if others[1:] else ''}" if others else "")
    if data.dataset:
        return " ".join(filter(None, (data.dataset, data.dataset_config, data.dataset_split, f"at {data.dataset_revision or 'its newest revision'}")))
    if data.arithmetic.problems:
        return "generated problems"
    return f"the Python standard library's {'docstrings and topics' if data.embedded is Embedded.prose else 'sources'}"


def source_identity(data: DataSettings) -> dict[str, Any]:
    """What a key says of the source: the files' names and contents, not where they lie; a dataset's name and revision."""
    if data.files:
        return {"files": [[path.name, content_digest(path)] for path in matching_files(data.files)], "text_field": data.text_field}
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


def matching_files(patterns: list[str]) -> list[Path]:
    """The files of `data.files`, each once: in the order given, those of one glob sorted by path.

    Raises ValueError for a file that is missing or a folder, a glob without a match, an unknown extension.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        matches = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
        if not matches:
            reason = "matches no file" if glob.has_magic(pattern) else "does not exist"
            raise ValueError(f"data.files names {pattern!r}, which {reason}")
        if path.is_dir():
            raise ValueError(f"data.files names {pattern!r}, a folder; it must name files, e.g. {os.path.join(pattern, '*.jsonl')!r}")
        for match in matches:
            if match.suffix.lower() not in LOADERS:
                raise ValueError(f"data.files names {str(match)!r}; the extension must be one of {', '.join(LOADERS)}")
            found.setdefault(match.resolve(), match)
    return list(found.values())


def content_digest(path: Path) -> str:
    """SHA-256 of a file's contents, 64 hex digits; read once as long as size and time of change stay."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_documents(paths: list[Path], text_of: Callable[[dict[str, Any], str, int], str]) -> Iterator[Document]:
    """Every document of the files; files of one name (a/README.txt, b/README.txt) count on."""
    positions: Counter[str] = Counter()
    for path in paths:
        is_table = LOADERS[path.suffix.lower()] is not None
        texts = (text_of(record, path.name, number) for number, record in enumerate(_records(path), 1)) if is_table else [_whole_text(path)]
        for text in texts:
            yield Document(name=f"{path.stem}/{positions[path.stem]}", text=text)
            positions[path.stem] += 1


def _whole_text(path: Path) -> str:
    with _named_errors(f"data.files: {path.name}"):
        return path.read_text(encoding="utf-8")


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON or Parquet file, streamed through the datasets library."""
    if path.stat().st_size == 0:  # the library has no answer to it
        return
    with _named_errors(f"data.files: {path.name}"):
        escaped = glob.escape(str(path))  # the library would take brackets in a name for a pattern
        yield from _streamed(LOADERS[path.suffix.lower()], data_files=escaped, split="train")


def _dataset_documents(data: DataSettings, text_of: Callable[[dict[str, Any], str, int], str]) -> Iterator[Document]:
    for position, record in enumerate(_dataset_records(data)):
        yield Document(name=f"{data.dataset}/{position}", text=text_of(record, data.dataset, position + 1))


def _dataset_records(data: DataSettings) -> Iterator[dict[str, Any]]:
    with _named_errors(f"data.dataset: {source_title(data)}"):
        with said_while_waiting(source_title(data)):
            records = _streamed(data.dataset, name=data.dataset_config, revision=data.dataset_revision, split=data.dataset_split)
        yield from records


def _streamed(path: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """`datasets.load_dataset` in streaming mode, without bars, and without its log lines: its errors say the same."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return iter(datasets.load_dataset(path, streaming=True, **arguments))


def _text_of(data: DataSettings, write_chat: Callable[[list[dict]], str] | None, record: dict[str, Any], source: str, number: int) -> str:
    """The text of a source's row, counted from 1, its conversation written out where `data.messages_field` is given; a null is an empty text."""
    name = "messages_field" if data.messages_field else "text_field"
    wanted = getattr(data, name)
    if wanted not in record:
        raise ValueError(f"data.{name} is {wanted!r}; {source} has no such field, it must be one of {', '.join(map(repr, record))}")
    value = record[wanted]
    if not data.messages_field:
        if not isinstance(value, str | None):
            raise ValueError(f"data.text_field is {wanted!r}; it must hold text, but in {source} it holds {type(value).__name__}: {str(value)[:40]}")
        return value or ""
    if not isinstance(value, list | None):
        raise ValueError(f"data.messages_field is {wanted!r}; it must hold a list of {{role, content}}, but in document {number} of {source} it holds "
                         f"{str(value)[:60]}")  # fmt: skip
    assert write_chat is not None, "whoever reads conversations has a chat template"
    try:
        return write_chat(value or [])
    except ValueError as error:
        raise ValueError(f"data.messages_field is {wanted!r}; document {number} of {source} cannot be written out: {error}") from None


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """Turns what a file, the libraries or the network can do wrong into a ValueError that begins with `what`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from None
