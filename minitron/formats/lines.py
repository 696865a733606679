"""Files of lines: JSON lines, which are not parsed here, and comma- or tab-separated tables."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from minitron.formats.blocks import Block, document_name
from minitron.formats.streams import Given, Stream, not_text, wrong

LONGEST_LINE = 2**28  # bytes
LONGEST_CELL = 2**31 - 1  # of a table; the csv module's own is 131,072 characters


def json_lines(given: Given, start: dict[str, Any] | None) -> Iterator[Block]:
    """Blocks of kind "lines"; blank lines are left out and not counted."""
    place = start or {"document": 0, "byte": 0}
    with Stream(given.path, given.name, place["byte"]) as stream:
        document, before, position = place["document"], stream.disk(place["byte"]), stream.position
        for data in whole_lines(stream, given.name, given.block_bytes):
            position += len(data)
            lines = [line for line in data.split(b"\n") if line and not line.isspace()]
            if lines:
                after = stream.disk(position)
                end = {"document": document + len(lines), "byte": position}
                yield Block(given.name, document, len(lines), "lines", lines, end, after - before)
                document, before = end["document"], after


def whole_lines(stream: Stream, name: str, block_bytes: int) -> Iterator[bytes]:
    """What is left of the stream, cut after the last line end within every `block_bytes`, or after the first one behind them. Raises ValueError for a line that
    is longer than LONGEST_LINE: a packed file of a few kilobytes may hold one of terabytes."""
    rest = b""
    while not stream.ended:
        parts, wish = [rest], block_bytes - len(rest)
        while True:
            parts.append(stream.read(wish))
            cut = parts[-1].rfind(b"\n") + 1
            if cut or stream.ended:
                break
            if sum(map(len, parts)) > LONGEST_LINE:
                raise wrong(name, f"has a line of more than {LONGEST_LINE:,} bytes, from byte {stream.position - sum(map(len, parts)):,} on")
            wish = block_bytes
        last = parts.pop()
        if stream.ended:
            cut = len(last)
        rest = last[cut:]
        if data := b"".join([*parts, last[:cut]]):
            yield data


def separated_values(given: Given, start: dict[str, Any] | None) -> Iterator[Block]:
    """Blocks of kind "values": a row as {column of the header line: its cell's text}; cells missing at a row's end are None."""
    with Stream(given.path, given.name) as stream:
        table = _Table(given, stream, 0)
        header = table.header()
    wanted = set(given.columns(header) if given.columns else header)
    kept = [(index, column) for index, column in enumerate(header) if column in wanted]
    place = start or {"document": 0, "byte": table.position}
    with Stream(given.path, given.name, place["byte"]) as stream:
        table, before = _Table(given, stream, place["document"]), stream.disk(place["byte"]) if start else 0
        while rows := list(table.rows(len(header))):
            values = [{column: row[index] if index < len(row) else None for index, column in kept} for row in rows]
            after, first = stream.disk(table.position), table.document - len(rows)
            yield Block(given.name, first, len(rows), "values", values, {"document": table.document, "byte": table.position}, after - before)
            before = after


class _Table:
    """The rows of a table from where a stream stands; `position` in the stream is behind the last row taken, `document` counts the rows."""

    def __init__(self, given: Given, stream: Stream, document: int) -> None:
        csv.field_size_limit(LONGEST_CELL)
        self.position, self.document = stream.position, document
        self._given, self._stream, self._last_line = given, stream, b""
        self._reader = csv.reader(self._lines(), delimiter="\t" if ".tsv" in given.path.suffixes[-2:] else ",", strict=True)

    def header(self) -> list[str]:
        header = next(filter(None, self._reader), [])
        for column in header:
            if header.count(column) > 1:
                raise wrong(self._given.name, f"names the column {column!r} twice in its header line")
        return header

    def rows(self, num_columns: int) -> Iterator[list[str]]:
        """Rows up to the end of the block; empty lines are left out and not counted."""
        end = self.position + self._given.block_bytes
        while self.position < end:
            name = document_name(self._given.name, self.document + 1)
            try:
                row = next(self._reader, None)
            except csv.Error as error:
                cut_off = str(error) == "unexpected end of data"
                raise wrong(name, "is cut off: the file ends inside a cell in quotes" if cut_off else f"is no row of a table ({error})") from None
            if row is None:
                return
            if not row:
                continue
            if len(row) > num_columns:
                raise wrong(name, f"has {len(row)} cells, and the header line names {num_columns} columns")
            if len(row) < num_columns and not self._last_line.endswith(b"\n"):
                raise wrong(name, f"is cut off: it has {len(row)} of {num_columns} cells, and the file ends within its line")
            self.document += 1
            yield row

    def _lines(self) -> Iterator[str]:
        for data in whole_lines(self._stream, self._given.name, self._given.block_bytes):
            for line in io.BytesIO(data):  # ends lines at \n alone: a \r belongs to its cell, or to the line end
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise not_text(document_name(self._given.name, self.document + 1), line, error.start, self.position) from None
                self._last_line, self.position = line, self.position + len(line)
                yield text
