"""The door as users have it: real processes, the smallest settings that walk every stage, and one finished walk."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before torch is imported: waiting threads of several processes on two cores cost minutes, one thread each none.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPOSITORY = Path(__file__).resolve().parent.parent

# The teacher needs 343,488 bytes at this workload, the budget is 246,960: with two attention layers all the smallest of hidden
# 24 and none of 32 fit, whichever layers go, so the cut always hurts. The learning rate is high: a tiny teacher must learn something in 78 steps.
# The cut is the plain one, which can be compared with the teacher's weights and hurts enough to be repaired in 39 steps.
SMALL = (
    "device=cpu",
    "data.vocab=512", "data.sequence_length=64", "data.max_train_tokens=60000", "data.max_heldout_tokens=8000",
    "teacher.tiny.pattern='M-M*-M-*-M-'", "teacher.tiny.hidden=32", "teacher.tiny.ffn=64", "teacher.tiny.num_attention_heads=4",
    "teacher.tiny.num_key_value_heads=2", "teacher.tiny.attention_head_dim=8", "teacher.tiny.mamba_num_heads=8", "teacher.tiny.mamba_head_dim=8",
    "teacher.tiny.mamba_num_groups=2", "teacher.tiny.mamba_state_size=16", "teacher.train.tokens=20000", "teacher.train.learning_rate=0.1",
    "scoring.samples=8", "scoring.layer_samples=4",
    "workload.context_tokens=1024", "budget.device_gib=0.00023", "budget.cushion_fraction=0", "budget.set_aside_gib=0",
    "search.layers={low: 8, high: 11, step: 1}", "search.hidden={low: 24, high: 32, step: 8}", "search.ffn={low: 48, high: 64, step: 16}",
    "search.mamba_heads={low: 4, high: 8, step: 2}", "search.floors={attention: 2}", "search.shortlist_size=3", "search.screen_samples=4",
    "search.finalists=2", "screen.train.tokens=2000", "screen.train.learning_rate=0.005", "screen.new_tokens=4", "depth_lap.enabled=false",
    "prune.method=slice", "distill.train.tokens=10000", "distill.train.learning_rate=0.005",
    "screen.prompt_tokens=8", "evaluate.samples=8", "evaluate.speed=[{input_tokens: 8, output_tokens: 4, batch: 1}]",
    "evaluate.needle={lengths: [64], depths: 2, samples: 2, alternatives: 4}",
)  # fmt: skip

# Imports once, then runs every command it is sent in a process of its own (a fork), as `python -m minitron.run` would.
_SERVER = """
import json, os, sys, traceback
sys.argv = ["run.py"]
import minitron.run
from minitron.walk import pipeline
from minitron.text import tokenise as data
from minitron.training import distillation as distill, tiny_teacher as teacher
from minitron.stages import distill_cache
from minitron.measures import evaluation as evaluate
from minitron.hand_over import export, merge
from minitron.generation import answer as generate
from minitron.pruning import disk_to_disk as prune
from minitron.report import files as report
from minitron.importance import scoring as score
from minitron.search import screen, choice as search, shortlist
from minitron.training import teacher_cache
from minitron.search import zero_shot
from transformers.models.nemotron_h import modeling_nemotron_h
for line in sys.stdin:
    command = json.loads(line)
    child = os.fork()
    if child == 0:
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(command["folder"])
        sys.argv[1:] = command["arguments"]
        try:
            code = minitron.run.main()
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.strip()]


@dataclass(frozen=True, slots=True)
class Walk:
    """A finished `stage=all`: where its runs folder is and how the command ended."""

    runs: Path
    settings: tuple[str, ...]
    finished: Finished

    @property
    def summary(self) -> dict:
        return json.loads((self.runs / "tiny" / "summary.json").read_text())

    def stage_folder(self, stage: str) -> Path:
        return Path(self.summary["stages"][stage]["path"])

    def checkpoint(self, model: str) -> Path:
        return Path(self.summary["models"][model]["path"])


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """What child processes get: one thread each, offline, this checkout's code and nothing that changes a run."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HYDRA", "WANDB", "TRANSFORMERS", "FORCE_COLOR"))}
    return own | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def small_settings() -> tuple[str, ...]:
    return SMALL


@pytest.fixture(scope="session")
def start(environment) -> Callable[..., subprocess.Popen]:
    """Starts `python -m minitron.run …` in a folder, and returns at once."""

    def started(folder: Path, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "minitron.run", *arguments], cwd=folder, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    return started


@pytest.fixture(scope="session")
def run_process(start) -> Callable[..., Finished]:
    """Runs `python -m minitron.run …` in a folder to its end."""

    def run(folder: Path, *arguments: str) -> Finished:
        before = time.monotonic()
        process = start(folder, *arguments)
        stdout, stderr = process.communicate(timeout=900)
        return Finished(process.returncode, stdout, stderr, time.monotonic() - before)

    return run


@pytest.fixture(scope="session")
def door(environment, tmp_path_factory) -> Iterator[Callable[..., Finished]]:
    """The same as run_process without the seconds of imports: each command is a fork of a process that has imported."""
    server = subprocess.Popen([sys.executable, "-c", _SERVER], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    output = tmp_path_factory.mktemp("door")

    def run(folder: Path, *arguments: str) -> Finished:
        before = time.monotonic()
        files = {name: str(output / name) for name in ("stdout", "stderr")}
        server.stdin.write(json.dumps({"folder": str(folder), "arguments": arguments, **files}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return Finished(code, *(Path(files[name]).read_text() for name in ("stdout", "stderr")), time.monotonic() - before)

    yield run
    server.stdin.close()
    server.wait(timeout=30)


@pytest.fixture(scope="session")
def walk(run_process, tmp_path_factory) -> Walk:
    """One walk from nothing to the report by the real command."""
    folder = tmp_path_factory.mktemp("walk")
    settings = (f"runs_folder={folder / 'runs'}", *SMALL)
    return Walk(folder / "runs", settings, run_process(folder, *settings))


@pytest.fixture(scope="session")
def done_folders() -> Callable[[Path], set[Path]]:
    """The stage folders of a runs folder that say they are whole."""

    def folders(runs: Path) -> set[Path]:
        return {path.parent for path in runs.glob("store/*/*/done.json")}

    return folders


@pytest.fixture(scope="session")
def published_patterns() -> tuple[str, str]:
    """Patterns of NVIDIA's 12B teacher and 9B student (arXiv 2508.14444)."""
    return (
        "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    )


@pytest.fixture(scope="session")
def published_order() -> Sequence[int]:
    """An order of removal that gives the published student at 56 layers with 4 attention layers, and reaches 52."""
    return (7, 52, 16, 8, 23, 24, 48, 3, 10, 31, 32)
