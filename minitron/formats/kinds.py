"""Which kinds of files there are, by their names alone."""

from pathlib import Path

from minitron.formats.streams import PACKED

JSON_LINES = (".jsonl", ".ndjson")
JSON = ".json"
SEPARATED = (".csv", ".tsv")
TEXT = (".txt", ".raw", ".md", ".text")
READ_AS_TEXT = (*JSON_LINES, JSON, *SEPARATED, *TEXT)  # may have .gz or .zst behind
PARQUET = ".parquet"
ARROW = (".arrow", ".feather")
TOKENS, TOKENS_INDEX = ".bin", ".idx"
KNOWN = {*READ_AS_TEXT, PARQUET, *ARROW, TOKENS, TOKENS_INDEX}
KNOWN_SAID = f"{', '.join(READ_AS_TEXT)} (each also with {' or '.join(PACKED)} behind), {PARQUET}, {', '.join(ARROW)}, or {TOKENS} with {TOKENS_INDEX}"


def extension(path: Path) -> str:
    """What says how a file is read, small letters: .jsonl of `a.JSONL.gz`, .gz of what is not read out of a packed file; "" of none."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix in PACKED and inner in READ_AS_TEXT else suffix


def stem_of(path: Path) -> str:
    """A file's name without what says how it is read: `corpus` of corpus.jsonl.gz; of a folder its name."""
    if path.is_dir():
        return path.name
    return Path(path.stem).stem if path.suffix.lower() in PACKED else path.stem
