"""The plain slice of the same architecture, distilled beside the student: what it is, and where it is said."""

import json
import shutil
from pathlib import Path

import pytest

from minitron.checkpoints.files import Checkpoint, same_bits

COMPARED = (
    "prune.method=compensated", "prune.against_slice=true", "prune.slice_learning_rate=0.004", "prune.samples=8", "prune.directions=variance",
    "search.fixed={hidden: 24, ffn: 48}",
)  # fmt: skip


@pytest.fixture(scope="module")
def compared(walk, door, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    shutil.copytree(walk.runs / "store", folder / "runs" / "store")
    settings = (f"runs_folder={folder / 'runs'}", *walk.settings[1:])
    finished = door(folder, *settings, *COMPARED)
    assert finished.returncode == 0, finished.stderr
    sliced = door(folder, *settings, *COMPARED, "stage=prune", "prune.method=slice", "run_name=sliced")
    assert sliced.returncode == 0, sliced.stderr
    return folder / "runs"


def test_the_control_is_the_slice_of_the_students_architecture(compared):
    summary, sliced = (json.loads((compared / name / "summary.json").read_text()) for name in ("tiny", "sliced"))
    control = Path(summary["stages"]["prune_slice"]["path"]) / "checkpoint"
    one, other, student = Checkpoint(control), Checkpoint(sliced["models"]["pruned"]["path"]), Checkpoint(summary["models"]["pruned"]["path"])
    assert all(same_bits(one.read(name), other.read(name)) for name in one.entries)
    assert {name: entry.shape for name, entry in one.entries.items()} == {name: entry.shape for name, entry in student.entries.items()}
    assert not all(same_bits(one.read(name), student.read(name)) for name in one.entries)


def test_both_are_in_the_summary_after_the_same_tokens_each_at_its_rate(compared):
    summary = json.loads((compared / "tiny" / "summary.json").read_text())
    against = summary["against_slice"]
    assert against["tokens"] == summary["distillation"]["tokens"] and against["learning_rate"] == 0.004
    assert against["models"]["student"]["loss_nats_per_token"] < against["models"]["pruned"]["loss_nats_per_token"]
    assert against["models"]["pruned"]["loss_nats_per_token"] > summary["models"]["pruned"]["evaluation"]["loss_nats_per_token"]
    assert "The plain slice of the same architecture starts at" in (compared / "tiny" / "report.md").read_text()


def test_a_run_that_compares_nothing_has_neither(walk):
    assert walk.summary["against_slice"] == {} and "distill_slice" not in walk.summary["stages"]
