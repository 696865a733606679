"""Candidates screened in several processes: cut disk to disk, distilled under an engine, measured by the first process."""

import json
import shutil
from pathlib import Path

import pytest

BEFORE = ("data", "teacher", "score", "shortlist", "teacher_cache")
OWN = ("stage=screen", "screen.train.optimizer=adamw", "search.finalists=1")


@pytest.fixture(scope="module")
def prepared(walk, tmp_path_factory):
    """Copies what a screen needs into a new runs folder; gives the settings that use it."""

    def prepare() -> tuple[Path, tuple[str, ...]]:
        folder = tmp_path_factory.mktemp("screen")
        for stage in BEFORE:
            shutil.copytree(walk.runs / "store" / stage, folder / "runs" / "store" / stage)
        return folder, (f"runs_folder={folder / 'runs'}", *walk.settings[1:], *OWN)

    return prepare


def screened(folder: Path) -> dict:
    (path,) = folder.glob("runs/store/screen/*/done.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("cut", ["prune.method=slice", "prune.method=compensated"])
def test_two_processes_screen_as_one_does(cut, prepared, door, door_of_two):
    alone, arguments = prepared()
    finished = door(alone, *arguments, cut, "screen.cached=false")
    assert finished.returncode == 0, finished.stderr
    both, arguments = prepared()
    finished = door_of_two("fsdp2", both, *arguments, cut, "screen.cached=false")
    assert finished.returncode == 0, finished.stderr
    one, two = screened(alone), screened(both)
    assert one["key"] == two["key"] and all(one["facts"][name] == two["facts"][name] for name in ("id", "short_distill_tokens"))
    assert two["facts"]["short_distill_loss"] == pytest.approx(one["facts"]["short_distill_loss"], rel=1e-4) and two["facts"]["tokens_per_second"] > 0
    assert {path.name for path in both.glob("runs/store/screen/*/*")} == {"metrics.jsonl", "done.json"}


def test_a_batch_that_processes_cannot_share_is_refused_before_any_work(prepared, door_of_two):
    folder, arguments = prepared()
    finished = door_of_two("ddp", folder, *arguments, "screen.train.batch=3")
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert finished.returncode == 2 and "train.batch is 3; it must be a multiple of 2 processes" in lines[0] and finished.stdout.count("screen") == 0
