"""Conversations as text to train on, in a chat template that was written for inference: such a one leaves the reasoning of earlier turns out, and may
open reasoning before an answer that has its own.

What an assistant thought and said goes through the template as single characters that stand for it, so that the result can be checked: every thought
within one pair of tags, none of them left open. Where the template fails that, the thoughts are put before their answers here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from minitron.generation.prompts import Tags, make_prompt, no_switches
from minitron.generation.templates import Message, StandIns, plain_messages, render

PROBE = [{"role": "user", "content": "?"}]


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant's message: `head`, `thought`, `middle`, `answer`, `after`, one behind the other; "" where it has no such part.

    Characters stand for thought and answer. head and middle are the tags and the space around them, after is the space at the end. `apart`: the
    thought came in a field of its own, and there are no tags. `place` is where a thought can be put: before the answer, or a character for no answer.
    """

    head: str
    thought: str
    middle: str
    answer: str
    after: str
    apart: bool
    place: str

    @property
    def as_given(self) -> Message:
        if self.apart:
            return self.in_fields
        return {"content": self.head + self.thought + self.middle + self.answer + self.after}

    @property
    def in_fields(self) -> Message:
        return ({"reasoning_content": self.thought} if self.thought else {}) | {"content": self.answer + self.after}

    @property
    def said(self) -> Message:
        return {"content": self.place + self.after}


class ConversationWriter:
    """Writes conversations [{role, content, …}, …] out in a tokenizer's chat template, the reasoning of every turn kept in one pair of closed tags.

    `without_reasoning` counts those whose reasoning no way could keep. Raises ValueError, when called, for what is no conversation of text
    and for one that the template refuses.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tags: Tags = Tags()):  # noqa: B008
        self._tokenizer, self._tags, self.without_reasoning = tokenizer, tags, 0
        opening, closing = re.escape(tags.opening), re.escape(tags.closing)
        self._at_end = re.compile(rf"(?:{opening}\s*)?(?:{closing}\s*)?\Z")  # tags that end a text
        self._again = re.compile(rf"\A(?:\s*{opening})+")
        self._twice = re.compile(rf"{opening}\s*{closing}\s*{opening}")

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if not self._tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template to write a conversation in; data.text_field takes plain text")
        if not messages:
            return ""
        plain = plain_messages(messages)
        stand_ins = StandIns(plain)
        turns = {place: self._turn(message, stand_ins) for place, message in enumerate(plain) if message["role"] == "assistant"}
        return stand_ins.show(self._written(stand_ins.hide(plain, no_switches(self._tags, any_word=False)), turns))

    def _turn(self, message: Message, stand_ins: StandIns) -> _Turn:
        """An assistant's message taken apart. A missing opening tag was in the prompt; a missing closing one was cut off."""
        opening, closing = self._tags.opening, self._tags.closing
        before, closed, rest = message["content"].partition(closing)
        space, opened, thought = before.partition(opening)
        if opened and not space.strip():
            head, thought = space + opening, self._again.sub("", thought)
        elif closed and not opened and (before.endswith("\n") or not rest or rest.startswith("\n")):
            head, thought = opening, before
        else:  # it has no reasoning, whatever tags it speaks of
            head, thought, closing, rest = "", "", "", message["content"]
        bare, said = thought.strip(), rest.strip()
        apart = not bare and "reasoning_content" in message
        bare = message["reasoning_content"].strip() if apart else bare
        start, end = (thought.find(bare), thought.find(bare) + len(bare)) if not apart else (0, 0)
        lead, after = rest[: len(rest) - len(rest.lstrip())], rest[len(rest.rstrip()) :] if said else ""
        answer = stand_ins.of(said) if said else ""
        place = stand_ins.of("") if bare and not said else answer
        return _Turn(head + thought[:start], stand_ins.of(bare) if bare else "", thought[end:] + closing + lead, answer, after, apart, place)

    def _written(self, messages: Sequence[Message], turns: Mapping[int, _Turn]) -> str:
        """The conversation by the first way that keeps every thought and answer."""
        text = self._rendered(messages, {place: turn.as_given for place, turn in turns.items()})  # a refusal by the template is raised here
        if self._keeps(text, turns):
            return text
        for give, finish in ((lambda turn: turn.in_fields, str), (lambda turn: turn.said, lambda text: self._with_thoughts(text, turns))):
            try:
                text = finish(self._rendered(messages, {place: give(turn) for place, turn in turns.items()}))
            except ValueError:
                continue
            if self._keeps(text, turns):
                return text
        self.without_reasoning += any(turn.thought for turn in turns.values())
        return self._rendered(messages, {place: turn.said for place, turn in turns.items()})

    def _rendered(self, messages: Sequence[Message], own: Mapping[int, Message]) -> str:
        bare = [{name: value for name, value in message.items() if name != "reasoning_content"} for message in messages]
        return render(self._tokenizer, [message | own.get(place, {}) for place, message in enumerate(bare)])

    def _keeps(self, text: str, turns: Mapping[int, _Turn]) -> bool:
        """Whether all thoughts and answers are there, once and in order, thoughts within tags (unless the template writes none), and no tag is left open."""
        opening, closing = self._tags.opening, self._tags.closing
        thoughts, answers = ({getattr(turn, name) for turn in turns.values()} - {""} for name in ("thought", "answer"))
        wanted = [character for turn in turns.values() for character in (turn.thought, turn.answer) if character]
        parts = re.findall("|".join(map(re.escape, [opening, closing, *wanted])), text)
        is_open = False
        for part in parts:
            if part in answers | {opening} if is_open else part in thoughts and opening in parts:
                return False
            is_open = part == opening or (is_open and part != closing)
        return not is_open and [part for part in parts if part not in (opening, closing)] == wanted and not self._twice.search(text)

    def _with_thoughts(self, text: str, turns: Mapping[int, _Turn]) -> str:
        """A text of answers with every thought before its answer, in place of the tags that the template put there."""
        for turn in (turn for turn in turns.values() if turn.place):
            before, place, behind = text.partition(turn.place)
            tags = self._at_end.search(before)
            if turn.thought:
                head, middle = (self._opening, f"\n{self._tags.closing}\n\n") if turn.apart else (turn.head, turn.middle)
                before = before[: tags.start()] + (self._opening if self._prompt_opens else head) + turn.thought + middle
            elif self._tags.is_open(tags[0]):
                before = before[: tags.start()] + self._no_reasoning
            text = before + place + behind
        return text

    @cached_property
    def _prompts(self) -> tuple[str, str]:
        """What the template has the model go on from with reasoning on and off; one and the same where it knows no switch."""
        try:
            return tuple(make_prompt(self._tokenizer, PROBE, thinking, self._tags).text for thinking in (True, False))
        except ValueError:
            return (render(self._tokenizer, PROBE, add_generation_prompt=True),) * 2

    @property
    def _prompt_opens(self) -> bool:
        return self._tags.is_open(self._prompts[0])

    @cached_property
    def _opening(self) -> str:
        """The opening tag and the space after it."""
        return self._at_end.search(self._prompts[0])[0] if self._prompt_opens else f"{self._tags.opening}\n"

    @cached_property
    def _no_reasoning(self) -> str:
        """Tags around nothing, as the template has them with reasoning off."""
        own = self._at_end.search(self._prompts[1])[0]
        return own if own.startswith(self._tags.opening) and self._tags.closing in own else self._tags.opening + self._tags.closing
