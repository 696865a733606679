"""The distill stage in several processes, by the command that users give."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

OWN = ("distill.train.optimizer=adamw", "distill.train.tokens=1536", "stage=distill")
NEEDS = ("data", "teacher", "score", "shortlist", "teacher_cache", "screen", "search", "prune")


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


PACKED = "distill.phases=[{tokens: 1200, rows: packed, sequence_length: 96, batch: 4}, {tokens: 700, rows: packed, blend: [{files: [notes.jsonl]}]}]"


def test_two_processes_learn_from_packed_rows_as_one_does(prepared, door_of_two, door, tmp_path):
    notes = "".join(json.dumps({"text": f"Note {number}: " + "the wind turns and the rain stays. " * (number % 5)}) + "\n" for number in range(300))
    (tmp_path / "notes.jsonl").write_text(notes)
    packed = PACKED.replace("notes.jsonl", str(tmp_path / "notes.jsonl"))
    own, arguments = prepared()
    finished = door(own, *arguments, packed)
    assert finished.returncode == 0, finished.stderr
    rows = [np.load(path) for path in (own / "runs" / "store" / "phase_rows").glob("*/*.npy")]
    assert sorted(some.shape[1] for some in rows) == [64, 96] and any((some < -1).sum() > 4 for some in rows)
    folder, arguments = prepared()
    finished = door_of_two("fsdp2", folder, *arguments, packed, "distill.train.micro_batch=1")
    assert finished.returncode == 0, finished.stderr
    assert losses_of(folder) == pytest.approx(losses_of(own), rel=1e-5) and len(losses_of(own)) >= 4


def test_a_hidden_state_term_is_trained_beside_the_kl(prepared, door):
    folder, arguments = prepared()
    finished = door(folder, *arguments, "distill.loss.hidden_weight=0.1")
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in (stage_folder(folder) / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0.1 * line["hidden_state"] > 0 for line in lines) and lines[-1]["hidden_state"] < lines[0]["hidden_state"]


# From the teacher cache.


@pytest.fixture(scope="module")
def whole_cache(prepared, door) -> tuple[Path, tuple[str, ...], list[float]]:
    """A cache of the whole vocabulary on all train rows, and then no teacher's weights; the losses are those beside the teacher, before."""
    folder, arguments = prepared()
    # Slowly: where the KL is down to a hundredth of a nat, it is rounding that is compared.
    arguments = (*arguments, "distill.train.tokens=60000", "distill.train.learning_rate=0.001", "screen.top_k=512")
    for stage in ("distill", "distill_cache"):
        finished = door(folder, *arguments, f"stage={stage}")
        assert finished.returncode == 0, finished.stderr
    losses = losses_of(folder)
    shutil.rmtree(folder / "runs" / "store" / "distill")
    (teacher,) = (folder / "runs" / "store" / "teacher").glob("*/")
    (weights,) = teacher.glob("checkpoint/*.safetensors")
    weights.unlink()
    record = json.loads((teacher / "done.json").read_text())  # as if nobody had vouched for it: else the walk would train it again
    (teacher / "done.json").write_text(json.dumps({name: value for name, value in record.items() if name not in ("files", "digest")}))
    return folder, arguments, losses


def check_same_path(found: list[float], losses: list[float]) -> None:
    """The cache holds float16 log-probabilities: steps differ by that rounding and by what grows of it, here and there a single one by more."""
    differences = sorted(abs(one / other - 1) for one, other in zip(found, losses, strict=True))
    assert len(losses) > 200 and differences[len(differences) // 2] < 2e-4 and differences[-1] < 1e-2


def test_a_student_learns_from_the_cache_of_a_teacher_that_is_gone(whole_cache, door):
    folder, arguments, losses = whole_cache
    assert door(folder, *arguments).returncode != 0, "the control: this wants the teacher itself"
    shutil.rmtree(folder / "runs" / "store" / "distill")
    finished = door(folder, *arguments, "distill.cached=true")
    assert finished.returncode == 0, finished.stderr
    check_same_path(losses_of(folder), losses)


def test_two_processes_learn_from_the_cache_as_one_does(whole_cache, door_of_two):
    folder, arguments, losses = whole_cache
    runs = tuple(setting for setting in arguments if not setting.startswith("runs_folder"))
    second = folder / "second"
    shutil.copytree(folder / "runs", second, ignore=shutil.ignore_patterns("distill"))
    finished = door_of_two("fsdp2", folder, f"runs_folder={second}", *runs, "distill.cached=true")
    assert finished.returncode == 0, finished.stderr
    (metrics,) = (second / "store" / "distill").glob("*/metrics.jsonl")
    check_same_path([json.loads(line)["loss"] for line in metrics.read_text().splitlines()], losses)


@pytest.mark.parametrize(("setting", "message"), [
    ("distill.temperature=2", "distill.temperature is 2.0, but distill.cached is true: the teacher cache serves only temperature 1.0"),
    ("distill.loss.divergence=jsd", "distill.loss.divergence is jsd, but distill.cached is true: the teacher cache serves only loss.divergence forward_kl"),
    ("distill.loss.hidden_weight=1", "distill.loss.hidden_weight is 1.0, but distill.cached is true: the teacher cache serves only loss.hidden_weight 0.0"),
    ("distill.held_out_every=2", "distill.held_out_every is 2, but distill.cached is true: the teacher cache serves only held_out_every null"),
    ("distill.phases=[{tokens: 2000}]", "distill.phases is given, but distill.cached is true: the teacher cache serves only phases []"),
])  # fmt: skip
def test_what_the_cache_does_not_serve_is_refused(door, tmp_path, setting, message):
    finished = door(tmp_path, "distill.cached=true", setting)
    assert finished.returncode == 2 and finished.stderr.strip() == f"error: {message}"
