"""Configs of published and tiny models, by file name; no weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from memory_budget.__main__ import main
from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config

CONFIGS = Path(__file__).parent / "configs"


@pytest.fixture
def config_path() -> Callable[[str], Path]:
    """Path of a config file by its name without .json."""
    return lambda name: CONFIGS / f"{name}.json"


@pytest.fixture
def config_of(config_path) -> Callable[[str], dict]:
    """A fresh config dict by name."""
    return lambda name: json.loads(config_path(name).read_text())


@pytest.fixture
def architecture_of(config_of) -> Callable[[str], Architecture]:
    """An architecture by its config's name."""
    return lambda name: architecture_from_config(config_of(name))


@pytest.fixture
def refused(capsys):
    """Runs the command here and gives the one line that it refuses with."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert end.value.code == 2 and said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
        return said.err

    return run
