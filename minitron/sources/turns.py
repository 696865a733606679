"""Turns of a conversation as data sets write them, made the one way that chat templates take: {role, content, …}."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Turn = dict[str, Any]
# What data sets call those who speak. A role that stands under `role` and not here stays as it is: a template may know it.
ROLES = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt"),
    "system": ("system",),
    "tool": ("tool", "observation", "function_response"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
CALL = "function_call"
INSTRUCTS = ("system", "developer")


class MissingField(ValueError):
    """A record without the field that is wanted, or with something else in it: the settings or the source are wrong."""


class Refused(ValueError):
    """A record that is no conversation to train on; others of its source may be."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns {role, content, …} for a chat template, at least one of them the assistant's, and the JSON schemas of tools it may call."""

    messages: list[Turn]
    tools: list | None = None


def shown(value: Any) -> str:
    """A value in a line: what it is and how it begins."""
    return f"{type(value).__name__}: {' '.join(str(value)[:200].split())[:40]}"


def read_json(value: Any) -> Any:
    """What a JSON text holds; anything else, and a text that is no JSON, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def is_turn(value: Any) -> bool:
    """Whether it is {role, …} or {from, …}."""
    return isinstance(value, Mapping) and any(isinstance(value.get(name), str) for name in ("role", "from"))


def is_answer(turn: Mapping[str, Any]) -> bool:
    """Whether a turn {role, …} or {from, …} is the assistant's."""
    who = turn["role"] if isinstance(turn.get("role"), str) else turn["from"]
    return who.strip().lower() in (*ROLES["assistant"], CALL)


def turns_of(values: Sequence[Any]) -> list[Turn]:
    """{role, content, …} of every {role, content, …} or {from, value}. Raises Refused for what is neither, and for a `from` that is not known."""
    return [_turn(value, f"turn {number}") for number, value in enumerate(values, 1)]


def _turn(value: Any, where: str) -> Turn:
    if not is_turn(value):
        raise Refused(f"{where} is {shown(value)}; it must be {{role, content}} or {{from, value}}")
    if not isinstance(value.get("role"), str):
        return _shared(value, where)
    calls = read_json(value.get("tool_calls"))
    others = {name: other for name, other in value.items() if name != "tool_calls"}
    calls = {"tool_calls": [_with_arguments(call) for call in calls]} if isinstance(calls, list | tuple) and calls else {}
    return others | {"role": ROLE_OF.get(value["role"].strip().lower(), value["role"])} | calls


def _shared(value: Mapping[str, Any], where: str) -> Turn:
    """A turn {from, value}, as ShareGPT's data sets have it."""
    who = value["from"].strip().lower()
    if "value" not in value:
        raise Refused(f"{where}, from {value['from']!r}, has no value; it must be {{from, value}}")
    if who == CALL:
        given = read_json(value["value"])
        calls = given if isinstance(given, list) else [given]
        if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
            raise Refused(f"{where}, from {CALL!r}, holds {shown(value['value'])}; it must be JSON of {{name, arguments}} or a list of those")
        return {"role": "assistant", "content": "", "tool_calls": [_with_arguments({"type": "function", "function": dict(call)}) for call in calls]}
    if who not in ROLE_OF:
        raise Refused(f"{where} is from {value['from']!r}; it must be one of {', '.join([*ROLE_OF, CALL])}")
    return {"role": ROLE_OF[who], "content": value["value"]}


def _with_arguments(call: Any) -> Any:
    """A call of a tool with its arguments as a dict: templates write JSON of them, which of a text would be JSON twice."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    arguments = read_json(inner.get("arguments")) if isinstance(inner, Mapping) else None
    if not isinstance(arguments, Mapping):
        return call
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def conversation(turns: Sequence[Turn], system: str | None, tools: Any) -> Conversation:
    """Turns with the system's before them, unless they have one. Raises Refused where no turn is the assistant's, and for tools that are no list of schemas."""
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise Refused(f"no turn is the assistant's, so there is nothing to learn; the roles are {', '.join(dict.fromkeys(roles))}")
    before = [{"role": "system", "content": system}] if system and system.strip() and not set(roles) & set(INSTRUCTS) else []
    return Conversation([*before, *turns], _tools(tools))


def _tools(value: Any) -> list | None:
    given = read_json(value) if value != "" else None
    if given is None or given == []:
        return None
    if not isinstance(given, list | tuple) or not all(isinstance(tool, Mapping) for tool in given):
        raise Refused(f"its tools are {shown(value)}; they must be a list of JSON schemas, or JSON of one")
    return list(given)
