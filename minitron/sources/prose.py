"""The embedded text as prose (data.embedded=prose): what the Python standard library says of itself in English, and pydoc's topics.

A document is a module: its docstring and those of its classes and functions, in the order of the source. Names, and so the split, are those of the
embedded text as code: a module that is held out in one is held out in the other.
"""

import ast
import warnings
from collections.abc import Iterator

from minitron.sources.document import Document
from minitron.sources.embedded import source_files, topic_documents

PROSE_VERSION = 1  # rises when other text is made of the same sources
LEAST_CHARACTERS = 500  # of a module; what has less is a line or two that says little
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def prose_documents() -> Iterator[Document]:
    """Every document of the prose, sorted by name: modules, then topics."""
    for name, path in source_files():
        text = docstrings(path.read_bytes())
        if len(text) >= LEAST_CHARACTERS:
            yield Document(name=name, text=text)
    yield from topic_documents()


def docstrings(source: bytes) -> str:
    """The docstrings of a module in the order of the source, without their indentation, an empty line between two; "" for what is no Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in others' strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # of another encoding than it says, or with null bytes
            return ""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        found += [text] if text and text.strip() else []
        waiting += reversed([child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)])
    return "\n\n".join(found)
