"""Real processes for the trainer's engines."""

import importlib.util
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
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


# What accelerate's launcher tells the processes of the configs in conf/accelerate, as test_engines.py checks.
ENGINES = {
    "ddp": {"ACCELERATE_MIXED_PRECISION": "no"},
    "fsdp2": {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero2": {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}

# Imports once, then runs every command in new processes (forks), one a rank.
_SERVER = """
import importlib.util, json, os, sys, traceback
spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
for line in sys.stdin:
    command = json.loads(line)
    ranks = []
    for rank in range(command["processes"]):
        child = os.fork()
        ranks.append(child)
        if child == 0:
            os.dup2(os.open(command["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1), os.dup2(1, 2)
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": command["processes"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": command["port"]}
            os.environ.update(command["environment"], **{name: str(value) for name, value in own.items()})
            code = 0
            try:
                worker.main(**command["arguments"])
            except BaseException as error:
                code = 2 if isinstance(error, ValueError) else 1
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]), flush=True)
"""


@pytest.fixture(scope="session")
def launch(environment, tmp_path_factory) -> Iterator[Callable[..., tuple[list[int], str]]]:
    """Runs the worker in several processes under an engine; gives each one's exit code and what they printed."""
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(WORKER)], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    outputs = tmp_path_factory.mktemp("launch")

    def launched(engine: str, folder: Path, *, processes: int = 2, **arguments: object) -> tuple[list[int], str]:
        output = outputs / f"{len(list(outputs.iterdir()))}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = {"processes": processes, "port": port, "environment": ENGINES[engine], "output": str(output),
                   "arguments": {"folder": str(folder), "plan": {}, **arguments}}  # fmt: skip
        server.stdin.write(json.dumps(command) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline()), output.read_text()

    yield launched
    server.stdin.close()
    server.wait(timeout=30)
