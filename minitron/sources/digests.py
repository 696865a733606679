"""What files hold, as a digest: keys say that instead of where files lie."""

import hashlib
from functools import lru_cache
from pathlib import Path

from minitron.machine.kept import read_kept, write_kept

LARGE_BYTES = 2**26  # files from which on a digest is kept from one command to the next
KEPT_FILE, MOST_KEPT = "digests.json", 4096


def content_digest(path: Path) -> str:
    """SHA-256 of a file's contents, 64 hex digits; read once as long as name, size and time of change stay, a large file's also by later commands."""
    status = path.stat()
    return _digest(path.absolute(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, changed: int) -> str:
    name, now = str(path), [size, changed]
    if size >= LARGE_BYTES:
        kept = read_kept(KEPT_FILE).get(name)
        if isinstance(kept, list) and kept[:2] == now and len(kept) == 3:
            return kept[2]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if size >= LARGE_BYTES:
        others = {other: value for other, value in read_kept(KEPT_FILE).items() if other != name}
        write_kept(KEPT_FILE, dict([*list(others.items())[1 - MOST_KEPT :], (name, [*now, found])]))
    return found
