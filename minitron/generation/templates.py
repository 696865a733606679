"""A conversation through a tokenizer's chat template: what goes in is made plain, what comes out is text, what goes wrong is one sentence."""

import json
import os
import re
import resource
import signal
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # names that data sets give an assistant's reasoning beside its content
PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters that no text means anything by
# What a template does wrong with a message that it was not written for, beside raising an error of its own. NameError: jinja2 makes 1e999 a variable, inf.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError, SyntaxError, NameError)
TEMPLATE_SECONDS, TEMPLATE_BYTES = 5, 2**30
TOO_LARGE, REFUSES = 3, 4  # exit codes
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")  # transformers' own block around what an assistant wrote
Message = dict[str, Any]


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages with their content as one text: a null is empty, parts of text are joined, and reasoning stands in `reasoning_content` alone.

    Other fields (tool_calls, name, …) stay, but for those that are null. Raises ValueError for what is no message or holds anything but text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"the conversation is {_shown(messages)}; it must be a list of {{role, content}}")
    return [_plain(message, f"message {number}") for number, message in enumerate(messages, 1)]


def _plain(message: Mapping[str, Any], where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} is {_shown(message)}; it must be {{role, content}}")
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = [_joined(given.pop(name), where) for name in REASONING_FIELDS if name in given]
    if "content" not in message and not reasoning and "tool_calls" not in given:
        raise ValueError(f"{where}, of {given['role']}, has no content; it must be {{role, content}}")
    content = given.get("content", "")
    if isinstance(content, list | tuple):
        reasoning += [_joined(part[part["type"]], where) for part in content if _is_thought(part)]
        content = [part for part in content if not _is_thought(part)]
    own = {"role": given["role"], **given, "content": _joined(content, where)}
    thought = next((text for text in reasoning if text.strip()), None)
    return own if thought is None else own | {"reasoning_content": thought}


def _is_thought(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("thinking", "reasoning") and part.get(part["type"]) is not None


def _joined(content: Any, where: str) -> str:
    """A text as it is, parts of text one after the other."""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "".join(_text_of(part, where) for part in content)
    raise ValueError(f"{where} holds {_shown(content)} of type {type(content).__name__}; it must be text, null, or a list of parts of text")


def _text_of(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        kind = part["type"] if isinstance(part, Mapping) and isinstance(part.get("type"), str) else type(part).__name__
        raise ValueError(f"{where} has a part of type {kind}, {_shown(part)}; only text can be read, as {{type: text, text: …}}")
    return text


def _shown(value: Any) -> str:
    return repr(value)[:60]


@lru_cache
def check_template(template: str) -> None:
    """Writes a short conversation in a process of its own, before a template is let near this one's time and memory: transformers' sandbox lets one do nothing
    but compute, for as long and with as much as it likes. Raises ValueError for one that takes TEMPLATE_SECONDS or TEMPLATE_BYTES."""
    sample = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello", "reasoning_content": "Hm"}, {"role": "user", "content": "Bye"}]
    child = os.fork()
    if child == 0:
        try:
            os._exit(_tried(template, sample))
        finally:
            os._exit(REFUSES)
    deadline = time.monotonic() + TEMPLATE_SECONDS
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise ValueError(f"the chat template takes more than {TEMPLATE_SECONDS} s to write three short messages; it is not used")
        time.sleep(0.001)
    if os.waitstatus_to_exitcode(ended[1]) not in (0, REFUSES):
        raise ValueError(f"the chat template takes more than {TEMPLATE_BYTES // 2**20} MiB to write three short messages; it is not used")


def _tried(template: str, sample: list[Message]) -> int:
    """An exit code: TOO_LARGE where memory or the text goes beyond the limit; REFUSES where the template fails otherwise, which it may."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else None
    if held is not None:
        resource.setrlimit(resource.RLIMIT_AS, (held + TEMPLATE_BYTES,) * 2)
    try:
        texts, _ = render_jinja_template(conversations=[sample], chat_template=template, tools=None, add_generation_prompt=True)
    except (MemoryError, OverflowError):
        return TOO_LARGE
    except Exception:
        return REFUSES
    return TOO_LARGE if len(texts[0]) > TEMPLATE_BYTES // 64 else 0


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any) -> str:
    """Plain messages in the tokenizer's chat template. Raises ValueError with its own sentence where it refuses them or fails, and as check_template."""
    if isinstance(tokenizer.chat_template, str):
        check_template(tokenizer.chat_template)
    return _told(lambda: tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **variables))


def marked_ranges(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list | None = None) -> tuple[str, list[tuple[int, int]]]:
    """The same text, and the half-open ranges of its characters in the template's own {% generation %} blocks; none where it has no such block.

    A block inside a macro gets a wrong range: transformers counts from what is written before the macro. Raises ValueError as `render`.
    """
    template = tokenizer.get_chat_template(tools=tools)
    if not GENERATION.search(template):
        return "", []
    check_template(template)
    variables = {**tokenizer.special_tokens_map, "tools": tools, "chat_template": template, "return_assistant_tokens_mask": True}
    (text,), (ranges,) = _told(lambda: render_jinja_template(conversations=[list(messages)], **variables))
    return text, [(start, end) for start, end in ranges if start < end]


def _told(write: Callable[[], Any]) -> Any:
    try:
        return write()
    except TEMPLATE_ERRORS as error:
        said = " ".join(str(error).split())[:300] or "it gives no reason"
        own = type(error) is jinja2.TemplateError  # what raise_exception of a template raises
        raise ValueError(f"the chat template refuses it: {said}" if own else f"the chat template cannot write it ({type(error).__name__}: {said})") from None


class StandIns:
    """Single characters, in none of the messages, that stand for texts on their way through a template, which sees nothing of those."""

    def __init__(self, messages: Sequence[Mapping[str, Any]]):
        used = set(json.dumps(list(messages), ensure_ascii=False, default=str))
        self._free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        self._texts: dict[str, str] = {}

    def of(self, text: str) -> str:
        """A character for a text."""
        self._texts[character := next(self._free)] = text
        return character

    def hide(self, messages: Sequence[Message], pattern: re.Pattern) -> list[Message]:
        """The messages with a character in place of all that matches, but for the assistant's own."""
        stand_in = lru_cache(self.of)

        def without(text: str) -> str:
            return pattern.sub(lambda match: stand_in(match[0]), text)

        return [message if message["role"] == "assistant" else message | {"content": without(message["content"])} for message in messages]

    def show(self, text: str) -> str:
        """A text with what the characters stand for."""
        for character, own in self._texts.items():
            text = text.replace(character, own)
        return text

    def shown_at(self, text: str, places: Iterable[int]) -> list[int]:
        """Where places between characters of `text` are in what `show` makes of it."""
        found = [match.start() for match in re.finditer(f"[{''.join(self._texts)}]", text)] if self._texts else []
        grown = [0, *accumulate(len(self._texts[text[place]]) - 1 for place in found)]
        return [place + grown[bisect_left(found, place)] for place in places]
