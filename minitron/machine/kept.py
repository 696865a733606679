"""What is found out about this machine and its files once, and kept in the user's cache folder. Whatever cannot be read or written is found out again."""

import json
import os
from pathlib import Path
from typing import Any


def read_kept(file: str) -> dict[str, Any]:
    """What is kept under that file's name; nothing where there is none that can be read."""
    path = _path_of(file)
    try:
        kept = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def write_kept(file: str, kept: dict[str, Any]) -> None:
    """Keep that, in one piece."""
    path = _path_of(file)
    if path is None:
        return
    partial = path.with_name(f"{path.name}.partial")  # one name: whoever is killed here leaves one file, and two at once spoil what is found out again
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(kept, indent=2) + "\n")
        partial.replace(path)
    except OSError:
        return


def _path_of(file: str) -> Path | None:
    """None where there is no home to keep anything in."""
    try:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(folder) / "minitron" / file
