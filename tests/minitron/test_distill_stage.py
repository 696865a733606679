"""The distill stage in several processes, by the command that users give."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

OWN = ("distill.train.optimizer=adamw", "distill.train.tokens=1536", "stage=distill")
NEEDS = ("data", "teacher", "score", "search", "prune")


@pytest.fixture(scope="module")
def prepared(walk, tmp_path_factory):
    """Copies what distill needs into a new runs folder; gives the settings that use it."""

    def prepare() -> tuple[Path, tuple[str, ...]]:
        folder = tmp_path_factory.mktemp("distill")
        for name in NEEDS:
            shutil.copytree(walk.runs / "store" / name, folder / "runs" / "store" / name)
        return folder, (f"runs_folder={folder / 'runs'}", *walk.settings[1:], *OWN)

    return prepare


@pytest.fixture(scope="module")
def accelerated(prepared, environment, repository):
    """Runs `accelerate launch --config_file conf/accelerate/<engine>_cpu.yaml -m minitron.run …`; gives its folder and end."""

    def run(engine: str, *settings: str) -> tuple[Path, subprocess.CompletedProcess]:
        folder, arguments = prepared()
        command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(repository / "conf" / "accelerate" / f"{engine}_cpu.yaml"),
                   "--main_process_port", "0", "-m", "minitron.run", *arguments, *settings]  # fmt: skip
        return folder, subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=240)

    return run


@pytest.fixture(scope="module")
def alone(prepared, door) -> Path:
    folder, arguments = prepared()
    finished = door(folder, *arguments)
    assert finished.returncode == 0, finished.stderr
    return folder


def stage_folder(folder: Path) -> Path:
    return next((folder / "runs" / "store" / "distill").glob("*/"))


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (stage_folder(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_two_processes_leave_the_student_of_one(engine, alone, accelerated):
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    folder, finished = accelerated(engine, "distill.train.micro_batch=1")
    assert finished.returncode == 0, finished.stderr
    assert f"{engine}, 2 processes" in finished.stdout and finished.stdout.count("KL 0.") == 1
    assert losses_of(folder) == pytest.approx(losses_of(alone), rel=1e-5) and len(losses_of(folder)) == 6
    assert stage_folder(folder).name == stage_folder(alone).name  # how many processes worked is no part of the key
    own, reference = (load_file(stage_folder(path) / "checkpoint" / "model.safetensors") for path in (folder, alone))
    assert own.keys() == reference.keys() and all(name.startswith(("backbone.", "lm_head.")) for name in own)
    assert max((own[name] - reference[name]).abs().max().item() for name in own) < 1e-4
    assert sorted(path.name for path in stage_folder(folder).iterdir()) == ["checkpoint", "done.json", "metrics.jsonl"]


def test_a_batch_that_two_processes_cannot_share_is_refused_in_one_line(accelerated):
    _, finished = accelerated("ddp", "distill.train.batch=5")
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert finished.returncode != 0 and "train.batch is 5; it must be a multiple of 2 processes; nearest: 4" in lines[0]


def test_every_line_of_the_metrics_tells_what_a_watcher_needs(alone):
    line = json.loads((stage_folder(alone) / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "cross_entropy", "top1_agreement", "gradient_norm", "learning_rate", "tokens_per_second", "memory_gib", "seconds_left"} <= set(line)
    assert 0 < line["top1_agreement"] < 1 and line["memory_gib"] > 0.1 and line["seconds_left"] == 0 and line["tokens_per_second"] > 1
