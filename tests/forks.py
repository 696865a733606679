"""One process that imports torch and the stages once and then forks for every command: the seconds of imports are paid once.

A fork does as a fresh process would: working folder, environment, output, signals, random numbers and exit code are its own, and the process it is
forked from does nothing but import and fork. What a fresh interpreter itself is the claim of (what is imported, what is read at the first import,
joblib's own processes, the launcher of accelerate) is no matter for a fork.

`ForkServer` is the tests' side. Run as a script, this file is the other side.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

WORKER = Path(__file__).parent / "distill" / "worker.py"
HEADER = struct.Struct("I")  # the length of the job that follows; the file descriptors travel with it


class Forked:
    """A command that runs, as subprocess.Popen shows one; with several ranks `pids` and `codes` have an entry for each."""

    def __init__(self, reply: int, stdout: int, stderr: int) -> None:
        self._reply = open(reply, "rb", buffering=0)  # noqa: SIM115 unbuffered: what select says is then the truth
        self.stdout, self.stderr = (open(number, encoding="utf-8") for number in (stdout, stderr))  # noqa: SIM115
        self.pids: list[int] = json.loads(self._reply.readline())
        self.codes: list[int] | None = None

    @property
    def pid(self) -> int:
        return self.pids[0]

    @property
    def returncode(self) -> int | None:
        return None if self.codes is None else next((code for code in self.codes if code), 0)

    def poll(self) -> int | None:
        if self.codes is None and select.select([self._reply], [], [], 0)[0]:
            self.codes = json.loads(self._reply.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.codes is None and not select.select([self._reply], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a fork", timeout)
        return self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left to read of its output and its errors, once it has ended."""
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(self.stderr.read()), daemon=True)
        reader.start()
        with self._killed_after(timeout):
            output = self.stdout.read()
            reader.join()
            self.wait()
        for file in (self.stdout, self.stderr, self._reply):
            file.close()
        return output, errors[0]

    @contextlib.contextmanager
    def _killed_after(self, timeout: float | None):
        """A command that does not end ends here, and the test with it."""
        late = threading.Event()
        timer = threading.Timer(timeout or 900, lambda: (late.set(), self.kill()))
        timer.daemon = True
        timer.start()
        yield
        timer.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired("a fork", timeout)

    def send_signal(self, number: int) -> None:
        for pid in self.pids if self.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that forks, from its first job to `close`."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen([sys.executable, "-P", __file__, str(theirs.fileno())], env=environment, pass_fds=[theirs.fileno()],
                                             stdin=subprocess.DEVNULL)  # fmt: skip

    def start(self, call: str, arguments: Sequence[str] | dict, *, folder: Path, environment: dict[str, str] | None = None, ranks: int = 0) -> Forked:
        """Starts one of CALLS, with `environment` beside the server's; as the so many processes of a launch where `ranks` are given."""
        job = {"call": call, "arguments": arguments, "folder": str(folder), "environment": environment or {}, "ranks": ranks}
        if ranks:
            job["environment"] = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **job["environment"]}
        pipes = [os.pipe() for _ in range(3)]
        message = json.dumps(job).encode()
        socket.send_fds(self._channel, [HEADER.pack(len(message))], [write for _, write in pipes])
        self._channel.sendall(message)
        for _, write in pipes:
            os.close(write)
        return Forked(*(read for read, _ in pipes))

    def close(self) -> None:
        self._channel.close()
        self._process.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Of a command started in the foreground: one in the background would ignore SIGINT, as the process that forks does.
FOREGROUND = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}


# The other side.


def door(arguments: list[str]) -> int:
    """`python -m minitron.run …`"""
    import minitron.run

    sys.argv = [minitron.run.__file__, *arguments]
    return minitron.run.main()


def worker(arguments: dict) -> int:
    """tests/distill/worker.py; a user's mistake ends in 2, as at the door."""
    import traceback

    try:
        sys.modules["worker"].main(**arguments)
    except ValueError:
        traceback.print_exc()
        return 2
    return 0


def snippet(arguments: list[str]) -> int:
    """`python -c …`"""
    code, *sys.argv[1:] = arguments
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    return 0


CALLS = {call.__name__: call for call in (door, worker, snippet)}


def import_once() -> None:
    """Every module that computes, the one that draws, and the worker; no threads are started and no random numbers drawn by it."""
    import importlib.util
    import pkgutil

    for package in ("minitron", "distill"):
        for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401 with its fonts, which every report's plots take
    from transformers.models.nemotron_h import modeling_nemotron_h  # noqa: F401

    spec = importlib.util.spec_from_file_location("worker", WORKER)
    sys.modules["worker"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["worker"])


def run_job(job: dict, stdout: int, stderr: int) -> NoReturn:
    """In the fork: becomes what a fresh process would be, does the job and ends."""
    import atexit
    import random

    import numpy as np
    import torch

    code = 1
    try:
        os.dup2(stdout, 1), os.dup2(stderr, 2)
        for number, handler in FOREGROUND.items():
            signal.signal(number, handler)
        os.chdir(job["folder"])
        os.environ.update(job["environment"])
        random.seed(), np.random.seed(), torch.seed()
        code = CALLS[job["call"]](job["arguments"])
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush(), sys.stderr.flush()
    if code == -signal.SIGINT:  # nobody has caught it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def supervise(job: dict, reply: int, stdout: int, stderr: int) -> NoReturn:
    """Forks for every rank of a job and tells their ids, and in the end their exit codes."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    children = []
    for rank in range(max(job["ranks"], 1)):
        child = os.fork()
        if child == 0:
            os.close(reply)
            if job["ranks"]:
                job["environment"] |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            run_job(job, stdout, stderr)
        children.append(child)
    os.close(stdout), os.close(stderr)
    os.write(reply, json.dumps(children).encode() + b"\n")
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    with contextlib.suppress(BrokenPipeError):  # who asked has gone
        os.write(reply, json.dumps(codes).encode() + b"\n")
    os._exit(0)


def serve(channel: socket.socket) -> None:
    import gc

    import_once()
    gc.freeze()  # or the first collection of every fork would copy all that is shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors leave nothing to wait for
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, and they close the channel
    while True:
        header, files, *_ = socket.recv_fds(channel, HEADER.size, 3)
        if not header:
            return
        message = b""
        while len(message) < HEADER.unpack(header)[0]:
            message += channel.recv(HEADER.unpack(header)[0] - len(message))
        if os.fork() == 0:
            channel.close()
            supervise(json.loads(message), *files)
        for file in files:
            os.close(file)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
