"""A document: its name and its text.

Documents are split into train and held-out by a hash of their name, so that no document is ever in both and
the split does not depend on the order in which a disk lists its files.
"""

import hashlib
from dataclasses import dataclass

HELD_OUT_SHARE = 20  # one document in so many is held out
TOP_LEVEL = "(top level)"  # source of documents that lie in no folder


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        return is_held_out(self.name)

    @property
    def source(self) -> str:
        """What the document is one of: its name without the last part, so a file, a dataset or a folder of the embedded text."""
        return source_of(self.name)


def is_held_out(name: str) -> bool:
    """Whether the document of that name is held out of training."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def source_of(name: str) -> str:
    """What a document is one of: its name without the last part."""
    return name.rpartition("/")[0] or TOP_LEVEL
