"""Settings for who calls from Python: values as Python has them to the command line's words, and every refusal a ValueError in one line."""

import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from minitron.door.command import check_teacher_overrides
from minitron.door.composed import compose_settings
from minitron.door.mistakes import one_line
from minitron.settings.names import setting_groups
from minitron.settings.run import Settings
from minitron.settings.words import quoted

PLAIN = re.compile(r"(?!(null|true|false)$)[\w./@+~-]+", re.IGNORECASE)  # text that the command line reads as it is


def settings_from(words: Sequence[str], *, config_dir: str | None = None, processes: int = 1) -> Settings:
    """The settings of these words, `config_dir` a folder with an experiment/ of one's own. Raises ValueError, in one line, for whatever is wrong with them."""
    try:
        made = compose_settings(*words, config_dir=config_dir, processes=processes)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_line(error)) from error
    check_teacher_overrides(made, words)
    return made


def words_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`key=value` for each value; a mapping in place of a group of settings is that group's. Raises ValueError for a value that no setting takes."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name in setting_groups():
            yield from words_of(value, f"{name}.")
        else:
            yield f"{name}={_written(name, value)}"


def _written(name: str, value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Integral | Real):
        return str(int(value) if isinstance(value, Integral) else float(value))
    if isinstance(value, str | PathLike):
        text = str(fspath(value))
        return text if PLAIN.fullmatch(text) else quoted(text)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(name, one)}" for key, one in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_written(name, one) for one in value) + "]"
    raise ValueError(f"{name} is {value!r}; it must be text, a number, true or false, None, or a list or mapping of such")
