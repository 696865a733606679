"""The door: help, config, exit codes, and the published search from a config.json alone."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from memory_budget.calculator import memory_report
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.units import GIB
from memory_budget.workload import Workload
from minitron.door.jobs import run_name_of_job
from minitron.settings.run import Stage
from minitron.settings.teachers import CONF_FOLDER
from minitron.walk.shown import escaped


@pytest.mark.parametrize("arguments", [("--cfg", "job"), ("--cfg", "job", "experiment=nano2", "stage=prune")])
def test_config_is_shown_without_work(arguments, door, tmp_path):
    finished = door(tmp_path, *arguments)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "shortlist_size" in finished.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["--help", "help"])
def test_help_is_one_screen_with_every_stage_and_experiment(word, door, run_process, tmp_path):
    finished = (run_process if word == "--help" else door)(tmp_path, "stage=prune", word)
    lines = finished.stdout.splitlines()
    assert (finished.returncode, finished.stderr, list(tmp_path.iterdir())) == (0, "", [])
    assert len(lines) <= 40 and max(map(len, lines)) <= 110 and str(CONF_FOLDER / "run.yaml") in finished.stdout
    names = {*Stage.__members__, *(path.stem for path in (CONF_FOLDER / "experiment").glob("*.yaml"))}
    assert names <= set(re.findall(r"[\w-]+", finished.stdout)) and "no_such_stage" not in finished.stdout


@pytest.fixture
def own_experiments(tmp_path):
    """Writes DIR/experiment/mine.yaml."""

    def write(text: str) -> Path:
        (tmp_path / "own" / "experiment").mkdir(parents=True)
        (tmp_path / "own" / "experiment" / "mine.yaml").write_text(text)
        return tmp_path / "own"

    return write


def test_an_experiment_of_ones_own_is_found_in_its_folder(own_experiments, door, tmp_path):
    folder = own_experiments("# @package _global_\ndefaults: [tiny]\nrun_name: mine\nbudget: {name: l4, device_gib: null}\n")
    shown = door(tmp_path, "seed=3", "experiment=mine", "--config-dir", str(folder), "--cfg", "job").stdout
    assert "run_name: mine" in shown and "name: l4" in shown and "samples: 128" in shown and "seed: 3" in shown
    refused = door(tmp_path, "experiment=mine")
    assert refused.returncode == 2 and refused.stderr.startswith("error: experiment/mine is not in conf/; there are: nano2")


@pytest.mark.parametrize(("text", "said"), [("run_name: mine", "must begin with the line `# @package _global_`"),
                                            ("# @package _global_\nserach: {listed: 3}", "serach is no setting; did you mean search?")])  # fmt: skip
def test_a_mistake_in_an_experiment_of_ones_own_names_its_file(text, said, own_experiments, door, tmp_path):
    refused = door(tmp_path, f"--config-dir={own_experiments(text)}", "experiment=mine", "stage=report")
    assert (refused.returncode, len(refused.error_lines)) == (2, 1)
    assert refused.stderr.startswith("error: experiment/mine.yaml: ") and said in refused.stderr


def test_jobs_of_a_multirun_write_reports_of_their_own(door, tmp_path):
    (tmp_path / "order").write_text("1 0 4 5")
    finished = door(tmp_path, "stage=search", "search.layer_order=order", "-m", "search.shortlist_size=1,2", "run_name=a")
    assert finished.returncode == 0, finished.stderr
    summaries = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/summary.json")}
    assert summaries.keys() == {"a-search.shortlist_size=1", "a-search.shortlist_size=2"}
    as_typed = "python -m minitron.run stage=search search.layer_order=order -m search.shortlist_size=1,2 run_name=a"
    assert {summary["command"] for summary in summaries.values()} == {as_typed}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["seed=1", "scoring.criterion=mse"], "run-seed=1-scoring.criterion=mse"),
        (["stage=score"], "run"),
        (["teacher.path=/a b/ü"], "run-teacher.path=a_b_ü"),
        (["search.hidden.values=[96,112]"], "run-search.hidden=96_112"),
        (["budget={name: l4, device_gib: null, cushion_fraction: null, set_aside_gib: null}"], "run-budget=l4"),
        (["budget={name:'24 GiB',device_gib:24.0,cushion_fraction:0,set_aside_gib:0}"], "run-budget=24_GiB"),
    ],
)
def test_a_job_is_called_by_what_it_tries(overrides, name):
    assert run_name_of_job("run", overrides, ["stage"]) == name


def test_long_names_of_jobs_stay_short_and_apart():
    names = {run_name_of_job("run", [f"teacher.path={'deep/' * 50}{end}"], []) for end in "ab"}
    assert len(names) == 2 and max(map(len, names)) < 100


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


def test_rows_that_cannot_be_packed_are_told_of_the_shortlist_and_of_the_choice(nano2):
    """None is refused for them: the published student, with its FFN of 15,680, is among those that fit."""
    folder, finished = nano2
    summary, page = json.loads((folder / "runs" / "nano2" / "summary.json").read_text()), (folder / "runs" / "nano2" / "report.md").read_text()
    for candidate in summary["candidates"]:
        odd = [multiple for multiple in (128, 256) if any(candidate["architecture"][name] % multiple for name in ("hidden", "ffn"))
               or candidate["architecture"]["mamba_num_heads"] * 80 % multiple]  # fmt: skip
        assert list(candidate["row_notes"]) == [{128: "int4", 256: "K-quants"}[multiple] for multiple in odd]
    chosen = next(candidate for candidate in summary["candidates"] if candidate["chosen"])
    (line,) = (line for line in finished.stdout.splitlines() if "to note of" in line)
    assert line.endswith("; ".join(chosen["row_notes"].values())) and f"intermediate_size {chosen['architecture']['ffn']:,}" in line
    assert "odd rows (int4, K-quants)" in page and f"The chosen one's: {escaped(next(iter(chosen['row_notes'].values())))}" in page
    assert any(not candidate["row_notes"] for candidate in summary["candidates"]), "the control"


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
    mine = tmp_path / "my, [own] {a}=(b) #1 ~it's ü"
    mine.mkdir()
    shutil.copy(repository / "conf" / "architectures" / "nemotron-nano-12b-v2-base.json", mine / "config.json")
    shutil.copy(order_file, mine / "order's")
    finished = door(mine, "experiment=nano2", "stage=search", f"search.layer_order={mine / 'order'}'s", f"teacher.path={mine}", f"runs_folder={mine / 'runs'}")
    assert finished.returncode == 0, finished.stderr
    assert candidates_of(mine) == candidates_of(nano2[0])


def test_another_vocabulary_gives_the_tiny_search_other_candidates(door, tmp_path):
    (tmp_path / "order").write_text("1 0 4")
    for vocab in (1024, 2048):
        finished = door(
            tmp_path,
            "stage=search",
            "search.layer_order=order",
            "teacher.train_anew=true",
            f"data.vocab={vocab}",
            "search.layers={values: [20]}",
            "budget.device_gib=1",
        )
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
