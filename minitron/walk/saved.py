"""What a run was asked for, kept beside its report, so that its name alone is enough to use what it made."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from minitron.settings.run import Settings, Stage
from minitron.walk.store import locked, unwritable, write_text

SETTINGS_FILE = "settings.yaml"


def save_settings(settings: Settings, say: Callable[[str], None]) -> None:
    """Every setting of a run that goes through stages, with what followed from the model and the budget. Where they cannot be kept, `say` tells so: what is
    done can be read from a disk that cannot be written to."""
    if settings.stage is Stage.merge or (settings.stage is Stage.screen and settings.candidate is not None):
        return  # one of several that run at once under one name
    folder = Path(settings.runs_folder) / settings.run_name
    if reason := unwritable(folder):
        say(f"{folder} cannot be written to ({reason}): no report will stand there")
        return
    with locked(folder, lambda _text: None):  # two runs of one name may begin at once
        write_text(folder / SETTINGS_FILE, yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
