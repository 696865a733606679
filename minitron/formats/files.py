"""Local files as a source: which ones the settings name, and any of them read in blocks, in order, from any place on."""

import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minitron.formats.blocks import Block
from minitron.formats.folders import DESCRIPTIONS, SPLITS, files_below, is_saved_dataset, saved_files
from minitron.formats.json_values import json_values
from minitron.formats.kinds import ARROW, JSON, JSON_LINES, KNOWN, KNOWN_SAID, PARQUET, SEPARATED, TEXT, TOKENS, TOKENS_INDEX, extension
from minitron.formats.lines import json_lines, separated_values
from minitron.formats.plain_text import texts
from minitron.formats.streams import Given, check_beginning, named_errors, wrong
from minitron.formats.tables import arrow_rows, parquet_rows
from minitron.formats.token_corpora import TYPE_BYTES, check_pair, index_head, token_documents

READERS = {
    **dict.fromkeys(JSON_LINES, json_lines),
    JSON: json_values,
    **dict.fromkeys(SEPARATED, separated_values),
    **dict.fromkeys(TEXT, texts),
    PARQUET: parquet_rows,
    **dict.fromkeys(ARROW, arrow_rows),
    TOKENS: token_documents,
}
BLOCK_BYTES = 2**21
UNPACKED = {".gz": 3.0, ".zst": 3.3, PARQUET: 3.0}  # times that text is larger than the file that holds it, on prose and JSON lines
TOKEN_TEXT_BYTES = 4  # that a ready-made token stands for
CUT_FROM, CUT_KIB = 4 * 2**20, 64  # more bytes of plain text than so many are cut into documents of so many KiB
ONLY_CUT_FROM, ONLY_DOCUMENTS, ONLY_LEAST_KIB = 2**16, 128, 4  # and the only file of a source from fewer bytes on, so that some can be held out


def matching_files(patterns: list[str]) -> list[Path]:
    """The files of `data.files`, each once: in the order given, those of one glob or folder sorted by path.

    A folder that the datasets library saved is one of them, of another folder all known files below it; a pair of .bin and
    .idx is its .bin, also where the name without both is given. Raises ValueError for what is missing, a glob without a
    match, an unknown extension, a folder without a known file, a .bin or .idx without the other.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        for match in _matches(pattern):
            kind = None if match.is_dir() else extension(match)
            if kind is not None and kind not in KNOWN:
                raise ValueError(f"data.files names {str(match)!r}; the extension must be one of {KNOWN_SAID}")
            if kind in (TOKENS, TOKENS_INDEX):
                match = match.with_suffix(TOKENS)
                check_pair(match)
            found.setdefault(match.resolve(), match)
    return list(found.values())


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        return [path] if is_saved_dataset(path) else files_below(path, pattern)
    if path.exists():
        return [path]
    names = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    matches = [name for name in names if name.is_file() or is_saved_dataset(name)]
    inside = {name for name in matches if name.is_dir()}  # whose own files a ** matches too
    matches = [name for name in matches if inside.isdisjoint(name.parents) and name.name not in DESCRIPTIONS]
    pair = [Path(pattern + suffix) for suffix in (TOKENS, TOKENS_INDEX)]
    if not matches and any(name.is_file() for name in pair):
        return pair[:1]
    if not matches:
        splits = next((name for name in names if (name / SPLITS).is_file()), None)
        if splits is not None:
            return files_below(splits, str(splits))  # which refuses it, by the names of its splits
        reason = "matches no file" if glob.has_magic(pattern) else "does not exist"
        raise ValueError(f"data.files names {pattern!r}, which {reason}")
    return matches


def blocks_of(
    path: Path,
    start: dict[str, Any] | None = None,
    *,
    columns: Callable[[list[str]], list[str]] | None = None,
    cut_kib: int | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Block]:
    """The documents of one of `matching_files`, in order, in blocks of about `block_bytes`; from a block's `place` on where `start` is given,
    which belongs to the same file, `cut_kib`, `columns` and `block_bytes`.

    `columns` is asked with the fields of a columnar file (Parquet, Arrow, a saved dataset, .csv) and says which are wanted;
    others are not read. Where there is a column `input_ids` and it wants no other, the documents are ready-made tokens.
    Plain text is cut into documents of about `cut_kib` KiB; 0: it stays whole; None: as `cut_of` says of a file among others.
    Raises ValueError beginning `data.files: NAME` for what cannot be read, is cut off, empty, or not UTF-8, as soon as it is met.
    """
    path = Path(path)
    name = path.name or path.resolve().name
    cut = cut_of(path, only=False) if cut_kib is None else cut_kib
    given = Given(path, name, block_bytes, columns, cut)
    with named_errors(name):
        if path.is_file():
            check_beginning(path, name)
        reader = arrow_rows if path.is_dir() else READERS[extension(path)]
        empty = True
        for block in reader(given, start):
            empty = False
            yield block
        if empty and start is None:
            raise wrong(name, "is empty: it holds no document")


def files_behind(path: Path) -> list[Path]:
    """The files whose contents one of `matching_files` is: the Arrow files of a saved dataset, a .bin and its .idx, else itself."""
    if path.is_dir():
        return saved_files(path, path.name)
    return [path, path.with_suffix(TOKENS_INDEX)] if extension(path) == TOKENS else [path]


def text_bytes(path: Path) -> tuple[int, int]:
    """(bytes on disk, about how many bytes of text they hold) of one of `matching_files`, from its size; packing is taken as a factor."""
    if path.is_dir():
        return (size := sum(file.stat().st_size for file in saved_files(path, path.name))), size
    kind = extension(path)
    if kind == TOKENS:
        head = index_head(path)
        size = path.stat().st_size
        return size, size // TYPE_BYTES[head.type] * TOKEN_TEXT_BYTES
    size = path.stat().st_size
    return size, int(size * UNPACKED.get(path.suffix.lower(), 1))


def cut_of(path: Path, only: bool) -> int:
    """KiB of the documents that plain text is cut into by itself, 0 where it stays whole; `only`: it is all that the source has.

    Follows from kind and size alone (of a packed file, from the size that its text may have).
    """
    if path.is_dir() or extension(path) not in TEXT:
        return 0
    num_bytes = text_bytes(path)[1]
    if num_bytes > CUT_FROM:
        return CUT_KIB
    if not only or num_bytes <= ONLY_CUT_FROM:
        return 0
    return min(max(num_bytes // (ONLY_DOCUMENTS * 2**10), ONLY_LEAST_KIB), CUT_KIB)
