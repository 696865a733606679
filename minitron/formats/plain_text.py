"""Plain text: a file is one document, or cut into documents at its paragraphs."""

import re
from collections.abc import Iterator
from typing import Any

from minitron.formats.blocks import Block
from minitron.formats.streams import CHUNK_BYTES, Given, Stream, not_text, wrong

LONGEST_TEXT = 2**28  # bytes of a file that stays one document
BLANK_LINES = re.compile(rb"\n\s*\n")
LINE_END = re.compile(rb"\n")
SPACE = re.compile(rb"\s")
# How far a document may go, in times its size, and where it ends as soon as it is longer than the bound before.
ENDS = ((2, BLANK_LINES), (4, LINE_END), (8, SPACE))


def texts(given: Given, start: dict[str, Any] | None) -> Iterator[Block]:
    """Blocks of kind "texts", line ends read as \\\\n. Put together in order, the documents are the text of the file."""
    place = start or {"document": 0, "byte": 0}
    with Stream(given.path, given.name, place["byte"]) as stream:
        document, position = place["document"], stream.position
        before = stream.disk(place["byte"])
        pieces = _pieces(stream, given.cut_kib * 2**10) if given.cut_kib else iter([_rest(stream, given.name)])
        block, size = [], 0
        for piece in pieces:
            block.append(_decoded(given.name, piece, position))
            position, size = position + len(piece), size + len(piece)
            if size >= given.block_bytes:
                yield _block(given.name, document, block, position, stream.disk(position) - before)
                document, before, block, size = document + len(block), stream.disk(position), [], 0
        if block:
            yield _block(given.name, document, block, position, stream.disk(position) - before)


def _block(name: str, document: int, block: list[str], position: int, num_bytes: int) -> Block:
    return Block(name, document, len(block), "texts", block, {"document": document + len(block), "byte": position}, num_bytes)


def _decoded(name: str, piece: bytes, position: int) -> str:
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_text(name, piece, error.start, position) from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _rest(stream: Stream, name: str) -> bytes:
    parts = []
    while not stream.ended:
        if stream.position > LONGEST_TEXT:
            raise wrong(name, f"is a document of more than {LONGEST_TEXT:,} bytes; data.cut_kib=64 makes several of it")
        parts.append(stream.read(CHUNK_BYTES))
    return b"".join(parts)


def _pieces(stream: Stream, size: int) -> Iterator[bytes]:
    """What is left of the stream, in pieces of about `size` bytes; where one ends follows from where it begins."""
    most = ENDS[-1][0] * size
    data, at = b"", 0
    while True:
        if len(data) - at < most and not stream.ended:
            data, at = data[at:] + stream.read(max(most, CHUNK_BYTES)), 0
        if at == len(data):
            return
        end = _end(data, at, size)
        yield data[at:end]
        at = end


def _end(data: bytes, at: int, size: int) -> int:
    """Where the piece that begins at `at` ends: at a blank line, else at a line's end, else at a space, else within a word."""
    least = 1
    for most, pattern in ENDS:
        if found := pattern.search(data, at + least * size, at + most * size):
            return found.end()
        least = most
    end = at + least * size
    if end >= len(data):
        return len(data)
    while data[end] & 0xC0 == 0x80 and end > at + least * size - 4:  # a byte within a character
        end -= 1
    return end
