"""The embedded text: the Python standard library's sources and pydoc's topics, present wherever Python is."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from minitron.sources.document import Document

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}

@cache  # looked for several times in a run
def source_files() -> list[tuple[str, Path]]:
    """(name, path) of every standard library source file outside the test folders, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]  # keeps the walk out of installed packages
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def embedded_documents() -> Iterator[Document]:
    """Every document of the embedded text, sorted by name: source files, then topics."""
    for name, path in source_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document(name=name, text=text)
    yield from topic_documents()


def topic_documents() -> Iterator[Document]:
    """pydoc's topics, a chapter of the language reference each, sorted by name."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(name=f"topics/{name}", text=topics[name])


def text_fingerprint() -> str:
    """Changes with the Python release: names and sizes of the source files."""
    rows = [(name, path.stat().st_size) for name, path in source_files()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
