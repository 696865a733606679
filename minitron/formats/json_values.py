"""A .json file, read value by value: an array of objects, objects one after another, or one object that holds a list of them."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from minitron.formats.blocks import Block, document_name
from minitron.formats.streams import CHUNK_BYTES, Given, Stream, not_text, wrong

LONGEST_VALUE = 2**29  # characters of one value, which is held in memory, and of an object that holds the list of all documents
NEAR_THE_END = 16  # characters before the end of what is read, within which an error may only mean that more must be read
SPACE = re.compile(r"[ \t\n\r]*")
ARRAY, OBJECTS, LIST = "array", "objects", "list"  # a file's three forms
PASSED = "passed"  # of a place: behind the end of the array


def json_values(given: Given, start: dict[str, Any] | None) -> Iterator[Block]:
    """Blocks of kind "values". Raises ValueError naming the document for what is no JSON and for an array without its end."""
    place = start or {"document": 0, "byte": 0, "form": None}
    if place["form"] == PASSED:
        return
    if place["form"] == LIST:
        yield from _listed(given, place["document"])
        return
    with Stream(given.path, given.name, place["byte"]) as stream:
        values = _Values(given, stream, place["document"])
        form = place["form"] or (ARRAY if values.take("[") else OBJECTS)
        if form == OBJECTS and not start and not values.at_end():
            values.ahead.append(values.next())
            held = _held_list(values.ahead[0])
            if held is not None and values.at_end():
                yield from _blocks_of_list(given, held, 0)
                return
        before = stream.disk(place["byte"])
        while block := list(values.block(form)):
            position = values.position()
            after = stream.disk(position)
            end = {"document": values.document, "byte": position, "form": PASSED if values.passed else form}
            yield Block(given.name, values.document - len(block), len(block), "values", block, end, after - before)
            before = after


def _held_list(value: Any) -> list[Any] | None:
    """The documents of an object that only holds them, such as {"version": 1, "data": [{…}, …]}; None where it is a document itself.

    A document is what has a text, or whose objects are the messages of a conversation.
    """
    if not isinstance(value, dict):
        return None
    lists = [held for held in value.values() if isinstance(held, list) and held and all(isinstance(item, dict) for item in held)]
    if len(lists) != 1 or "text" in value or any("role" in item or "from" in item for item in lists[0]):
        return None
    return lists[0]


def _listed(given: Given, document: int) -> Iterator[Block]:
    with Stream(given.path, given.name) as stream:
        held = _held_list(_Values(given, stream, 0).next())
    if held is None:
        raise wrong(given.name, "has changed since its first documents were read")
    yield from _blocks_of_list(given, held, document)


def _blocks_of_list(given: Given, held: list[Any], document: int) -> Iterator[Block]:
    size = given.path.stat().st_size
    num_each = max(1, len(held) * given.block_bytes // size)
    for first in range(document, len(held), num_each):
        end = min(first + num_each, len(held))
        yield Block(given.name, first, end - first, "values", held[first:end], {"document": end, "byte": 0, "form": LIST},
                    size * end // len(held) - size * first // len(held))  # fmt: skip


class _Values:
    """Values of a stream's text, from where it stands; no more of it is in memory than one value, or a chunk, needs.

    `document` counts the values read. `ahead` are values that were read before the block that they belong to.
    `passed`: the array's end is behind.
    """

    def __init__(self, given: Given, stream: Stream, document: int) -> None:
        self.document, self.ahead, self.passed = document, [], False
        self._given, self._stream = given, stream
        self._decode = json.JSONDecoder().raw_decode
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0  # what is read and not dropped, and where in it the next value, or what comes before it, begins
        self._dropped = 0  # characters before `_text`
        self._counted, self._bytes = 0, stream.position  # the file's byte at character `_counted` of `_text`

    def block(self, form: str) -> Iterator[Any]:
        """Values up to the end of the block."""
        end = self._dropped + self._at + self._given.block_bytes
        while self.ahead:
            yield self.ahead.pop()
        while self._dropped + self._at < end and not self.passed:
            if form == ARRAY and self.take("]"):
                if self.at_end():
                    self.passed = True
                    return
                raise wrong(self._given.name, f"goes on behind the end of its array, of which document {self.document:,} is the last")
            if form == ARRAY and self.document and not self.take(","):
                if self.at_end():
                    raise wrong(self._given.name, f"is cut off: it ends after document {self.document:,}, and its array has no end")
                raise wrong(self._next_name(), "is not set off by a comma from the one before")
            if form == OBJECTS and self.at_end():
                return
            yield self.next()

    def next(self) -> Any:
        """The value that begins here. Raises ValueError where there is none."""
        self._to_value()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._stream.ended or not (error.msg.startswith("Unterminated") or len(self._text) - error.pos <= NEAR_THE_END):
                    raise self._no_value(error) from None
            except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
                raise wrong(self._next_name(), f"cannot be read ({type(error).__name__}: {error})") from None
            else:
                if end < len(self._text) or isinstance(value, dict | list) or self._stream.ended:  # a number's digits may go on
                    self._at, self.document = end, self.document + 1
                    return value
            self._more()

    def position(self) -> int:
        """The file's byte behind the last value, counted as text."""
        self._bytes += len(self._text[self._counted : self._at].encode())
        self._counted = self._at
        return self._bytes

    def at_end(self) -> bool:
        """Whether nothing but space is left."""
        return not self._to_value()

    def take(self, letter: str) -> bool:
        """Whether this comes next; if so it is passed."""
        found = self._to_value() == letter
        self._at += found
        return found

    def _to_value(self) -> str:
        """Pass over space, and give the character behind it, none at the file's end."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or self._stream.ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def _more(self) -> None:
        """Read on: a chunk, or as much again as the value has so far, so that a long one is not begun anew too often."""
        held = len(self._text) - self._at
        if held > LONGEST_VALUE:
            raise wrong(self._next_name(), f"is longer than {LONGEST_VALUE // 2**20:,} MiB; where it is an object that holds a list of documents, "
                        "they can be read as JSON lines (.jsonl)")  # fmt: skip
        data = self._stream.read(max(min(CHUNK_BYTES, self._given.block_bytes), held))
        try:
            text = self._utf8.decode(data, final=self._stream.ended)
        except UnicodeDecodeError as error:
            raise not_text(self._given.name, error.object, error.start, self._stream.position - len(error.object)) from None
        self.position()
        self._dropped += self._at
        self._text, self._at, self._counted = self._text[self._at :] + text, 0, 0

    def _next_name(self) -> str:
        return document_name(self._given.name, self.document + 1)

    def _no_value(self, error: json.JSONDecodeError) -> ValueError:
        if error.msg.startswith("Unterminated") or error.pos >= len(self._text.rstrip()):
            return wrong(self._given.name, f"is cut off: it ends in the middle of document {self.document + 1:,}")
        near = " ".join(self._text[max(self._at, error.pos - 20) : error.pos + 20].split())
        return wrong(self._next_name(), f"is no JSON ({error.msg}, at {near!r})")
