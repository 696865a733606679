"""Processes for the trainer's engines."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

torch.set_num_threads(1)  # what is this small only loses by more
WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="session")
def worker() -> ModuleType:
    """tests/distill/worker.py, for the same run in this process."""
    spec = importlib.util.spec_from_file_location("worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def launch(fork_server, engine_environments) -> Callable[..., tuple[list[int], str]]:
    """Runs the worker in several processes under an engine; gives each one's exit code and what they printed."""

    def launched(engine: str, folder: Path, *, processes: int = 2, **arguments: object) -> tuple[list[int], str]:
        arguments = {"folder": str(folder), "plan": {}, **arguments}
        process = fork_server.start("worker", arguments, folder=folder, environment=engine_environments[engine], ranks=processes)
        stdout, stderr = process.communicate(timeout=900)
        return process.codes, stdout + stderr

    return launched
