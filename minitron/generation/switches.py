"""How a chat template switches reasoning on and off, found by writing the same conversation both ways and seeing whether the prompt changes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2.ext
import jinja2.meta
from transformers import PreTrainedTokenizerBase

from minitron.generation.templates import Message, render

# What templates take in a message: the words for on and for off.
WORDS = (("/think", "/no_think"), ("/think", "/nothink"), ("detailed thinking on", "detailed thinking off"))
# What a variable may be given for on and for off; None: nothing.
VALUES = ((True, False), ("on", "off"), ("enabled", "disabled"))
VALUES_OF = {"budget": ((None, 0),), "effort": (("high", "none"),)}  # by what is in the variable's name
HANDED_ON = ("high", "low")  # efforts that a model knows whose template hands any on
USUAL_VARIABLES = ("enable_thinking", "thinking", "reasoning_effort")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to say on or off: a variable's value, or a word in the message of a role."""

    name: str
    place: str  # variable, system, user
    on: Any
    off: Any

    def text(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], on: bool) -> str:
        """The conversation with its prompt for an answer. Raises ValueError where the template refuses it."""
        value = self.on if on else self.off
        if self.place == "variable":
            return render(tokenizer, messages, add_generation_prompt=True, **({} if value is None else {self.name: value}))
        return render(tokenizer, (_to_system if self.place == "system" else _to_user)(messages, value), add_generation_prompt=True)


def written_both_ways(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], is_closed: Callable[[str], bool]) -> tuple[str, str] | None:
    """The conversation's prompt with reasoning on and off, by the first way that changes more of it than the word or value put in; None where none does.

    `is_closed` says of a prompt that reasoning is over at its end: the one that is so is the one with reasoning off, whatever a variable is called.
    """
    for way, may_hand_on in _ways(tokenizer):
        try:
            on, off = (way.text(tokenizer, messages, state) for state in (True, False))
        except ValueError:  # the template refuses a system message, say, or such a value
            continue
        if on == off or (not may_hand_on and _handed_on(on, off, str(way.on), str(way.off))):
            continue
        return (off, on) if is_closed(on) and not is_closed(off) else (on, off)
    return None


def _ways(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Way, bool]]:
    """Every way, the likelier first, and whether it counts where the template only hands the value on."""
    variables = [*USUAL_VARIABLES, *sorted(_variables(tokenizer.get_chat_template()) - {*USUAL_VARIABLES})]
    for name in variables:
        choices = next((choices for part, choices in VALUES_OF.items() if part in name), VALUES)
        yield from ((Way(name, "variable", *values), False) for values in choices)
    for place in ("system", "user"):
        yield from ((Way(on, place, on, off), False) for on, off in WORDS)
    yield from ((Way(name, "variable", *HANDED_ON), True) for name in variables if "effort" in name)


@lru_cache(maxsize=32)
def _variables(template: str) -> frozenset[str]:
    """Names of reasoning that the template reads and nowhere sets: candidates, which only count if they change something."""
    environment = jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols])
    names = jinja2.meta.find_undeclared_variables(environment.parse(template))
    return frozenset(name for name in names if any(part in name.lower() for part in ("think", "reason")))


class _Generation(jinja2.ext.Extension):
    """transformers' own block around what an assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _handed_on(on: str, off: str, on_word: str, off_word: str) -> bool:
    """Whether two prompts differ in nothing but one word that was put in."""
    starts = (start for start in range(len(on)) if on.startswith(on_word, start))
    return any(on[:start] + off_word + on[start + len(on_word) :] == off for start in starts)


def _to_system(messages: Sequence[Message], word: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        own = messages[0]["content"]
        return [messages[0] | {"content": f"{word}\n{own}" if own else word}, *messages[1:]]
    return [{"role": "system", "content": word}, *messages]


def _to_user(messages: Sequence[Message], word: str) -> list[Message]:
    """In the last message of the user."""
    last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=None)
    return [message | {"content": f"{message['content']} {word}"} if number == last else message for number, message in enumerate(messages)]
