"""What a record of a data set is: a text, a conversation, a question and its answer in two fields, a pair of answers of which one was preferred.

`recognise` tells it from the first records, by the fields' names and what they hold; a `Reading` then makes every record a text or a conversation. What is
not plain is refused with the settings that say it: a source that is read in another way than it was meant trains a model on questions, or on half its text.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minitron.sources.turns import Conversation, MissingField, Refused, Turn, conversation, is_answer, is_turn, read_json, shown, turns_of

FORMS = ("auto", "text", "messages", "sharegpt", "prompt_answer", "alpaca", "preference")
Record = Mapping[str, Any]
# The usual names.
TEXT = "text"
MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "query", "input", "instruction", "problem")
ANSWERS = ("answer", "response", "output", "completion", "solution")
SYSTEMS = ("system", "system_prompt")
TOOLS, CHOSEN, INSTRUCTION, INPUT, OUTPUT, HISTORY = "tools", "chosen", "instruction", "input", "output", "history"


@dataclass(frozen=True, slots=True)
class Fields:
    """The settings data.form, data.text_field, data.messages_field, data.prompt_field, data.answer_field, data.system_field; None: by the usual names."""

    form: str = "auto"
    text: str = TEXT
    messages: str | None = None
    prompt: str | None = None
    answer: str | None = None
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """How a record is read. `main` is the field of the text, the conversation or the answer; `others` may be missing in a record, `seen` are those that the
    first records have."""

    form: str
    main: str
    prompt: str | None = None
    system: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The only fields that are looked at; not every source has all of them."""
        return tuple(dict.fromkeys(name for name in (self.main, self.prompt, *self.system, *self.others) if name is not None))

    @property
    def described(self) -> str:
        """In words, e.g. `conversations in "messages"`."""
        if self.form == "text":
            return f'text in "{self.main}"'
        if self.form in ("messages", "sharegpt"):
            said = f'conversations in "{self.main}"' + (" (sharegpt)" if self.form == "sharegpt" else "")
        elif self.form == "preference":
            said = f'chosen answers in "{self.main}"' + (f', questions in "{self.prompt}"' if self.prompt else "") + " (preference)"
        else:
            added = f' and "{INPUT}"' if self.form == "alpaca" and INPUT in self.seen else ""
            said = f'questions in "{self.prompt}"{added}, answers in "{self.main}"' + (" (alpaca)" if self.form == "alpaca" else "")
        systems = [f', system prompts in "{name}"' for name in self.system if name in self.seen]
        return said + "".join(systems) + (f', tools in "{TOOLS}"' if TOOLS in self.seen else "")

    def content(self, record: Record) -> str | Conversation:
        """The record's text or conversation; "" where it is null or empty.

        Raises MissingField where a field is missing or holds something else, Refused where the record is no conversation to train on.
        """
        if self.form == "text":
            return self._held(record, self.main, "text_field", (str,), "text") or ""
        turns = self._turns(record)
        if isinstance(turns, str) or not turns:
            return turns or ""
        return conversation(turns, self._system(record), record.get(TOOLS) if TOOLS in self.others else None)

    def _turns(self, record: Record) -> list[Turn] | str:
        if self.form in ("messages", "sharegpt"):
            value = self._held(record, self.main, "messages_field", (list, tuple, str), "a list of {role, content}")
            given = read_json(value) if value else []
            if not isinstance(given, list | tuple):
                raise MissingField(f"data.messages_field is {self.main!r}; it must hold a list of {{role, content}}, but it holds {shown(value)}")
            return turns_of(given)
        question = self._question(record)
        answer = self._said(record, self.main, "answer_field", "assistant")
        if self.form == "preference" and isinstance(record[self.main], str) and not question:
            return record[self.main]  # of a whole text one was preferred
        if self.form == "preference" and any(turn["role"] == "user" for turn in answer):
            return answer  # the whole conversation
        return question + answer if answer and (question or self.form == "preference") else []

    def _question(self, record: Record) -> list[Turn]:
        if self.prompt is None:
            return []
        asked = self._said(record, self.prompt, "prompt_field", "user")
        if self.form != "alpaca":
            return asked
        added = self._said(record, INPUT, "prompt_field", "user") if INPUT in record else []
        parts = [turn["content"] for turn in asked + added]
        return self._history(record) + [{"role": "user", "content": "\n\n".join(parts)}] if parts else []

    def _said(self, record: Record, name: str, setting: str, role: str) -> list[Turn]:
        """A field's turns: a text is one of the role; [] where it is null or blank."""
        texts_alone = self.form == "alpaca"
        value = self._held(record, name, setting, (str,) if texts_alone else (str, list, tuple, Mapping), "text" if texts_alone else "text or turns")
        if isinstance(value, str) or not value:
            return [{"role": role, "content": value}] if value and value.strip() else []
        turns = [value if is_turn(value) else {"role": role, **value}] if isinstance(value, Mapping) else value
        if not all(map(is_turn, turns)):
            raise MissingField(f"data.{setting} is {name!r}; it must hold text or turns {{role, content}}, but it holds {shown(value)}")
        return turns_of(turns)

    def _history(self, record: Record) -> list[Turn]:
        past = record.get(HISTORY) or []
        pairs = read_json(past) if isinstance(past, str) else past
        if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise Refused(f"its history is {shown(past)}; it must be a list of [question, answer]")
        return [{"role": role, "content": said} for pair in pairs for role, said in zip(("user", "assistant"), pair, strict=True)]

    def _system(self, record: Record) -> str | None:
        said = [self._held(record, name, "system_field", (str,), "text") for name in self.system if name in record]
        return next((text for text in said if text), None)

    @staticmethod
    def _held(record: Record, name: str, setting: str, kinds: tuple[type, ...], what: str) -> Any:
        if name not in record:
            raise MissingField(f"data.{setting} is {name!r}; there is no such field, it must be one of {_listed(record)}")
        value = record[name]
        if value is not None and not isinstance(value, kinds):
            raise MissingField(f"data.{setting} is {name!r}; it must hold {what}, but it holds {shown(value)}")
        return value


def recognise(records: Sequence[Record], fields: Fields, *, source: str = "the source") -> Reading:
    """How the first records are to be read, and with them all of the source.

    Raises ValueError where that is not plain, or `fields` name what is not there; it calls the source `source`. MissingField as `Reading.content` does.
    """
    if fields.form not in FORMS:
        raise ValueError(f"data.form is {fields.form!r}; it must be one of {', '.join(FORMS)}")
    first = _First(records, fields, source)
    form = _given_form(first)
    reading = first.plain() if form is None else first.reading(form)
    if reading.form in ("messages", "sharegpt"):
        first.check_answers(reading)
    for record in records:
        try:
            reading.content(record)
        except Refused:
            continue
    return reading


def _given_form(first: "_First") -> str | None:
    """The form that the settings say, or that "text" there says; None where it is to be told from the fields."""
    fields = first.fields
    if fields.form != "auto":
        return fields.form
    if fields.messages is not None:
        return "messages"
    if fields.prompt is not None or fields.answer is not None:
        return "prompt_answer"
    return "text" if fields.text != TEXT or not first.records or first.fits(TEXT, _is_text) else None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_turns(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(is_turn, value))


def _is_conversation(value: Any) -> bool:
    """Also where a turn of it is none: that one is refused, it does not hide what its source is."""
    return any(map(is_turn, _given(value)))


def _given(value: Any) -> Sequence[Any]:
    """A list of turns or the JSON of one; () for anything else."""
    given = read_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    return given if isinstance(given, list | tuple) else ()


def _is_said(value: Any) -> bool:
    return _is_text(value) or is_turn(value) or _is_turns(value)


@dataclass(frozen=True, slots=True)
class _First:
    """The first records of a source, and the settings for it."""

    records: Sequence[Record]
    fields: Fields
    source: str

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for record in self.records for name in record))

    def fits(self, name: str, is_such: Callable[[Any], bool]) -> bool:
        """Whether there is a field of that name, and whatever it holds is such, but for nulls and what is empty."""
        return name in self.names and all(is_such(value) for value in self._values(name))

    def _values(self, name: str) -> list[Any]:
        values = [record[name] for record in self.records if name in record]
        return [value for value in values if value is not None and not (isinstance(value, str | list | tuple) and not value)]

    def _name(self, setting: str, usual: Sequence[str], is_such: Callable[[Any], bool]) -> str:
        """The field that a setting names, or the one of the usual names that there is and that fits."""
        given = getattr(self.fields, setting)
        if given is not None:
            if self.records and given not in self.names:
                raise ValueError(f"data.{setting}_field is {given!r}; {self.source} has no such field, it must be one of {_listed(self.names)}")
            return given
        found = [name for name in usual if self.fits(name, is_such)] if self.records else usual[:1]
        if len(found) != 1:
            has = f"{_listed(found)} all fit" if found else f"none of {', '.join(usual)} is there and fits"
            raise ValueError(f"data.form is {self.fields.form}; in {self.source} {has}, data.{setting}_field must be one of {_listed(self.names)}")
        return found[0]

    def reading(self, form: str) -> Reading:
        """The reading of a form that is given."""
        if form == "text":
            return Reading("text", self._name("text", (), _is_text))
        if form in ("messages", "sharegpt"):
            return self._of_messages(self._name("messages", MESSAGES, _is_conversation))
        if form == "alpaca":
            names = self._name("prompt", (INSTRUCTION,), _is_text), self._name("answer", (OUTPUT,), _is_text)
        elif form == "preference":
            return self._of_preference(self._name("answer", (CHOSEN,), _is_said))
        else:
            names = self._name("prompt", PROMPTS, _is_said), self._name("answer", ANSWERS, _is_said)
        return self._of_pair(form, *names)

    def plain(self) -> Reading:
        """The one reading that the fields allow: a conversation in one field before what is put together of several. Raises ValueError where they allow none,
        or two."""
        whole = [self._of_messages(name) for name in MESSAGES if self.fits(name, _is_conversation)]
        known = [reading for reading in whole if self._values(reading.main)] or self._pairs() or whole
        if len(known) == 1:
            return known[0]
        if known:
            ways = ", or as ".join(reading.described for reading in known)
            raise ValueError(f"{self.source} can be read as {ways}; data.form=… (one of {', '.join(FORMS[1:])}) must say which, and data.messages_field=…, "
                             "data.prompt_field=…, data.answer_field=… where it is not enough")  # fmt: skip
        values = self._values(TEXT)
        has = f"{TEXT!r} there holds {shown(values[0])}" if values else "none of them is plainly a text or a conversation"
        raise ValueError(f"{self.source} has the fields {_listed(self.names)}, and {has}; data.text_field=… must name a text, or data.form=… (one of "
                         f"{', '.join(FORMS[1:])}) and its fields something else")  # fmt: skip

    def _pairs(self) -> list[Reading]:
        """Readings put together of two fields or more."""
        found = []
        if self.fits(INSTRUCTION, _is_text) and self.fits(OUTPUT, _is_text):
            found.append(self._of_pair("alpaca", INSTRUCTION, OUTPUT))
        if self.fits(CHOSEN, _is_said):
            found.append(self._of_preference(CHOSEN))
        prompts, answers = ([name for name in names if self.fits(name, _is_said)] for names in (PROMPTS, ANSWERS))
        is_alpaca = bool(found) and found[0].form == "alpaca"
        pairs = [(prompt, answer) for prompt in prompts for answer in answers if not (is_alpaca and prompt in (INSTRUCTION, INPUT) and answer == OUTPUT)]
        return found + [self._of_pair("prompt_answer", *pair) for pair in pairs]

    def _of_messages(self, name: str) -> Reading:
        first = next((turn for value in self._values(name) for turn in _given(value) if is_turn(turn)), {"role": ""})
        return self._with_others(Reading("messages" if isinstance(first.get("role"), str) else "sharegpt", name))

    def _of_pair(self, form: str, prompt: str, answer: str) -> Reading:
        return self._with_others(Reading(form, answer, prompt), *((INPUT, HISTORY) if form == "alpaca" else ()))

    def _of_preference(self, chosen: str) -> Reading:
        prompts = [name for name in PROMPTS if self.fits(name, _is_said)]
        usual = prompts[:1] if prompts[:1] == ["prompt"] else prompts
        prompt = self._name("prompt", usual, _is_said) if self.fields.prompt is not None or usual else None
        return self._with_others(Reading("preference", chosen, prompt))

    def _with_others(self, reading: Reading, *others: str) -> Reading:
        """With the fields that may stand beside: those of the usual names, too, that only later records have."""
        taken = (reading.main, reading.prompt)
        usual = [name for name in SYSTEMS if name not in taken and (name not in self.names or self.fits(name, _is_text))]
        system = (self._name("system", (), _is_text),) if self.fields.system is not None else tuple(usual)
        others = tuple(name for name in (TOOLS, *others) if name not in taken)
        seen = tuple(name for name in (*system, *others) if self._values(name))
        return Reading(reading.form, reading.main, reading.prompt, system, others, seen)

    def check_answers(self, reading: Reading) -> None:
        """Refuse conversations of questions alone where the answers stand in a field beside them. Raises ValueError."""
        turns = [turn for value in self._values(reading.main) for turn in _given(value) if is_turn(turn)]
        beside = [name for name in ANSWERS if name != reading.main and self._values(name) and self.fits(name, _is_said)]
        if turns and beside and not any(is_answer(turn) for turn in turns):
            raise ValueError(f"data.messages_field is {reading.main!r}; no turn there is the assistant's, and {self.source} has {_listed(beside)} beside it: "
                             f"data.form=prompt_answer data.prompt_field={reading.main} data.answer_field={beside[0]} reads both")  # fmt: skip
