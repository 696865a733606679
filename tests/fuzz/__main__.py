"""`make fuzz`: mutated files, words and replies, each through the code that a user's would go through; a table of counts, and the first case of every finding.

A case ends in an answer or in one line, within SECONDS of computing (MOST_TIMES as many where it waits, as it does for a disk that others use) and a GiB.
Cases follow from the seed, the surface and a number alone: `--only SURFACE-NUMBER` does one again, with its trace. Exit code 1 where anything was found.
docs/security.md
"""

import argparse
import contextlib
import io
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import fuzz_models  # noqa: E402
import fuzz_stored  # noqa: E402
import fuzz_text  # noqa: E402
import fuzz_words  # noqa: E402

from minitron.door.mistakes import users_mistakes  # noqa: E402

SECONDS, MOST_TIMES, ROOM_BYTES, MOST_SHOWN = 10, 6, 2**30, 3
# What makes a case of a folder, and of how many parts of --count it gets one: those that take 10 ms or more get a tenth.
SURFACES: dict[str, tuple[Callable, int]] = {
    "config.json": (fuzz_models.config_json, 1),
    "safetensors headers": (fuzz_models.safetensors, 1),
    "index": (fuzz_models.index, 1),
    "gguf headers": (fuzz_models.gguf, 1),
    "export_config": (fuzz_models.export_config, 1),
    "documents": (fuzz_text.documents, 1),
    "chat templates": (fuzz_text.templates, 10),
    "tokenizer.json": (fuzz_text.tokenizer_json, 10),
    "store": (fuzz_stored.store, 1),
    "saved states": (fuzz_stored.states, 1),
    "settings, as typed": (fuzz_words.words, 1),
    "settings, composed": (fuzz_words.composition, 10),
    "replies of a server": (fuzz_words.replies, 10),
}
COUNTS = struct.Struct("<6Qd")


@dataclass(slots=True)
class Counts:
    """Kept where parent and child both see it: the case at work, how others ended, the slowest, memory that the child began with and had at most."""

    at: int = 0
    answered: int = 0
    refused: int = 0
    found: int = 0
    base_bytes: int = 0
    peak_bytes: int = 0
    slowest: float = 0.0

    def write(self, shared: mmap.mmap) -> None:
        shared[: COUNTS.size] = COUNTS.pack(self.at, self.answered, self.refused, self.found, self.base_bytes, self.peak_bytes, self.slowest)

    @classmethod
    def read(cls, shared: mmap.mmap) -> "Counts":
        return cls(*COUNTS.unpack(shared[: COUNTS.size]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="cases of a surface, a tenth of it for the slow ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--surface", action="append", choices=list(SURFACES), help="this one alone; may be given again")
    parser.add_argument("--only", metavar="SURFACE-NUMBER", help="one case, with its trace")
    options = parser.parse_args()
    if options.only:
        name, _, number = options.only.rpartition("-")
        with _folder() as folder:
            print(_one(SURFACES[name][0](folder), random.Random(f"{options.seed}-{name}-{number}")))
        return 0
    total, begun = 0, time.monotonic()
    print(f"seed {options.seed}\n| surface | cases | answered | refused in a line | findings | slowest (s) | memory above the start (MiB) |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for name in options.surface or SURFACES:
        counts = surface(name, options.count // SURFACES[name][1], options.seed)
        total += counts.found
        above = max(0, counts.peak_bytes - counts.base_bytes) / 2**20
        print(f"| {name} | {counts.at:,} | {counts.answered:,} | {counts.refused:,} | {counts.found:,} | {counts.slowest:.2f} | {above:,.0f} |", flush=True)
    print(f"findings = {total} ({time.monotonic() - begun:,.0f} s)")
    return 1 if total else 0


def surface(name: str, count: int, seed: int) -> Counts:
    """All cases of one, in a child process; one that hangs or dies is a finding, and another child goes on behind it."""
    shared = mmap.mmap(-1, COUNTS.size)
    Counts().write(shared)
    with _folder() as folder:
        while Counts.read(shared).at < count:
            child = os.fork()
            if child == 0:
                os._exit(_child(name, folder, count, seed, shared, os.getppid()))
            ended = _watched(child, shared)
            if ended != 0:
                counts = Counts.read(shared)
                print(f"  {name}-{counts.at}: {'hangs' if ended == -signal.SIGKILL else f'ends the process ({ended})'}", flush=True)
                counts.at, counts.found = counts.at + 1, counts.found + 1
                counts.write(shared)
    return Counts.read(shared)


def _watched(child: int, shared: mmap.mmap) -> int:
    """Its exit code; a child whose case waits, or is deaf to the alarm, is killed. One that would compute and is not let does not wait."""
    at, looked, waited, begun = -1, time.monotonic(), 0.0, 0.0
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        now, last, spent = Counts.read(shared).at, looked, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        looked = time.monotonic()
        if now != at:
            at, waited, begun = now, 0.0, spent
        waited += (looked - last) * (fields[0] != "R")
        if max(waited, spent - begun) > MOST_TIMES * (1 if at else 3) * SECONDS:  # the first waits for what is loaded
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(ended[1])


def _child(name: str, folder: Path, count: int, seed: int, shared: mmap.mmap, parent: int) -> int:
    counts, seen = Counts.read(shared), {}
    try:
        case = SURFACES[name][0](folder)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + ROOM_BYTES, resource.RLIM_INFINITY))
        signal.signal(signal.SIGPROF, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {SECONDS} s")))
        counts.base_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for number in range(counts.at, count):
            if os.getppid() != parent:  # which was stopped
                return 130
            begun = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                end = _one(case, random.Random(f"{seed}-{name}-{number}"))
            except KeyboardInterrupt:
                return 130
            except BaseException as error:  # all that is neither an answer nor a line is a finding
                signal.setitimer(signal.ITIMER_PROF, 0)
                end = "found"
                where = traceback.extract_tb(error.__traceback__)
                ours = [frame for frame in where if "/tests/fuzz/" not in frame.filename and "site-packages" not in frame.filename] or where
                kind = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
                seen[kind] = seen.get(kind, 0) + 1
                if seen[kind] <= MOST_SHOWN:
                    print(f"  {name}-{number}: {kind}: {str(error)[:200]!r}", flush=True)
            signal.setitimer(signal.ITIMER_PROF, 0)
            counts.at, counts.slowest = number + 1, max(counts.slowest, time.process_time() - begun)
            setattr(counts, end, getattr(counts, end) + 1)
            counts.peak_bytes = max(counts.peak_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            counts.write(shared)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _one(case: Callable, chance: random.Random) -> str:
    """How a case ends, "answered" or "refused". Raises whatever is neither, and AssertionError for a refusal of several lines and for a library's panic."""
    said, end = io.StringIO(), None
    with open(os.memfd_create("past"), "rb") as file, _outputs_to(file.fileno()):
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                with users_mistakes():
                    case(chance)
            except SystemExit as error:
                end = error
        past = os.pread(file.fileno(), 1000, 0).decode(errors="replace")  # written by other languages' code
    line = said.getvalue()
    if end is not None and (end.code not in (1, 2) or not line.startswith("error: ") or line.count("\n") != 1 or len(line) > 3000 or past):
        raise AssertionError(f"exit code {end.code}: {past}{line[:500]}") from end
    assert "panicked at" not in past, past
    return "answered" if end is None else "refused"


@contextlib.contextmanager
def _outputs_to(file: int) -> Iterator[None]:
    before = os.dup(1), os.dup(2)
    try:
        os.dup2(file, 1)
        os.dup2(file, 2)
        yield
    finally:
        for number, one in enumerate(before, 1):
            os.dup2(one, number)
            os.close(one)


def _folder() -> tempfile.TemporaryDirectory:
    class Folder(tempfile.TemporaryDirectory):
        def __enter__(self) -> Path:
            return Path(super().__enter__())

    return Folder(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None, ignore_cleanup_errors=True)


if __name__ == "__main__":
    sys.exit(main())
