"""Which characters of a written conversation are the assistant's: from behind the prompt that the template gives it through the end of its turn.

A template that marks them itself ({% generation %}) is taken at its word. In any other the conversation up to a message is written with a prompt for an
answer, and up to the message's end without: what the second has more is the message. Templates do write a message otherwise where more follow (earlier
reasoning left out, tools before the last question), so that these are no beginnings of the whole; then what they end in is looked for around the
characters that stand for the message's thought and answer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from minitron.generation.templates import GENERATION, Message, marked_ranges, render

PROBE = [{"role": "user", "content": "?"}]
# Blocks that are written somewhere else than where they stand: places within them are none of the whole.
ELSEWHERE = re.compile(r"\{%[-+]?\s*(macro|call|filter|set)\b.*?\{%[-+]?\s*end\1\b", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Edit:
    """`text` in place of the characters [start, end) that the template wrote before an answer; `opened` of its characters stand in the prompt already."""

    start: int
    end: int
    text: str
    opened: int


@dataclass(frozen=True, slots=True)
class Draft:
    """Messages as a template was given them, what it wrote, what is put in there (in order), and whether the reasoning is lost all the same."""

    messages: Sequence[Message]
    rendered: str
    edits: tuple[Edit, ...] = ()
    is_lost: bool = False

    @property
    def text(self) -> str:
        parts, end = [], 0
        for edit in self.edits:
            parts += [self.rendered[end : edit.start], edit.text]
            end = edit.end
        return "".join([*parts, self.rendered[end:]])

    def moved(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Ranges of `rendered` as ranges of `text`, those that touch made one."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted((self._place(start, is_start=True), self._place(end, is_start=False)) for start, end in ranges):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            elif start < end:
                joined.append((start, end))
        return joined

    def _place(self, place: int, *, is_start: bool) -> int:
        grown = 0
        for edit in self.edits:
            if place < edit.start or (place == edit.start and not is_start):
                break
            if place <= edit.end:
                return edit.start + grown + (edit.opened if is_start else len(edit.text))
            grown += len(edit.text) - (edit.end - edit.start)
        return place + grown


@dataclass(frozen=True, slots=True)
class _Around:
    """What stands around a message's characters: `before` the first, from the message before on, `inner` characters of it the message's own; `within`,
    between the first and the last; `behind` the last, all of it the message's."""

    before: str
    inner: int
    within: str
    behind: str

    def found(self, text: str, first: int, last: int) -> tuple[int, int] | None:
        """The range of another message that all this stands around, too."""
        begins, same = first - len(self.before), text[first + 1 : last] == self.within
        found = begins >= 0 and same and text.startswith(self.before, begins) and text.startswith(self.behind, last + 1)
        return (first - self.inner, last + 1 + len(self.behind)) if found else None


@dataclass(frozen=True, slots=True)
class Answers:
    """Finds the assistant's characters in a draft.

    `own`: of each assistant's message, by its place, the characters that stand for its parts ("": it has none). `tags`: what prompts may end in, with
    reasoning on and off; `at_end` matches such tags at the end of a text. `ends`: tokens that may end a turn, none behind one that it is the end of.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: list | None
    draft: Draft
    own: Mapping[int, str]
    tags: Sequence[str]
    at_end: re.Pattern
    ends: Sequence[str]

    def ranges(self) -> list[tuple[int, int]]:
        """Half-open ranges of `draft.text`, in order. Raises ValueError where they cannot be told."""
        marked = self._marked()
        return self.draft.moved(self._by_prefixes() if marked is None else marked)

    def _marked(self) -> list[tuple[int, int]] | None:
        """The ranges that the template marks itself; None where it marks none, or not where they are."""
        template = self.tokenizer.get_chat_template(tools=self.tools)
        if not GENERATION.search(template) or any(GENERATION.search(block[0]) for block in ELSEWHERE.finditer(template)):
            return None
        text, ranges = marked_ranges(self.tokenizer, self.draft.messages, self.tools)
        own = set("".join(self.own.values()))
        holds = any(own & set(text[start:end]) for start, end in ranges)
        return ranges if text == self.draft.rendered and (holds or not ranges) else None

    def _by_prefixes(self) -> list[tuple[int, int]]:
        text, ranges, floor = self.draft.rendered, [], 0
        known: dict[tuple, _Around] = {}  # of one message of each kind, so that not every message of a long conversation needs its beginning written anew
        for place, own in self.own.items():
            places = [text.find(character) for character in own if character in text]
            if own and not places:
                continue  # the template leaves this message out
            if any(text.count(character) > 1 for character in own) and not self.draft.messages[place].get("tool_calls"):
                raise ValueError(f"the chat template writes message {place + 1}, the assistant's, more than once: its answers cannot be told from the rest")
            ends = (min(places), max(places)) if places else None
            kind = self._kind(place)
            around = known.get(kind)
            found = around.found(text, *ends) if around and ends else None
            if found is None or found[0] < floor:
                start = self._start(place, floor, ends and ends[0])
                found = start, self._end(place, start, ends)
                if ends and (around := self._around(place, *found, *ends)):
                    known[kind] = around
            ranges.append(found)
            floor = found[1]
        return ranges

    def _kind(self, place: int) -> tuple:
        """What a template may tell messages of the assistant by, beside what they say."""
        messages = self.draft.messages
        before = messages[place - 1]["role"] if place else None
        return before, place == len(messages) - 1, sum(character in self.draft.rendered for character in self.own[place]), frozenset(messages[place])

    def _around(self, place: int, start: int, end: int, first: int, last: int) -> _Around | None:
        """What stands around a message; None where it calls tools, or does not begin behind what the message before says."""
        messages, text = self.draft.messages, self.draft.rendered
        said = messages[place - 1]["content"].strip() if place else ""
        begins = text.rfind(said, 0, start)
        if not said or begins < 0 or messages[place].get("tool_calls"):
            return None
        return _Around(text[begins + len(said) : first], first - start, text[first + 1 : last], text[last + 1 : end])

    def _start(self, place: int, floor: int, first: int | None) -> int:
        """Where a message begins: behind its prompt, and before `first`, the first of its characters (None: it has none)."""
        text, prompt = self.draft.rendered, self._prompt(place)
        limit = len(text) if first is None else first
        for given in self._endings(prompt or ""):
            if prompt is not None and floor <= len(given) <= limit and text.startswith(given):
                return len(given)
        opening = self._opening(place, prompt)
        if place == 0 and not opening:
            begin = self.tokenizer.bos_token or ""
            return len(begin) if text.startswith(begin) else 0
        for given in self._endings(opening) if opening and first is not None else ():
            found = text.rfind(given, 0, limit)
            if given and found >= 0 and found + len(given) >= floor:
                return found + len(given)
        raise ValueError(f"the chat template's text does not tell where message {place + 1}, the assistant's, begins")

    def _endings(self, prompt: str) -> list[str]:
        """A prompt as the template writes it, then with the other tags that it may end in, then without. One that opens reasoning comes after the same with
        the reasoning closed: where the text has that, it is what the model was to go on from."""
        bare = self._bare(prompt)
        others = [bare + tags for tags in self.tags]
        closed = [other for other in others if len(other) > len(prompt) > len(bare) and other.startswith(prompt)]
        return [*closed, prompt, *others, prompt.rstrip(), bare]

    def _prompt(self, place: int) -> str | None:
        """The conversation before a message, with the prompt for it; None where the template refuses it, as it may refuse no message at all."""
        try:
            return self._text(self.draft.messages[:place], add_generation_prompt=True)
        except ValueError:
            return None

    def _opening(self, place: int, prompt: str | None) -> str:
        """What a prompt ends in, from the message before on; as a template writes it for a question where there is no prompt."""
        if prompt is None or not place:
            return self._asked
        said = self.draft.messages[place - 1]["content"].strip()
        return prompt[prompt.rindex(said) :] if said and said in prompt else _more_of(prompt, self._text(self.draft.messages[:place]), self.ends)

    @property
    def _asked(self) -> str:
        """What the template writes to ask for an answer."""
        return _more_of(*(self._text(PROBE, add_generation_prompt=is_asked) for is_asked in (True, False)), self.ends)

    def _text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return render(self.tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=self.tools)

    def _end(self, place: int, start: int, own: tuple[int, int] | None) -> int:
        """Where a message ends: behind the end of its turn, or whatever else the template writes after `own`, its first and last character."""
        text, is_final = self.draft.rendered, place == len(self.draft.messages) - 1
        last, behind = (None, start) if own is None else (own[1], own[1] + 1)
        whole = text if is_final else self._text(self.draft.messages[: place + 1])
        if own and not self._is_whole(whole, start, *own):
            raise ValueError(f"the chat template writes what follows message {place + 1}, the assistant's, within it: the two cannot be told apart")
        tails = self._tails(whole, start, last)
        written = _written_of(tails, text[behind:], self.ends)
        if written is None and not is_final:  # a template may end its last turn in another way
            tails += self._tails((self._prompt(place + 1) or "").removesuffix(self._asked), start, last)
            written = _written_of(tails[1:], text[behind:], self.ends) or _written_of(tails, text[behind:], self.ends, may_lack_end=True)
        if written is None:
            raise ValueError(f"the chat template's text does not tell where message {place + 1}, the assistant's, ends")
        return behind + written

    def _is_whole(self, whole: str, start: int, first: int, last: int) -> bool:
        """Whether a message's beginning through its last character is in the text what it is in `whole`, which ends with it, but for tags before the first."""
        text, begins = self.draft.rendered, self._bare(self.draft.rendered[start:first]).rstrip()
        places = whole.find(text[first]), whole.find(text[last])
        return -1 in places or (whole[slice(*places)] == text[first:last] and (not begins or self._bare(whole[: places[0]]).rstrip().endswith(begins)))

    def _bare(self, text: str) -> str:
        """A text without the tags it ends in."""
        return text[: self.at_end.search(text).start()]

    def _tails(self, whole: str, start: int, last: int | None) -> list[str]:
        """What `whole`, a conversation that ends with a message, has after the message's last character (or its beginning); none where it lacks that."""
        text = self.draft.rendered
        if last is None:
            return [whole[start:]] if whole.startswith(text[:start]) else []
        return [whole.partition(text[last])[2]] if text[last] in whole else []


def _written_of(tails: Sequence[str], text: str, ends: Sequence[str], *, may_lack_end: bool = False) -> int | None:
    """How much of a `text` is the tail of a turn, the first that it begins with, without the space behind the token that ends it; None where it is none.

    `may_lack_end`: the text may be without the tokens of `ends` that a tail ends in.
    """
    for tail in tails:
        bare = tail.rstrip()
        token = next((end for end in ends if bare.endswith(end)), None)
        for kept in (tail, bare) if token is None else (bare,):
            if text.startswith(kept):
                return len(kept)
        without = bare.removesuffix(token or "") + tail[len(bare) :]
        if token and may_lack_end and (written := _written_of([without], text, ends, may_lack_end=True)) is not None:
            return written
    return None


def _more_of(text: str, other: str, ends: Sequence[str]) -> str:
    """What a text has behind another, less the tokens of `ends` that the other may end in; "" where it does not begin with that."""
    while not text.startswith(other):
        if (token := next((end for end in ends if other.endswith(end)), None)) is None:
            return ""
        other = other.removesuffix(token)
    return text[len(other) :]


def token_mask(offsets: np.ndarray | Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> np.ndarray:
    """bool [T]: whether any character of a token is the assistant's.

    `offsets` [T, 2]: half-open ranges of the tokens' characters, as a fast tokenizer's return_offsets_mapping gives them; one without a character is
    nobody's. `answers`: half-open ranges in order, none in another, as `Written.answers` has them.
    """
    begins, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    answer_begins, answer_ends = np.asarray(answers, dtype=np.int64).reshape(-1, 2).T
    first = np.searchsorted(answer_ends, begins, side="right")  # the first answer that is not over where the token begins
    after_all = np.iinfo(np.int64).max
    return (begins < ends) & (np.append(answer_begins, after_all)[first] < ends)
