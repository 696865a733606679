"""Prompts: conversations in a tokenizer's own chat template, and the tags around reasoning. Loads no torch: a client of a server may have none."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from minitron.generation.switches import WORDS, written_both_ways
from minitron.generation.templates import StandIns, plain_messages, render


@dataclass(frozen=True, slots=True)
class Tags:
    """Around reasoning: text, which the tokenizer at hand turns into tokens."""

    opening: str = "<think>"
    closing: str = "</think>"

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        return tuple(tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in (self.opening, self.closing))

    def is_open(self, text: str) -> bool:
        """Whether reasoning is open at the end of a text."""
        _, opened, after = text.rpartition(self.opening)
        return bool(opened) and self.closing not in after

    def is_closed(self, text: str) -> bool:
        """Whether a text ends in the end of reasoning."""
        return text.rstrip().endswith(self.closing)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model goes on from, and whether reasoning is open or just closed at its end; a tag within the messages of others says nothing of that."""

    text: str
    is_open: bool
    is_closed: bool = False


def write_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, Any]], thinking: bool | None) -> str:
    """The text of `make_prompt` with the usual tags."""
    return make_prompt(tokenizer, prompt, thinking).text


def make_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, Any]], thinking: bool | None, tags: Tags = Tags()) -> Prompt:  # noqa: B008
    """A user's message, or a conversation [{role, content}, …], in the tokenizer's chat template, reasoning switched on or off the way that template does it.

    A message stays as it is where there is no template. Tags in a message of others than the assistant's come through the template as they are; so do the
    words of a switch where they are part of something longer, and anywhere if `thinking` is given. Raises ValueError where thinking is given and no way
    to say it changes the prompt, for a conversation without a template, and for one that the template refuses.
    """
    if not tokenizer.chat_template:
        if thinking is not None:
            raise ValueError(f"thinking is {_word(thinking)}, but the tokenizer has no chat template; leave thinking null")
        if not isinstance(prompt, str):
            raise ValueError("the prompt is a conversation, but the tokenizer has no chat template; give the prompt as text")
        return Prompt(prompt, tags.is_open(prompt), tags.is_closed(prompt))
    messages = plain_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    stand_ins = StandIns(messages)
    messages = stand_ins.hide(messages, no_switches(tags, any_word=thinking is not None))
    text = render(tokenizer, messages, add_generation_prompt=True)
    if thinking is not None:
        both = written_both_ways(tokenizer, messages, tags.is_closed)
        if both is None:
            raise ValueError(f"thinking is {_word(thinking)}, but the chat template has no switch: neither a variable (enable_thinking, …) nor a word in a "
                             "message (/think, …) changes its prompt; leave thinking null, or put what the model knows into the prompt itself")  # fmt: skip
        text = both[0] if thinking else both[1]
    return Prompt(stand_ins.show(text), tags.is_open(text), tags.is_closed(text))


def no_switches(tags: Tags, *, any_word: bool) -> re.Pattern:
    """What in others' messages a template must not take for a switch: tags, and the words of a switch within a longer word, a path or a tag (or any)."""
    words = "|".join(re.escape(word) for word in sorted({word for pair in WORDS for word in pair}, key=len, reverse=True))
    inner = words if any_word else rf"(?<=[\w/.:<])(?:{words})|(?:{words})(?=[\w/>])"
    return re.compile(f"{re.escape(tags.opening)}|{re.escape(tags.closing)}|{inner}")


def _word(thinking: bool) -> str:
    return "on" if thinking else "off"
