"""What lies in a model folder by the names of its files, and what tells one folder's contents from another's. Loads no torch.

A fingerprint is taken at every run: it costs a look at each file. A content digest reads every byte; the stages that are handed a
folder take it, once for a fingerprint, and what they record of it is what the keys of later stages hold.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

from minitron.checkpoints.weight_files import INDEX_FILE, weight_files

# Carried over byte for byte from the teacher's folder, where present.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
PIECE_BYTES, MOST_THREADS = 2**24, 8


def files_that_count(folder: Path) -> list[Path]:
    """The files of a model folder that results follow from: config.json, tokenizer and templates, the weights that would be read, and an index."""
    found = {folder / name for name in ("config.json", *COMPANION_FILES, INDEX_FILE)}
    with suppress(ValueError):  # there are none; who reads the weights refuses that
        found |= set(weight_files(folder).files)
    return sorted(path for path in found if path.is_file())


def fingerprint(folder: Path) -> str:
    """12 hex digits over every file's name, size and times, and the headers of the weights: whatever is written changes it, and so does a touch."""
    digest = hashlib.sha256()
    for path in files_that_count(folder):
        status = path.stat()
        digest.update(json.dumps([path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns]).encode())
        if path.suffix == ".safetensors":
            digest.update(_header(path))
    return digest.hexdigest()[:12]


def _header(path: Path) -> bytes:
    with open(path, "rb") as file:
        length = file.read(8)
        return file.read(min(struct.unpack("<Q", length)[0], PIECE_BYTES)) if len(length) == 8 else b""


def content_digest(folder: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """12 hex digits over the SHA-256 of every file that counts, with its name: the same for the same contents, wherever they lie.

    `on_bytes` hears what was read, from several threads: shards are read at once.
    """
    files, stop = files_that_count(folder), Event()
    pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
    try:
        digests = {path.name: digest for path, digest in zip(files, pool.map(lambda path: _sha256(path, on_bytes, stop), files), strict=True)}
    finally:  # an interrupt does not wait for the rest of the files
        stop.set()
        pool.shutdown(cancel_futures=True)
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]


def content_bytes(folder: Path) -> int:
    """What a content digest reads."""
    return sum(path.stat().st_size for path in files_that_count(folder))


def _sha256(path: Path, on_bytes: Callable[[int], None], stop: Event) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while not stop.is_set() and (piece := file.read(PIECE_BYTES)):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()
