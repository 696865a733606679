"""The score stage as users run it: streamed or whole, in one process or several, interrupted and resumed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minitron.importance.scores import WidthSums, load_sums


@pytest.fixture(scope="module")
def stage(walk, door, tmp_path_factory):
    """Runs stage=score on the walk's data and teacher in a new runs folder; gives (stage folder, the command's end)."""

    def run(*settings: str, folder: Path | None = None):
        if folder is None:
            folder = tmp_path_factory.mktemp("score")
            for name in ("data", "teacher"):
                shutil.copytree(walk.runs / "store" / name, folder / "runs" / "store" / name)
        finished = door(folder, f"runs_folder={folder / 'runs'}", *walk.settings[1:], "stage=score", *settings)
        return next((folder / "runs" / "store").glob("score/*/"), None), finished

    return run


@pytest.fixture(scope="module")
def single(stage) -> Path:
    folder, finished = stage("scoring.block_tokens=128")
    assert finished.returncode == 0, finished.stderr
    return folder


def sums_of(folder: Path) -> WidthSums:
    return load_sums(folder / "scores.safetensors")


def rounds_of(folder: Path) -> list[dict]:
    return json.loads((folder / "layers.json").read_text())["rounds"]


def test_a_streamed_teacher_leaves_the_very_same_files(stage, single):
    folder, finished = stage("scoring.block_tokens=128", "scoring.placement=stream")
    assert finished.returncode == 0, finished.stderr
    for name in ("scores.safetensors", "layers.json"):
        assert (folder / name).read_bytes() == (single / name).read_bytes()


def test_two_processes_score_as_one(single, walk, environment, repository, tmp_path):
    for name in ("data", "teacher"):
        shutil.copytree(walk.runs / "store" / name, tmp_path / "runs" / "store" / name)
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(repository / "conf" / "accelerate" / "cpu.yaml")]
    command = [*launch, "--num_processes", "2", "-m", "minitron.run", f"runs_folder={tmp_path / 'runs'}", *walk.settings[1:], "stage=score"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    folder = next((tmp_path / "runs" / "store" / "score").glob("*/"))
    assert sorted(path.name for path in (folder / "parts-2").iterdir()) == ["0", "1"]  # both did work
    assert finished.stdout.count("sites scored") == 1  # and one spoke
    one, other = sums_of(single), sums_of(folder)
    assert (one.num_samples, one.num_tokens) == (other.num_samples, other.num_tokens)
    for site, value in one.sums.items():
        np.testing.assert_allclose(other.sums[site], value, rtol=1e-6, err_msg=str(site))
    assert [entry["layer"] for entry in rounds_of(folder)] == [entry["layer"] for entry in rounds_of(single)]
    for entry, expected in zip(rounds_of(folder), rounds_of(single), strict=True):
        assert entry["scores"] == pytest.approx(expected["scores"], rel=1e-5)


def halfway(single: Path, tmp_path: Path, walk) -> Path:
    """A runs folder whose score stage was interrupted before its end, with all parts it had finished."""
    for name in ("data", "teacher"):
        shutil.copytree(walk.runs / "store" / name, tmp_path / "runs" / "store" / name)
    folder = tmp_path / "runs" / "store" / "score" / single.name
    shutil.copytree(single, folder)
    for name in ("done.json", "scores.safetensors", "layers.json"):
        (folder / name).unlink()
    return folder


def test_an_interrupted_scoring_ends_as_an_uninterrupted_one(stage, single, walk, tmp_path):
    folder = halfway(single, tmp_path, walk)
    (folder / "parts-1" / "0" / "rounds.json").write_text(json.dumps(rounds_of(single)[:1]))
    parts = sorted((folder / "parts-1" / "0").glob("width-*"))
    assert len(parts) == 4  # 8 rows of 64 tokens in blocks of 128
    parts[-1].unlink()
    _, finished = stage("scoring.block_tokens=128", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert [line.split("goes on from ")[1] for line in finished.stdout.splitlines() if "goes on" in line] == [
        "3 of 4 blocks of rows (width importance)", "layer 1 of 3 that go (layer importance)"]  # fmt: skip
    for name in ("scores.safetensors", "layers.json"):
        assert (folder / name).read_bytes() == (single / name).read_bytes()


def test_finished_parts_are_not_scored_again(stage, single, walk, tmp_path):
    folder = halfway(single, tmp_path, walk)
    part = next((folder / "parts-1" / "0").glob("width-*"))
    (load_sums(part) + load_sums(part)).save(part)  # planted: counts twice if it is read, once if it is made anew
    _, finished = stage("scoring.block_tokens=128", folder=tmp_path)
    assert finished.returncode == 0 and sums_of(folder).num_samples == 8 + 2


@pytest.mark.parametrize("criterion", ["iterative_kl", "mse", "kl", "loss", "block_influence"])
def test_every_criterion_gives_an_order_down_to_the_smallest_depth(criterion, stage):
    folder, finished = stage(f"scoring.criterion={criterion}", "scoring.samples=2", "scoring.layer_samples=2")
    assert finished.returncode == 0, finished.stderr
    layers = json.loads((folder / "layers.json").read_text())
    assert len(set(layers["removal_order"])) == 3 and layers["how_made"]["criterion"] == criterion
    assert [layers["pattern"][layer] for layer in layers["removal_order"]].count("*") == 0  # the floor keeps both


def test_rows_of_whole_documents_are_scored_without_their_padding(walk, door, tmp_path):
    arguments = (f"runs_folder={tmp_path / 'runs'}", *walk.settings[1:], "data.rows=documents", "data.sequence_length=2048", "data.max_train_tokens=60000",
                 "teacher.train.tokens=4096", "teacher.train.batch=2", "stage=score", "scoring.layer_samples=2")  # fmt: skip
    finished = door(tmp_path, *arguments)
    assert finished.returncode == 0, finished.stderr
    rows = np.load(next((tmp_path / "runs" / "store" / "data").glob("*/train.npy")))
    sums = sums_of(next((tmp_path / "runs" / "store" / "score").glob("*/")))
    assert (rows == -1).any() and 0 < sums.num_tokens < sums.num_samples * rows.shape[1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("scoring.protect=[99]",), "scoring.protect names layer 99; the teacher has layers 0 to 10"),
        (("scoring.protect=[0,1,2,3,4,5,6,7,8]",), "3 removals were asked for; search.floors and scoring.protect keep 9 of 11 layers"),
        (("scoring.ceilings={attention: 1}",), "scoring.ceilings keeps at most 1 layers of kind '*', below its floor"),
        (("scoring.ceilings={attn: 1}",), "scoring.ceilings"),
        (("scoring.samples=0",), "scoring.samples is 0; it must be at least 1"),
    ],
    ids=["no such layer", "too many protected", "ceiling below floor", "no such kind", "no samples"],
)
def test_rules_that_cannot_be_are_refused_before_any_work(settings, says, stage):
    folder, finished = stage(*settings)
    assert finished.returncode == 2 and finished.stderr.startswith("error: ") and says in finished.stderr
    assert folder is None
