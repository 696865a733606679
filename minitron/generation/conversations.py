"""Conversations as text to train on, in a chat template that was written for inference: such a one leaves the reasoning of earlier turns out, and may
open reasoning before an answer that has its own.

What an assistant thought and said goes through the template as single characters that stand for it, so that the result can be checked: every thought
within one pair of tags, none of them left open. Where the template fails that, the thoughts are put before their answers here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from minitron.generation.answers import PROBE, Answers, Draft, Edit
from minitron.generation.prompts import Tags, make_prompt, no_switches
from minitron.generation.templates import Message, StandIns, plain_messages, render


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation's text, and what of it the assistant writes: half-open ranges of characters, in order; None where they were not asked for."""

    text: str
    answers: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant's message: `head`, `thought`, `middle`, `answer`, `after`, one behind the other; "" where it has no such part.

    Characters stand for thought and answer. head and middle are the tags and the space around them, after is the space at the end. `apart`: the
    thought came in a field of its own, and there are no tags. `place` is where a thought can be put: before the answer, or a character for no answer.
    `blank` is such a character for a message of neither, where a template opens reasoning that has to be closed.
    """

    head: str
    thought: str
    middle: str
    answer: str
    after: str
    apart: bool
    place: str
    blank: str = ""

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

    @property
    def said_or_blank(self) -> Message:
        return {"content": (self.place or self.blank) + self.after}

    def characters(self, text: str) -> str:
        """Those that stand for parts of it; the blank one only where it was used."""
        return "".join(dict.fromkeys(self.thought + self.answer + self.place)) + (self.blank if self.blank in text else "")


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

    def __call__(self, messages: Sequence[Mapping[str, Any]], tools: list | None = None) -> str:
        """The text of `write`."""
        return self.write(messages, tools).text

    def write(self, messages: Sequence[Mapping[str, Any]], tools: list | None = None, *, mark_answers: bool = False) -> Written:
        """A conversation, with the tools that its template names; `mark_answers` also says which characters are the assistant's.

        These are what it was to write: from right behind the prompt that the template gives it (`<think>` too, where the prompt opens it) through the token
        that ends its turn, calls of tools included, their results not. Raises ValueError as the class does, and where they cannot be told.
        """
        if not self._tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template to write a conversation in; data.text_field takes plain text")
        if not messages:
            return Written("", () if mark_answers else None)
        plain = plain_messages(messages)
        stand_ins = StandIns([*plain, *(tools or [])])
        turns = {place: self._turn(message, stand_ins) for place, message in enumerate(plain) if message["role"] == "assistant"}
        hidden = stand_ins.hide(plain, no_switches(self._tags, any_word=False))
        draft = self._drafted(hidden, turns, tools)
        self.without_reasoning += draft.is_lost
        text = stand_ins.show(draft.text)
        if not mark_answers:
            return Written(text, None)
        draft, own = self._with_own(draft, hidden, turns, stand_ins, tools)
        ranges = Answers(self._tokenizer, tools, draft, own, self._prompt_tags, self._at_end, self._ends).ranges()
        places = stand_ins.shown_at(draft.text, [place for both in ranges for place in both])
        return Written(text, tuple(zip(places[::2], places[1::2], strict=True)))

    def _with_own(
        self, draft: Draft, messages: Sequence[Message], turns: Mapping[int, _Turn], stand_ins: StandIns, tools: list | None
    ) -> tuple[Draft, dict[int, str]]:
        """The draft with a character in every assistant's message, and these: one of which the template writes neither thought nor answer gets one for the
        first tool it calls, or for nothing; none if the text were another then."""
        own = {place: turn.characters(draft.rendered) for place, turn in turns.items()}
        bare = {place: turns[place] for place in own if not set(own[place]) & set(draft.rendered) and (not own[place] or messages[place].get("tool_calls"))}
        text = stand_ins.show(draft.text)
        for stands_for in ("as given", "nothing") if bare else ():
            marks, changed, others = {}, list(messages), dict(turns)
            for place, turn in bare.items():
                if messages[place].get("tool_calls"):
                    changed[place], marks[place] = _with_hidden_name(messages[place], stand_ins)
                else:
                    marks[place] = mark = stand_ins.of(turn.as_given["content"] if stands_for == "as given" else "")
                    others[place] = _Turn("", "", "", mark, "", False, mark)
            try:
                other = self._drafted(changed, others, tools)
            except ValueError:
                continue
            if stand_ins.show(other.text) == text:
                return other, own | marks
        return draft, own

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
        mind, blank = stand_ins.of(bare) if bare else "", "" if place else stand_ins.of("")
        return _Turn(head + thought[:start], mind, thought[end:] + closing + lead, answer, after, apart, place, blank)

    def _drafted(self, messages: Sequence[Message], turns: Mapping[int, _Turn], tools: list | None) -> Draft:
        """The conversation by the first way that keeps every thought and answer."""

        def given(own: Callable[[_Turn], Message]) -> Draft:
            bare = [{name: value for name, value in message.items() if name != "reasoning_content"} for message in messages]
            bare = [message | own(turns[place]) if place in turns else message for place, message in enumerate(bare)]
            return Draft(bare, render(self._tokenizer, bare, tools=tools))

        draft = given(lambda turn: turn.as_given)  # a refusal by the template is raised here
        if self._keeps(draft.text, turns):
            return draft
        put_back = partial(self._with_thoughts, turns=turns)
        for own, finish in ((lambda turn: turn.in_fields, replace), (lambda turn: turn.said, put_back), (lambda turn: turn.said_or_blank, put_back)):
            try:
                draft = finish(given(own))
            except ValueError:
                continue
            if self._keeps(draft.text, turns):
                return draft
        return replace(given(lambda turn: turn.said), is_lost=any(turn.thought for turn in turns.values()))

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

    def _with_thoughts(self, draft: Draft, turns: Mapping[int, _Turn]) -> Draft:
        """A draft of answers with every thought before its answer, in place of the tags that the template put there."""
        edits = []
        for turn in turns.values():
            if (end := draft.rendered.find(turn.place or turn.blank)) < 0:
                continue
            tags = self._at_end.search(draft.rendered[:end])
            if turn.thought:
                head, middle = (self._opening, f"\n{self._tags.closing}\n\n") if turn.apart else (turn.head, turn.middle)
                opened = self._opening if self._prompt_opens else ""
                edits.append(Edit(tags.start(), end, (opened or head) + turn.thought + middle, len(opened)))
            elif self._tags.is_open(tags[0]):
                edits.append(Edit(tags.start(), end, self._no_reasoning, len(self._no_reasoning)))
        return replace(draft, edits=tuple(sorted(edits, key=lambda edit: edit.start)))

    @cached_property
    def _prompts(self) -> tuple[str, str]:
        """What the template has the model go on from with reasoning on and off; one and the same where it knows no switch."""
        try:
            return tuple(make_prompt(self._tokenizer, PROBE, thinking, self._tags).text for thinking in (True, False))
        except ValueError:
            return (render(self._tokenizer, PROBE, add_generation_prompt=True),) * 2

    @cached_property
    def _ends(self) -> list[str]:
        """Tokens that may end a turn, the longest first."""
        return sorted({*self._tokenizer.get_added_vocab(), *self._tokenizer.all_special_tokens}, key=len, reverse=True)

    @property
    def _prompt_tags(self) -> list[str]:
        """What the prompts end in."""
        return [self._at_end.search(prompt)[0] for prompt in self._prompts]

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


def _with_hidden_name(message: Message, stand_ins: StandIns) -> tuple[Message, str]:
    """A message with a character for the name of the first tool it calls, and the character; "" where it has no such name."""
    call, *others = message["tool_calls"]
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str):
        return message, ""
    mark = stand_ins.of(name)
    named = call | {"function": inner | {"name": mark}} if "function" in call else call | {"name": mark}
    return message | {"tool_calls": [named, *others]}, mark
