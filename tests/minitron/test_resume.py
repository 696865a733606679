"""Ctrl-C during training: what was done is kept, and the same command ends where an uninterrupted one does."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest


def metrics_of(runs: Path) -> list[str]:
    path = next(runs.glob("store/teacher/*/metrics.jsonl"), None)
    return path.read_text().splitlines() if path else []


@pytest.fixture(scope="module")
def interrupted(walk, start, door, tmp_path_factory):
    """(runs folder, exit code, stderr, steps' lines before) of a walk's teacher stopped by SIGINT, and the second sitting's end."""
    folder = tmp_path_factory.mktemp("resume")
    runs = folder / "runs"
    shutil.copytree(walk.runs / "store" / "data", runs / "store" / "data")
    process = start(folder, f"runs_folder={runs}", *walk.settings[1:], "stage=teacher")
    deadline = time.monotonic() + 90
    while len(metrics_of(runs)) < 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    stage = next((runs / "store" / "teacher").glob("*/"))
    state = {"done": (stage / "done.json").exists(), "saved": any(stage.glob("states/step-*/state.json"))}
    lines = metrics_of(runs)
    again = door(folder, f"runs_folder={runs}", *walk.settings[1:], "stage=teacher")
    return stage, process.returncode, stderr, state, lines, again


def test_an_interrupt_ends_in_130_and_one_line(interrupted):
    _, code, stderr, *_ = interrupted
    assert code == 130 and "Traceback" not in stderr and stderr.strip().splitlines()[-1].startswith("interrupted; ")


def test_what_was_trained_is_saved_and_not_called_done(interrupted):
    assert interrupted[3] == {"done": False, "saved": True}


def test_the_same_command_goes_on_from_the_saved_state(interrupted):
    stage, _, _, _, before, again = interrupted
    assert again.returncode == 0, again.stderr
    assert f"teacher  goes on from step {len(before)} of 78" in again.stdout
    after = (stage / "metrics.jsonl").read_text().splitlines()
    assert 8 <= len(before) < len(after) and after[: len(before)] == before  # nothing trained before was trained again
    assert [json.loads(line)["step"] for line in after] == list(range(78))


def test_a_run_that_was_never_interrupted_goes_on_from_nowhere(walk):
    assert "goes on from" not in walk.finished.stdout


def test_the_weights_equal_those_of_a_run_never_interrupted(interrupted, walk):
    weights = (interrupted[0] / "checkpoint" / "model.safetensors").read_bytes()
    assert interrupted[0].name == walk.stage_folder("teacher").name
    assert weights == (walk.checkpoint("teacher") / "model.safetensors").read_bytes()


def test_other_training_gives_other_weights(interrupted, walk):
    """The control: the student's weights are not the teacher's, so equality above says something."""
    assert (walk.checkpoint("student") / "model.safetensors").read_bytes() != (interrupted[0] / "checkpoint" / "model.safetensors").read_bytes()


def test_in_a_launch_of_two_processes_the_first_alone_trains_the_same_teacher(walk, door_of_two, tmp_path):
    shutil.copytree(walk.runs / "store" / "data", tmp_path / "runs" / "store" / "data")
    finished = door_of_two("ddp", tmp_path, *walk.settings[1:], "stage=teacher")
    assert (finished.returncode, finished.stderr) == (0, "")
    trained = next(tmp_path.glob("runs/store/teacher/*/checkpoint/model.safetensors"))
    assert trained.read_bytes() == (walk.stage_folder("teacher") / "checkpoint" / "model.safetensors").read_bytes()


def test_the_saved_state_goes_once_the_stage_is_done(interrupted):
    assert not (interrupted[0] / "states").exists() and (interrupted[0] / "done.json").exists()


AT_EXIT = """
import atexit, os, signal, sys, time
import minitron.run
def interrupted():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
atexit.register(interrupted)
sys.argv = ["run", "--help"]
{}
"""


def test_an_interrupt_after_the_end_changes_nothing(snippet, tmp_path):
    """Letting torch go takes a moment, in which a scheduler may ask as well; all is done by then."""
    finished = snippet(tmp_path, AT_EXIT.format("sys.exit(minitron.run.main())"))
    assert (finished.returncode, finished.stderr) == (0, "") and "stage=" in finished.stdout and finished.seconds < 60


def test_elsewhere_one_does(snippet, tmp_path):
    """The control."""
    assert "Traceback" in snippet(tmp_path, AT_EXIT.format("")).stderr
