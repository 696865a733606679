"""What a completions endpoint sends back, as servers differ in it: how a text ended, token counts that may be missing, pieces of several shapes."""

import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from minitron.serving.errors import NoCompletion, said

# Reasons that servers give in `finish_reason`, in lower case, beside stop: OpenAI's, vLLM's, SGLang's, llama.cpp's, TensorRT-LLM's and others'.
CUT = {"length", "limit", "max_tokens", "max_length", "max_new_tokens", "token_limit", "model_length", "context_length", "model_context_window_exceeded"}
STOPPED = {"content_filter", "safety", "refusal", "recitation", "abort", "aborted", "cancel", "cancelled", "canceled", "error", "timeout", "failed"}
# More than what was asked for by so many times, and so many tokens: another tokenizer's counts differ, but not by that.
TIMES_AND_TOKENS = 4, 1000
MOST_CHARACTERS_PER_TOKEN = 256  # on average, in any tokenizer: a longer text is refused uncounted
# At the end of a piece, what may be the first half of a character: of a pair in JSON's \\u form, or what servers put for a token that is part of one.
HALF = re.compile("[\ud800-\udbff\N{REPLACEMENT CHARACTER}]+$")


class Ending(Enum):
    """How a text ended: the model's own end, the limit of tokens, or the server for a reason of its own."""

    ended = "ended"
    cut = "cut"
    stopped = "stopped"


@dataclass(frozen=True, slots=True)
class Made:
    """What one request gave. `tokens`: as the server counts them, else as the tokenizer here does; prompt_tokens None where the server does not say."""

    text: str
    tokens: int
    ending: Ending
    stopped: str = ""
    prompt_tokens: int | None = None


def read_pieces(parts: Iterable[Any], max_tokens: int, count: Callable[[str], int]) -> Generator[str, None, Made]:
    """Reads the parts of an answer, or the whole as one part, giving the text piece by piece; `count` counts the tokens of a text.

    Half a character at the text's end, where its last token is only part of one, is left out; within the text it is shown as one that is not known.
    Raises NoCompletion for an answer that is none, for one that goes on far beyond `max_tokens`, and for a stream that ends in its middle.
    """
    text, reason, tokens, prompt_tokens, answered, other = _Text(max_tokens, count), None, None, None, False, None
    for part in parts:
        choices, usage = (getattr(part, name, None) for name in ("choices", "usage"))
        other = part if choices is None and usage is None else other  # an error, or a sign of life
        tokens, prompt_tokens = (_number(usage, name) or found for name, found in (("completion_tokens", tokens), ("prompt_tokens", prompt_tokens)))
        for choice in choices if isinstance(choices, list) else ():  # none in a part that has the usage alone, or nothing
            if isinstance(choice, str | int | float | list | None):
                continue
            answered = True
            given = getattr(choice, "finish_reason", None)
            reason = (given.get("type") if isinstance(given, dict) else given) or reason
            if piece := text.add(_text(choice)):
                yield piece
    if not answered:
        raise NoCompletion(f"sent no completion but: {said(_fields(other)) or 'nothing'}")
    body = getattr(getattr(parts, "response", None), "stream", None)  # of a stream
    if reason is None and not getattr(body, "said_done", True):
        raise NoCompletion(f"broke off: its stream ended after {text.tokens():,} tokens without saying why")
    tokens = text.tokens() if tokens is None else min(tokens, max_tokens)
    ending = _ending(reason, tokens, max_tokens)
    return Made(text.whole(), tokens, ending, str(reason)[:40] if ending is Ending.stopped else "", prompt_tokens)


class _Text:
    """A text put together of pieces, each of which may end within a character."""

    def __init__(self, max_tokens: int, count: Callable[[str], int]):
        self._most_tokens, self._count = TIMES_AND_TOKENS[0] * max_tokens + TIMES_AND_TOKENS[1], count
        self._pieces, self._half, self._length, self._next_check = [], "", 0, self._most_tokens // 4  # a character has at most 4 tokens, its bytes

    def add(self, piece: str) -> str:
        """What can be shown by now. Raises NoCompletion for a text that is far too long."""
        self._length += len(piece)
        piece = self._half + piece
        self._half = found[0] if (found := HALF.search(piece)) else ""
        self._pieces.append(_characters(piece.removesuffix(self._half)))
        if self._length > self._next_check:
            self._next_check = 2 * self._length
            if self._length > MOST_CHARACTERS_PER_TOKEN * self._most_tokens or self.tokens() > self._most_tokens:
                raise NoCompletion(f"goes on beyond the tokens that it was asked for, {self._length:,} characters so far")
        return self._pieces[-1]

    def whole(self) -> str:
        return "".join(self._pieces)

    def tokens(self) -> int:
        """By our own tokenizer, with the half of a character at the end."""
        return self._count(self.whole() + _characters(self._half))


def _characters(text: str) -> str:
    """Text with the pairs of JSON's \\u form put together, and halves of one shown as a character that is not known."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _ending(reason: Any, tokens: int, max_tokens: int) -> Ending:
    """By the reason given; a reason that nobody knows, or none, is the model's own end unless all its tokens are used up."""
    word = str(reason or "").lower()
    if word in CUT:
        return Ending.cut
    if word in STOPPED:
        return Ending.stopped
    return Ending.cut if word not in ("stop", "eos") and tokens >= max_tokens else Ending.ended


def _text(choice: Any) -> str:
    """The text of a choice; some servers answer a request for a completion as they would one for a chat."""
    for holder, name in ((choice, "text"), (getattr(choice, "delta", None), "content"), (getattr(choice, "message", None), "content")):
        value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
        if isinstance(value, str):
            return value
    return ""


def _number(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else getattr(usage, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _fields(part: Any) -> Any:
    return {name: value for name, value in part.model_dump(warnings=False).items() if value is not None} if hasattr(part, "model_dump") else part
