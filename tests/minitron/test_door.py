"""The door: help, config, exit codes, and the published search from a config.json alone."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from memory_budget.calculator import memory_report
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.units import GIB
from memory_budget.workload import Workload
from minitron.settings.teachers import CONF_FOLDER


@pytest.mark.parametrize(
    ("arguments", "forked"), [(("--help",), False), (("--cfg", "job"), True), (("--cfg", "job", "experiment=nano2", "stage=prune"), True)]
)
def test_help_and_config_are_shown_without_work(arguments, forked, run_process, door, tmp_path):
    finished = (door if forked else run_process)(tmp_path, *arguments)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "shortlist_size" in finished.stdout and list(tmp_path.iterdir()) == []


def test_overrides_go_before_the_experiment_and_the_experiment_before_the_defaults(door, tmp_path):
    shown = door(tmp_path, "--cfg", "job", "experiment=nano2", "search.shortlist_size=3").stdout
    assert "shortlist_size: 3" in shown and "sequence_length: 8192" in shown and "run_name: nano2" in shown
    assert "shortlist_size: 8" in door(tmp_path, "--cfg", "job").stdout


@pytest.fixture(scope="module")
def order_file(tmp_path_factory, published_order):
    path = tmp_path_factory.mktemp("order") / "order.json"
    path.write_text(json.dumps({"removal_order": published_order}))
    return path


@pytest.fixture(scope="module")
def nano2(run_process, tmp_path_factory, order_file):
    """(folder, finished command) of the published search, offline and without weights."""
    folder = tmp_path_factory.mktemp("nano2")
    return folder, run_process(folder, "experiment=nano2", "stage=search", f"search.layer_order={order_file}")


def candidates_of(folder) -> list[dict]:
    with next(folder.glob("runs/store/search/*/candidates.csv")).open() as file:
        return list(csv.DictReader(file))


def is_published(row: dict, pattern: str) -> bool:
    sizes = {"hidden": "4480", "ffn": "15680", "mamba_num_heads": "128", "parameters": "8888227328", "pattern": pattern}
    return all(row[name] == value for name, value in sizes.items())


def test_the_published_search_needs_no_weights_and_seconds(nano2):
    folder, finished = nano2
    assert finished.returncode == 0, finished.stderr
    assert finished.seconds < 20 and finished.stderr == ""
    assert sorted(path.name for path in (folder / "runs" / "store").glob("*/")) == ["search", "shortlist"]


def test_the_published_student_is_among_the_candidates_that_fit(nano2, published_patterns):
    published = [row for row in candidates_of(nano2[0]) if is_published(row, published_patterns[1])]
    assert len(published) == 1
    teacher = architecture_from_config(read_config(CONF_FOLDER / "architectures" / "nemotron-nano-12b-v2-base.json"))
    memory = memory_report(replace(teacher, pattern=published_patterns[1], hidden=4480, ffn=15680), Workload(activation_tokens=2048))
    assert int(published[0]["total_bytes"]) == memory.total and round((memory.total - memory.activations) / GIB, 2) == 18.69


def test_a_smaller_budget_leaves_the_published_student_out(door, tmp_path, order_file, published_patterns):
    finished = door(tmp_path, "experiment=nano2", "stage=search", f"search.layer_order={order_file}", "budget.device_gib=18.7")
    assert finished.returncode == 0 and candidates_of(tmp_path)
    assert not [row for row in candidates_of(tmp_path) if is_published(row, published_patterns[1])]


def test_the_published_teacher_does_not_fit_and_every_listed_student_does(nano2):
    summary = json.loads((nano2[0] / "runs" / "nano2" / "summary.json").read_text())
    teacher = summary["models"]["teacher"]
    assert (teacher["parameters"], teacher["fits"], teacher["path"]) == (12_310_001_152, False, None)
    assert all(candidate["memory_bytes"]["total"] <= summary["budget"]["bytes"] for candidate in summary["candidates"])


@pytest.mark.parametrize(
    "written", ["[7, 52, 16, 8, 23, 24, 48, 3, 10, 31, 32]", "7 52 16 8 23 24 48 3 10 31 32\n", '{"removed_layers": [7,52,16,8,23,24,48,3,10,31,32]}']
)
def test_an_order_may_be_a_list_plain_numbers_or_an_object(written, door, tmp_path, nano2):
    (tmp_path / "order").write_text(written)
    assert door(tmp_path, "experiment=nano2", "stage=search", "search.layer_order=order").returncode == 0
    assert candidates_of(tmp_path) == candidates_of(nano2[0])


def test_a_folder_with_a_config_json_alone_can_be_searched(door, tmp_path, repository, order_file, nano2):
    (tmp_path / "mine").mkdir()
    shutil.copy(repository / "conf" / "architectures" / "nemotron-nano-12b-v2-base.json", tmp_path / "mine" / "config.json")
    finished = door(tmp_path, "experiment=nano2", "stage=search", f"search.layer_order={order_file}", "teacher.path=mine")
    assert finished.returncode == 0, finished.stderr
    assert candidates_of(tmp_path) == candidates_of(nano2[0])


def test_another_vocabulary_gives_the_tiny_search_other_candidates(door, tmp_path):
    (tmp_path / "order").write_text("1 0 4")
    for vocab in (1024, 2048):
        finished = door(tmp_path, "stage=search", "search.layer_order=order", "teacher.train_anew=true", f"data.vocab={vocab}", "search.layers={values: [20]}",
                        "budget.device_gib=1")
        assert finished.returncode == 0 and "(already done)" not in finished.stdout, finished.stderr


@pytest.mark.parametrize(
    ("given", "shown"), [({}, "10000 False"), ({"GOMP_SPINCOUNT": "7"}, "7 False"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None False")], ids=str
)
def test_waiting_threads_soon_sleep_unless_the_user_says_otherwise(given, shown, repository):
    """Said before torch is loaded, whose OpenMP reads it then."""
    program = "import minitron.run, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    finished = subprocess.run([sys.executable, "-c", program], env=environment | given, cwd=repository, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == shown
