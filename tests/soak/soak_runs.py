"""One run under a fault: started, disturbed, watched to its end, and what of its end is wrong."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from soak_faults import Fault

DEADLOCK_SECONDS = 600.0
GONE_SECONDS = 20.0  # in which processes that a killed run has left must be gone


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    fault: Fault | None
    hangs: bool = False

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.strip()]

    @property
    def was_hit(self) -> bool:
        """Whether the fault came before the run was through; a harmless one always does."""
        return self.fault is not None and (self.fault.harmless or self.code != 0)

    def wrong(self) -> list[str]:
        """What is wrong with the end itself: it did not come, its code, or more than one line."""
        lines, fault = self.error_lines, self.fault
        lines = list(dict.fromkeys(lines)) if fault and fault.processes > 1 else lines
        if self.hangs:
            return [f"no end after {DEADLOCK_SECONDS:.0f} s"]
        if self.code == 0:
            return [f"a run that went well says on stderr: {lines}"] * bool(lines)
        if fault is None or fault.harmless:
            return [f"exit code {self.code} without cause: {lines[-3:]}"]
        if self.code not in fault.codes:
            return [f"exit code {self.code}, not one of {fault.codes}: {lines[-3:]}"]
        begins = {-signal.SIGKILL: None, 130: "interrupted; "}.get(self.code, "error: ")
        if begins is None:
            return [f"killed, it has said on stderr: {lines}"] * bool(lines)
        return [f"not one line that begins {begins!r}: {lines}"] * (len(lines) != 1 or not lines[0].startswith(begins))


class Run:
    """A run that has been started; `start` gives a process as forks.Forked is one."""

    def __init__(self, start: Callable, folder: Path, arguments: Sequence[str], runs: Path, fault: Fault | None = None, log: Path | None = None, **how):
        self.fault, self.folder = fault, folder
        environment = {"SOAK_UNDER": str(runs)} | (dict(fault.environment) if fault else {}) | ({"SOAK_LOG": str(log)} if log else {})
        self.started = time.monotonic()
        self.process = start(arguments, folder=folder, environment=environment, **how)
        self.said, self.first_word = ["", ""], threading.Event()
        self.readers = [threading.Thread(target=self._read, args=(number,), daemon=True) for number in (0, 1)]
        for reader in self.readers:
            reader.start()
        self.disturber = threading.Thread(target=self._disturb, daemon=True)
        self.disturber.start()

    def _read(self, number: int) -> None:
        stream = (self.process.stdout, self.process.stderr)[number]
        for line in stream:
            self.said[number] += line
            self.first_word.set()
            if number == 0 and self.fault and self.fault.leaves:
                break
        self.first_word.set()
        stream.close()

    def _disturb(self) -> None:
        """Sends the signal so many seconds after the door hears it, which Python itself does not do in one line."""
        if self.fault is None or not self.fault.signal:
            return
        while not self.first_word.is_set() and not all(map(_hears, getattr(self.process, "pids", [self.process.pid]))):
            time.sleep(0.005)
        time.sleep(self.fault.seconds)
        self.process.send_signal(self.fault.signal)

    def end(self) -> Ended:
        """Waits for its end; one that does not come is brought about."""
        hangs = False
        try:
            self.process.wait(max(1.0, self.started + DEADLOCK_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            hangs = True
            self.process.kill()
            self.process.wait(30)
        for reader in self.readers:
            reader.join(30)
        return Ended(self.process.returncode, *self.said, time.monotonic() - self.started, self.fault, hangs)


def _hears(pid: int) -> bool:
    """Whether a process catches SIGTERM, as its system says."""
    try:
        said = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(said.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)


def left_behind(folder: Path) -> list[str]:
    """Processes that still work in a folder, once they have had time to go."""
    deadline = time.monotonic() + GONE_SECONDS
    while (found := _working_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [f"process {pid} is left over" for pid in found]


def _working_in(folder: Path) -> list[str]:
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if Path(os.readlink(link)) == folder:
                found.append(link.parent.name)
        except OSError:  # it has gone, or is not ours
            continue
    return found


def bring_back(folders: Sequence[Path]) -> None:
    """Puts folders that have vanished where they were, in the place of what was made there since."""
    for folder in folders:
        away = folder.with_name(f"{folder.name}.vanished")
        if away.exists():
            shutil.rmtree(folder, ignore_errors=True)
            away.rename(folder)
