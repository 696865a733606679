"""What a completions endpoint sends back, as servers differ in it: how a text ended, token counts that may be missing, pieces of several shapes."""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from minitron.serving.errors import NoCompletion, said

# Reasons that servers give in `finish_reason`, in lower case, beside stop: OpenAI's, vLLM's, SGLang's, llama.cpp's, TensorRT-LLM's and others'.
CUT = {"length", "limit", "max_tokens", "max_length", "max_new_tokens", "token_limit", "model_length", "context_length", "model_context_window_exceeded"}
STOPPED = {"content_filter", "safety", "refusal", "recitation", "abort", "aborted", "cancel", "cancelled", "canceled", "error", "timeout", "failed"}


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

    Raises NoCompletion for an answer that is none.
    """
    text, reason, tokens, prompt_tokens, answered, other = "", None, None, None, False, None
    for part in parts:
        choices, usage = (getattr(part, name, None) for name in ("choices", "usage"))
        other = part if choices is None and usage is None else other  # an error, or a sign of life
        tokens, prompt_tokens = (_number(usage, name) or found for name, found in (("completion_tokens", tokens), ("prompt_tokens", prompt_tokens)))
        for choice in choices or []:  # none in a part that has the usage alone, or nothing
            answered = True
            given = getattr(choice, "finish_reason", None)
            reason = (given.get("type") if isinstance(given, dict) else given) or reason
            if piece := _text(choice):
                text += piece
                yield piece
    if not answered:
        raise NoCompletion(f"sent no completion but: {said(_fields(other)) or 'nothing'}")
    tokens = count(text) if tokens is None else tokens
    ending = _ending(reason, tokens, max_tokens)
    return Made(text, tokens, ending, str(reason) if ending is Ending.stopped else "", prompt_tokens)


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
    return value if isinstance(value, int) else None


def _fields(part: Any) -> Any:
    return {name: value for name, value in part.model_dump().items() if value is not None} if hasattr(part, "model_dump") else part
