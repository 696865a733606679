"""Bounds on what a server sends, before the openai package reads any of it: what must be held at once, and how long one request may go on."""

import json
import time
from collections.abc import Callable, Iterator

import httpx2  # what the openai package asks with

from minitron.serving.errors import NoCompletion, TooLong

BASE_BYTES, BYTES_PER_TOKEN, MOST_BYTES = 2**22, 2**12, 2**26  # of an answer, or of one part of a stream, that asks for so many tokens
DONE = b"[DONE]"  # ends a stream


class BoundedBody(httpx2.SyncByteStream):
    """A body as it comes. Raises NoCompletion where more must be held than any answer has, TooLong where it goes on for too long.

    held_bytes: of the whole body, or, where `is_stream`, of a line of it · `said_done`: a stream has said that it is at its end.
    """

    def __init__(self, body: httpx2.SyncByteStream, *, held_bytes: int, is_stream: bool, longest_seconds: float) -> None:
        self._body, self._held_bytes, self._is_stream, self._longest_seconds = body, held_bytes, is_stream, longest_seconds
        self._begun, self._tail = time.monotonic(), b""

    @property
    def said_done(self) -> bool:
        return DONE in self._tail

    def __iter__(self) -> Iterator[bytes]:
        held = 0
        for chunk in self._body:
            if time.monotonic() - self._begun > self._longest_seconds:
                raise TooLong(f"was still sending after {self._longest_seconds:g} s; longest_seconds gives it longer")
            line_end = chunk.rfind(b"\n") + 1 if self._is_stream else 0
            held = len(chunk) - line_end if line_end else held + len(chunk)
            if held > self._held_bytes:
                raise NoCompletion(f"sends {'one part of a stream' if self._is_stream else 'an answer'} of more than {self._held_bytes:,} bytes")
            self._tail = (self._tail + chunk)[-64:]
            yield chunk

    def close(self) -> None:
        self._body.close()


def bounding(longest_seconds: float) -> Callable[[httpx2.Response], None]:
    """A hook that puts bounds on every response, by the tokens that its request asks for. A packed body is refused: it may unpack to anything."""

    def bound(response: httpx2.Response) -> None:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise NoCompletion(f"sends a body packed by {response.headers['content-encoding']!r}, which was not asked for")
        asked = json.loads(response.request.content or b"{}")
        held_bytes = min(BASE_BYTES + BYTES_PER_TOKEN * asked.get("max_tokens", 0), MOST_BYTES)
        is_stream = bool(asked.get("stream")) and response.is_success
        response.stream = BoundedBody(response.stream, held_bytes=held_bytes, is_stream=is_stream, longest_seconds=longest_seconds)

    return bound
