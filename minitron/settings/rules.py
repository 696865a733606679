"""What every group of settings is made with: marks, checks and their plain values."""

from dataclasses import MISSING, field, fields, is_dataclass
from enum import Enum
from typing import Any


class Choice(Enum):
    """One of some words, which it is written as wherever text is made of it: `run_name='${scoring.criterion}'` is iterative_mse."""

    def __str__(self) -> str:
        return self.name


def how(default: Any) -> Any:
    """A setting that does not change results, so is left out of the stages' keys."""
    return field(default=default, metadata={"how": True})


def added(default: Any = MISSING, *, default_factory: Any = MISSING) -> Any:
    """A setting that came later than keys that are in use: left out of them while it has its default."""
    return field(default=default, default_factory=default_factory, metadata={"added": True})


def key_settings(settings: Any) -> Any:
    """A settings object as plain values, without what is marked `how`, and what is `added` only where it is not its default."""
    if is_dataclass(settings):
        return {f.name: key_settings(getattr(settings, f.name)) for f in fields(settings) if not f.metadata.get("how") and not _is_unused(f, settings)}
    if isinstance(settings, Enum):
        return settings.name
    if isinstance(settings, dict):
        return {key: key_settings(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [key_settings(value) for value in settings]
    return settings


def _is_unused(one: Any, settings: Any) -> bool:
    if not one.metadata.get("added"):
        return False
    default = one.default if one.default_factory is MISSING else one.default_factory()
    return getattr(settings, one.name) == default


def at_least(settings: Any, prefix: str, least: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ValueError(f"{prefix}.{name} is {value}; it must be at least {least}")


def check_share(name: str, value: float) -> None:
    """Refuse a share that is none."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be at least 0 and at most 1")


def check_kinds(name: str, numbers: dict[str, int | None]) -> None:
    """Refuse a mapping that names no kind of layer, or a negative number of them."""
    for kind, number in numbers.items():
        if kind not in ("mamba", "attention", "ffn", "moe"):
            raise ValueError(f"{name} names the kind {kind!r}; it must be mamba, attention, ffn or moe")
        if number is not None and number < 0:
            raise ValueError(f"{name}.{kind} is {number}; it must be at least 0")
