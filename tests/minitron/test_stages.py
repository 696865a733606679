"""Stages as files of minitron/stages/: adding one is adding a file; what they declare fits together."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.settings.run import Settings, Stage
from minitron.walk.stage import StoredStage, UsingStage
from minitron.walk.table import order_of, stages, stored_stages

PLANTED = '''"""How long the run's name is."""

from minitron.settings.run import Settings
from minitron.walk.stage import StageContext, StoredStage


def check(settings: Settings) -> None:
    if settings.run_name == "forbidden":
        raise ValueError("run_name is 'forbidden'; it must be another")


def run(context: StageContext) -> dict:
    return {"headline": f"{len(context.settings.run_name)} letters"}


STAGE = StoredStage(version=1, needs=lambda settings: (), what=lambda settings: {"name": settings.run_name}, check=check, run=run,
                    ends_all=lambda settings: settings.run_name == "tiny")
'''


@pytest.fixture(scope="module")
def with_planted(repository, environment, tmp_path_factory):
    """Runs `python -m minitron.run` of a copy of the code that has one more file, minitron/stages/letters.py."""
    root = tmp_path_factory.mktemp("planted")
    for package in ("minitron", "nas", "distill", "memory_budget", "conf"):
        place = root / "minitron" / "conf" if package == "conf" else root / package  # as a wheel has it
        shutil.copytree(repository / package, place, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "minitron" / "stages" / "letters.py").write_text(PLANTED)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "minitron.run", "depth_lap.enabled=false", *arguments]
        return subprocess.run(command, cwd=root, env=environment | {"PYTHONPATH": str(root)}, text=True, capture_output=True)

    return run


def test_a_file_in_stages_is_a_stage(with_planted):
    first, again = (with_planted("stage=letters", "run_name=abc") for _ in range(2))
    assert "letters  3 letters" in first.stdout and "3 letters (already done)" in again.stdout, first.stderr
    assert "letters  4 letters" in with_planted("stage=letters", "run_name=abcd").stdout  # another setting, another key


def test_its_check_comes_before_any_work(with_planted):
    refused = with_planted("stage=letters", "run_name=forbidden")
    assert (refused.returncode, refused.stderr.strip()) == (2, "error: run_name is 'forbidden'; it must be another") and "letters" not in refused.stdout


def test_help_shows_what_it_says_of_itself_and_where_the_wheels_settings_are_explained(with_planted):
    shown = with_planted("--help").stdout
    assert f"  {'letters':<14} How long the run's name is." in shown
    (settings,) = [line.strip() for line in shown.splitlines() if line.endswith("run.yaml")]
    assert settings.endswith("minitron/conf/run.yaml") and Path(settings).exists()


def test_an_experiment_of_ones_own_is_found_beside_a_wheel(with_planted, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults: [tiny]\nrun_name: fives\n")
    assert "letters  5 letters" in with_planted("--config-dir", str(tmp_path), "stage=letters", "experiment=mine").stdout
    assert "experiment/mine is not in conf/" in with_planted("stage=letters", "experiment=mine").stderr


def test_every_stage_is_of_one_of_two_kinds_and_needs_stages_that_there_are():
    assert {type(stage) for stage in stages().values()} == {StoredStage, UsingStage}
    for name, stage in stored_stages().items():
        assert set(stage.needs(Settings())) <= set(stored_stages()) - {name}


def test_a_walk_runs_what_a_stage_needs_before_it():
    order = order_of(Settings(stage=Stage.all))
    assert order[0] == "teacher" and order[-1] == "evaluate" and "merge" not in order
    for place, name in enumerate(order):
        assert set(stages()[name].needs(Settings())) <= set(order[:place])


def test_a_stage_is_a_file_with_a_sentence(repository):
    files = {path.stem for path in Path(repository, "minitron", "stages").glob("*.py")} - {"__init__"}
    assert files == set(stages()) == {stage.value for stage in Stage} - {"all"}
    says = {name: sys.modules[f"minitron.stages.{name}"].__doc__ or "" for name in stages()}
    assert [name for name, text in says.items() if not 20 < len(text.partition("\n")[0]) < 130] == []
