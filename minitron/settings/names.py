"""The names of all settings with what each takes, found from the dataclasses; and which of some names is nearest to one that was mistyped."""

from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from minitron.settings.run import Settings

ALIKE, LEAST_PREFIX = 0.7, 3  # SequenceMatcher's ratio from which a name is near; letters of a beginning that says which name is meant


@cache
def setting_types() -> dict[str, Any]:
    """Dotted name → type of every setting that holds a value, None left out of unions."""
    return {name: kind for name, kind in _settings(Settings, "") if not is_dataclass(kind)}


@cache
def setting_groups() -> dict[str, Any]:
    """Dotted name → dataclass of every group of settings."""
    return {name: kind for name, kind in _settings(Settings, "") if is_dataclass(kind)}


def is_setting(name: str) -> bool:
    """Whether a dotted name is a setting, a group of them, or stands in a mapping with keys of its own."""
    types = setting_types()
    return name in types or name in setting_groups() or get_origin(types.get(name.rpartition(".")[0])) is dict


def _settings(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    types = get_type_hints(kind)
    for field in fields(kind):
        name, own = f"{prefix}{field.name}", _without_none(types[field.name])
        yield name, own
        if is_dataclass(own):
            yield from _settings(own, f"{name}.")


def _without_none(kind: Any) -> Any:
    if get_origin(kind) not in (Union, UnionType):
        return kind
    (kind,) = (one for one in get_args(kind) if one is not NoneType)
    return kind


def nearest(name: str, names: Collection[str]) -> str | None:
    """The name that `name` was probably meant to be; None where none is near."""
    lower = {one.lower(): one for one in names}
    word = name.lower()
    begun = [one for one in lower if len(word) >= LEAST_PREFIX and one.startswith(word)]
    if begun:
        return lower[min(begun, key=len)]
    best = max(lower, key=lambda one: SequenceMatcher(None, word, one).ratio(), default=None)
    return lower[best] if best and SequenceMatcher(None, word, best).ratio() >= ALIKE else None


def did_you_mean(name: str, names: Collection[str]) -> str:
    """`; did you mean NAME?`, or nothing where no name is near."""
    near = nearest(name, names)
    return f"; did you mean {near}?" if near else ""


def no_setting(name: str) -> str:
    """What is said of a name that is no setting."""
    known = [*setting_types(), *setting_groups()]
    last = name.rpartition(".")[2]
    same = sorted((one for one in known if one.rpartition(".")[2] == last), key=lambda one: (-SequenceMatcher(None, name, one).ratio(), one))
    same = [one for one in same if one.split(".")[0] == name.split(".")[0]] or same
    near = nearest(name, known)
    if same and (near is None or not _close(name, near)):
        near = " or ".join(same[:2])
    return f"{name} is no setting" + (f"; did you mean {near}?" if near else "; --cfg job lists them all")


def _close(name: str, near: str) -> bool:
    """Apart by a slip of the fingers."""
    return SequenceMatcher(None, name, near).ratio() > 0.9
