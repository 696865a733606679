"""JSON from elsewhere: read where it is small enough to be what it is taken for, and refused in one line where it is none."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

LARGEST_CONFIG = 2**24  # bytes; of a config.json with a line for every tensor it is 2 MB
LARGEST_INDEX = 10**8  # bytes, as of the headers that it is made of
BYTES_PER_BRACKET = 8  # at least, on average, in anything but a text made to fill memory: every list takes 64 bytes there
LONGEST_NAME = 255  # bytes, of a file


def parse_json(content: bytes) -> Any:
    """The value. Raises ValueError for what is no JSON, no UTF-8, nested too deeply, or consists of nothing but brackets."""
    if BYTES_PER_BRACKET * (content.count(b"[") + content.count(b"{")) > len(content) + 2**20:
        raise ValueError("it consists of little but brackets")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte 0x{content[error.start]:02x} at {error.start:,})") from None


def read_json(path: Path, most_bytes: int = LARGEST_CONFIG) -> Any:
    """The value that a file holds. Raises ValueError as parse_json does and for a file of more bytes, OSError."""
    with open(path, "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")
    return parse_json(content)


def is_inside(name: Any) -> bool:
    """Whether a name that a file gives another one stays in its folder: by the name alone, since in the Hub's cache every file is a link to elsewhere."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and max(len(part.encode()) for part in path.parts) <= LONGEST_NAME
