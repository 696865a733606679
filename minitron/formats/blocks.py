"""A block of a source: some documents in a row, read but mostly not parsed, small enough to go to another process.

Legend of shapes: N tokens of all the block's documents.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from minitron.formats.streams import wrong


@dataclass(frozen=True, slots=True)
class Block:
    """`count` documents of `file` from its document `first` on (from 0); picklable.

    `payload` by `kind`: "lines" a list of bytes, a JSON object each; "values" a list of parsed JSON values; "table" a pyarrow
    RecordBatch; "texts" a list of str; "tokens" (ids int32 [N], lengths int64 [count]). `place` is JSON-able and says where
    reading goes on after this block. `num_bytes` of the file (compressed ones, where it is compressed) lie between the end of
    the block before and the end of this one.
    """

    file: str
    first: int
    count: int
    kind: str
    payload: Any
    place: dict[str, Any]
    num_bytes: int


def records(block: Block, wanted: Collection[int] | None = None) -> Iterator[tuple[int, Any]]:
    """(position in the block, record) in order: a dict, a str ("texts") or ids int32 [tokens] ("tokens").

    Of `wanted` positions alone where it is given; a line that is not wanted is not parsed. Raises ValueError naming file and
    document (counted from 1) for what is no JSON, no object, or not UTF-8.
    """
    positions = range(block.count) if wanted is None else sorted(set(wanted))
    if block.kind == "table":
        return _rows(block, positions, whole=wanted is None)
    if block.kind == "tokens":
        return _ids(block, positions)
    if block.kind == "texts":
        return ((position, block.payload[position]) for position in positions)
    parsed = _parsed_line if block.kind == "lines" else _value
    return ((position, _object(block, position, parsed(block, position))) for position in positions)


def document_name(file: str, number: int) -> str:
    """How messages name a document, counted from 1."""
    return f"{file}, document {number:,}"


def _value(block: Block, position: int) -> Any:
    return block.payload[position]


def _parsed_line(block: Block, position: int) -> Any:
    line = block.payload[position]
    name = document_name(block.file, block.first + position + 1)
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise wrong(name, f"is not UTF-8 (byte 0x{line[error.start]:02x} at {error.start} of its line)") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated") or error.pos >= len(text.rstrip()):
            raise wrong(name, f"is not whole ({_excerpt(text)}): a line must hold one JSON object; is the file cut off, or, where objects "
                              "span lines, its extension not .json?") from None  # fmt: skip
        raise wrong(name, f"is no JSON ({error.msg} at character {error.pos + 1}): {_excerpt(text[max(0, error.pos - 20) :])}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise wrong(name, f"cannot be read ({type(error).__name__}: {error})") from None


def _object(block: Block, position: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(document_name(block.file, block.first + position + 1),
                    f'must be an object like {{"text": …}}, but it is {_json_type(value)}: {_excerpt(json.dumps(value))}')  # fmt: skip
    return value


def _json_type(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "…"


def _rows(block: Block, positions: Collection[int], *, whole: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    batch = block.payload
    if not whole:
        import pyarrow

        batch = batch.take(pyarrow.array(list(positions), type=pyarrow.int64()))
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except (UnicodeDecodeError, ValueError, OverflowError) as error:  # bytes that are no text; a date that Python does not know
        name, reason = _unreadable(block, batch, list(positions))
        raise wrong(name, reason or f"cannot be read ({type(error).__name__}: {error})") from None
    names = batch.schema.names
    rows = zip(*columns, strict=True) if columns else (() for _ in positions)
    return ((position, dict(zip(names, row, strict=True))) for position, row in zip(positions, rows, strict=True))


def _unreadable(block: Block, batch: Any, positions: list[int]) -> tuple[str, str]:
    """The first document that Python has no values for, and what is wrong with it."""
    for row, position in enumerate(positions):
        for field, column in zip(batch.schema.names, batch.columns, strict=True):
            name = document_name(block.file, block.first + position + 1)
            try:
                column[row].as_py()
            except UnicodeDecodeError as error:
                return name, f"is not UTF-8 in {field!r} (byte 0x{error.object[error.start]:02x} at {error.start})"
            except (ValueError, OverflowError) as error:
                return name, f"cannot be read in {field!r} ({type(error).__name__}: {error})"
    return block.file, ""


def _ids(block: Block, positions: Collection[int]) -> Iterator[tuple[int, Any]]:
    ids_N, lengths = block.payload
    ends = list(accumulate(int(length) for length in lengths))
    return ((position, ids_N[ends[position] - int(lengths[position]) : ends[position]]) for position in positions)
