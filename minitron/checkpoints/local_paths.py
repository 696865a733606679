"""Paths of this machine, kept out of what is handed over: a Hub id or an address stays, a path goes by its last part."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
ROOTED = re.compile(r"(file:)?/|~|\.{1,2}/|[A-Za-z]:[\\/]")
TOKEN = re.compile(r"'[^']*'|\"[^\"]*\"|[^\[\]{},'\"\s]+")  # of a list or an object as people type them
MOST_BYTES = 4096  # a longer text is no path


def is_local(text: str) -> bool:
    """Whether a text is a path of this machine: by how it begins, by glob characters in it, or since something is there."""
    if not text or len(text) > MOST_BYTES or "\n" in text or (ADDRESS.match(text) and not text.startswith("file:")):
        return False
    if ROOTED.match(text):
        return len(text.strip("/~.")) > 0
    return "/" in text and (Path(text).exists() or (not re.search(r"\s", text) and ("*" in text or text.count("/") > 1)))


def public(value: Any) -> Any:
    """A value of the settings, in depth: paths of this machine by their last part."""
    if isinstance(value, str):
        return last_part(value) if is_local(value) else value
    if isinstance(value, Mapping):
        return {public(key): public(item) for key, item in value.items()}
    return [public(item) for item in value] if isinstance(value, (list, tuple)) else value


def last_part(path: str) -> str:
    """The name that a path ends with."""
    return re.split(r"[\\/]", path.rstrip("/\\"))[-1]


def public_argument(argument: str) -> str:
    """A setting as it is typed, `key=value`, where the value may be a list or an object of paths."""
    key, equals, value = argument.partition("=")
    if is_local(value) and value[0] not in "[{'\"":
        return f"{key}{equals}{last_part(value)}"

    def token(match: re.Match) -> str:
        text = match[0]
        quote = text[0] if text[0] in "'\"" else ""
        inner = text[1:-1] if quote else text
        return f"{quote}{public(inner)}{quote}"

    return f"{key}{equals}{TOKEN.sub(token, value)}"


def without_paths(text: str, paths: Iterable[str]) -> str:
    """A text in which each of these paths, and what lies below it, is its last part wherever it stands; the longest first."""
    for path in sorted({path.rstrip("/") for path in paths if is_local(path)}, key=len, reverse=True):
        text = re.sub(rf"(?<![\w:/.]){re.escape(path)}(?![\w.-])(/[^\s'\"`|,;)\]}}]*)?", lambda match: last_part(match[0]), text)
    return text
