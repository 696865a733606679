"""Comparing candidates: Hydra's multirun in parallel processes, wandb's sweep, and both in the search's table."""

import contextlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from wandb import wandb_agent
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args, load_sweep_config

from minitron.report.sweep import sweep_yaml
from minitron.settings.run import Settings, Stage, Tracking
from minitron.walk.store import locked
from minitron.walk.tracking import open_candidate

PARALLEL = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


@dataclass(frozen=True, slots=True)
class Shortlisted:
    """A folder where everything up to the shortlist is done, under these settings, and the candidates by zero-shot loss."""

    folder: Path
    settings: tuple[str, ...]
    ids: list[str]

    def facts(self, stage: str) -> list[dict]:
        return [json.loads(path.read_text())["facts"] for path in self.folder.glob(f"runs/store/{stage}/*/done.json")]

    def screened(self) -> dict[str, dict]:
        return {facts["id"]: facts for facts in self.facts("screen")}


@pytest.fixture(scope="module")
def shortlisted(walk, tmp_path_factory):
    """Copies the walk's results up to the shortlist into a new folder."""

    def copy(name: str) -> Shortlisted:
        folder = tmp_path_factory.mktemp(name)
        for stage in ("data", "teacher", "score", "shortlist"):
            shutil.copytree(walk.runs / "store" / stage, folder / "runs" / "store" / stage)
        facts = json.loads((walk.stage_folder("shortlist") / "done.json").read_text())["facts"]
        return Shortlisted(folder, walk.settings[1:], facts["best_first"])

    return copy


@dataclass(frozen=True, slots=True)
class OfflineRun:
    """What wandb has kept of a run."""

    run_id: str
    sweep_id: str
    group: str
    name: str
    project: str
    config: dict
    summary: dict


def offline_runs(runs: Path) -> list[OfflineRun]:
    """The runs below <runs folder>/wandb, in the order of their start."""
    return [read_offline_run(file) for file in sorted(runs.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)]


def read_offline_run(file: Path) -> OfflineRun:
    """A .wandb file is LevelDB's log of protobuf records: blocks of 32 KiB, each chunk led by checksum [4], length [2] and kind [1]."""
    data, position, record, run, summary = file.read_bytes(), 7, b"", None, {}
    while position < len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block too small for a chunk
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (2, 3):  # its first or middle part
            continue
        parsed, record = Record.FromString(record), b""
        run = parsed.run if parsed.HasField("run") else run
        summary |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in parsed.summary.update}
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    return OfflineRun(run.run_id, run.sweep_id, run.run_group, run.display_name, run.project, config, summary)


# -------------------------------------------------------------------------------------------------------- multirun


@pytest.fixture(scope="module")
def multirun(shortlisted, run_process):
    """The best and the worst of the shortlist, screened in two processes at once."""
    done = shortlisted("multirun")
    return done, run_process(done.folder, "-m", *done.settings, "stage=screen", f"candidate={done.ids[0]},{done.ids[-1]}", *PARALLEL)


@pytest.fixture(scope="module")
def search_after(multirun, door):
    return door(multirun[0].folder, *multirun[0].settings, "stage=search", "search.finalists=1", "tracking=offline")


def test_parallel_processes_screen_one_candidate_each(multirun):
    done, finished = multirun
    assert finished.returncode == 0, finished.stderr
    assert done.screened().keys() == {done.ids[0], done.ids[-1]}


def test_what_two_processes_need_is_made_by_one(multirun):
    lines = [line for line in multirun[1].stdout.splitlines() if line.startswith("teacher_cache")]
    made = [line for line in lines if re.search(r"\(\d+ s\)$", line)]
    assert (len(lines), len(made)) == (2, 1)


def test_a_multirun_leaves_no_folders_of_its_own(multirun, search_after):
    folder = multirun[0].folder
    assert [path.name for path in folder.iterdir()] == ["runs"]
    assert sorted(path.name for path in (folder / "runs").iterdir() if path.name[0] != ".") == ["multirun.yaml", "store", "tiny", "wandb"]


def test_the_search_finds_all_that_was_screened_finalist_or_not(multirun, search_after):
    done, _ = multirun
    assert search_after.returncode == 0, search_after.stderr
    assert all(line.endswith("(already done)") for line in search_after.stdout.splitlines() if line.lstrip().startswith("screen"))
    entries = [json.loads(line) for line in (done.folder / "runs" / "tiny" / "candidates.jsonl").read_text().splitlines()]
    measured = {entry["id"] for entry in entries if entry["short_distill_loss"] is not None}
    assert measured == {done.ids[0], done.ids[-1]} and len(entries) == len(done.ids) == 3  # one was not screened


def test_the_search_gives_wandb_its_table_and_the_pareto_plot(multirun, search_after):
    done, _ = multirun
    (run,) = offline_runs(done.folder / "runs")
    assert (run.group, run.name, run.project) == ("tiny", "tiny: search", "minitron")
    assert run.summary["pareto_table.path"] == run.summary["candidates.path"]
    (file,) = done.folder.glob(f"runs/wandb/offline-run-*/files/{run.summary['candidates.path']}")
    table = json.loads(file.read_text())
    losses = {row[table["columns"].index("id")]: row[table["columns"].index("short_distill_loss")] for row in table["data"]}
    measured = {name: facts["short_distill_loss"] for name, facts in done.screened().items()}
    assert losses == {name: measured.get(name) for name in done.ids}


def test_two_runs_of_one_name_write_its_folder_one_after_the_other(multirun, search_after, start):
    done, _ = multirun
    (done.folder / "runs" / "tiny" / "summary.json").unlink()
    with locked(done.folder / "runs" / "tiny", print):
        second = start(done.folder, *done.settings, "stage=report")
        assert "waiting for another run" in second.stdout.readline()
        assert not (done.folder / "runs" / "tiny" / "summary.json").exists()
    second.communicate(timeout=60)
    assert second.returncode == 0 and (done.folder / "runs" / "tiny" / "summary.json").exists()


@pytest.mark.parametrize("parallel", [False, True], ids=["one process", "parallel"])
def test_an_unknown_candidate_is_one_line_and_exit_code_2(parallel, multirun, door, run_process):
    done, _ = multirun
    run, launcher = (run_process, PARALLEL) if parallel else (door, ())  # a fork cannot be sent to joblib's processes
    finished = run(done.folder, "-m", *done.settings, "stage=screen", f"candidate={done.ids[0]},L9-NONE", *launcher)
    assert (finished.returncode, len(finished.error_lines)) == (2, 1), finished.stderr
    assert finished.error_lines[0].startswith("error: candidate is 'L9-NONE'") and all(name in finished.error_lines[0] for name in done.ids)


# ----------------------------------------------------------------------------------------------------------- sweep


@pytest.fixture(scope="module")
def sweep(shortlisted, door):
    """(results, the sweep.yaml beside them, as wandb reads it) of a search that has distilled nothing, under a name that YAML would take for something else."""
    done = shortlisted("sweep")
    finished = door(done.folder, *done.settings, "stage=search", "search.finalists=0", "run_name=007")
    assert finished.returncode == 0, finished.stderr
    return done, load_sweep_config(str(done.folder / "runs" / "007" / "sweep.yaml"))


@pytest.fixture(scope="module")
def trials(sweep, environment, door):
    """The last candidate tried twice, as two sweeps over one shortlist would, and wandb's runs: first as `wandb agent` starts it, by its own code
    with all but its server, then what that started once more, in a fork."""
    done, config = sweep
    candidate = config["parameters"]["candidate"]["values"][-1]
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}", "WANDB_MODE": "offline", "WANDB_SWEEP_ID": "s1"}
    with mock.patch.dict(os.environ, environment | own), contextlib.chdir(done.folder):  # where the run was started
        os.environ.pop("WANDB_DIR", None)
        agent = wandb_agent.Agent(api=None, queue=None, sweep_id="s1")
        agent._sweep_command = list(config["command"])
        answer = agent._process_command({"type": "run", "run_id": "first", "program": config["program"], "args": {"candidate": {"value": candidate}}})
        assert "exception" not in answer, answer
        process = agent._run_processes["first"]
        assert process.wait(timeout=240) == 0
        own |= {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    command = process._popen.args
    again = door(done.folder, *command[command.index("minitron.run") + 1 :], environment=own | {"WANDB_RUN_ID": "again"})
    assert again.returncode == 0, again.stderr
    return done, offline_runs(done.folder)


@pytest.fixture(scope="module")
def entry(trials) -> dict:
    """What the shortlist says of the candidate tried."""
    done, runs = trials
    return done.facts("shortlist")[0]["entries"][runs[0].config["candidate"]]


def test_the_search_leaves_a_sweep_over_its_own_shortlist(sweep):
    done, config = sweep
    assert config["parameters"] == {"candidate": {"values": config["parameters"]["candidate"]["values"]}}
    assert sorted(config["parameters"]["candidate"]["values"]) == sorted(done.ids)
    assert (config["method"], config["metric"]["name"], config["project"], config["name"]) == ("grid", "short_distill_loss", "minitron", "007")


def test_a_trials_command_has_the_runs_own_settings(sweep):
    done, config = sweep
    flags = create_sweep_command_args({"args": {"candidate": {"value": done.ids[0]}}})["args_no_hyphens"]
    assert config["command"][:6] == ["${env}", "python", "-m", "minitron.run", "stage=screen", "tracking=online"] and flags == [f"candidate={done.ids[0]}"]
    assert config["command"][6:] == [*done.settings, "search.finalists=0", "run_name=007", "${args_no_hyphens}"]


def lap(*losses: float | None) -> dict:
    return {"run_name": "mine", "candidates": [{"id": f"L{number}", "zero_shot_loss": loss} for number, loss in enumerate(losses)]}


@pytest.mark.parametrize(("summary", "arguments"), [
    (lap(1.0), []), (lap(None, None), []), (lap(1.0, 2.0), ["-m", "scoring.criterion=kl,mse"]),
], ids=["one", "without weights", "multirun"])  # fmt: skip
def test_where_there_is_nothing_to_sweep_over_there_is_no_sweep(summary, arguments):
    assert sweep_yaml(summary, arguments) is None


def test_settings_of_any_letters_come_through_a_sweep(tmp_path):
    arguments = ["teacher.path=/models/a 'b': #ü", "search.hidden={low: 0.5}", "stage=all", "+tracking=offline", "candidate=X", "run_name=x_${seed}"]
    (tmp_path / "sweep.yaml").write_text(sweep_yaml(lap(1.0, 2.0), arguments))
    command = load_sweep_config(str(tmp_path / "sweep.yaml"))["command"]
    assert command[6:-1] == [arguments[0], arguments[1], arguments[5]]


def test_a_trial_is_one_run_the_sweeps_own(trials):
    done, runs = trials
    named = ("s1", "007", f"007: {runs[0].config['candidate']}")
    assert [(run.run_id, run.sweep_id, run.group, run.name) for run in runs] == [("first", *named), ("again", *named)]


def test_a_trials_config_is_the_architecture_and_its_gib(trials, entry):
    run = trials[1][0]
    gib = {f"{part}_gib": size / 2**30 for part, size in entry["memory_bytes"].items()}
    wanted = {"candidate": entry["id"], **entry["architecture"], "parameters": entry["parameters"], **gib}
    assert {name: value for name, value in run.config.items() if name != "_wandb"} == wanted


def test_a_trials_summary_holds_every_measurement(trials, entry):
    done, (run, _) = trials
    facts = {**entry, **done.screened()[entry["id"]]}
    measured = {name: value for name, value in facts.items() if name != "headline" and isinstance(value, int | float | str)}
    assert {"zero_shot_loss", "zero_shot_kl", "short_distill_loss", "tokens_per_second"} <= measured.keys()
    assert {name: run.summary.get(name) for name in measured} == measured


def test_a_trials_kl_is_that_at_the_end_not_the_last_steps(trials):
    done, (run, _) = trials
    (path,) = done.folder.glob("runs/store/screen/*/metrics.jsonl")
    last = json.loads(path.read_text().splitlines()[-1])
    assert run.summary["KL"] == pytest.approx(last["recent_loss"]) != pytest.approx(last["loss"])


def test_wandb_keeps_to_itself_offline(trials, multirun, search_after):
    assert "wandb:" not in search_after.stdout + search_after.stderr and "chosen of" in search_after.stdout


def test_a_candidate_done_before_still_gives_its_trial_the_measurements(trials):
    first, again = trials[1]
    assert again.summary["short_distill_loss"] == first.summary["short_distill_loss"] and again.config == first.config
    assert "KL" not in again.summary  # nothing was trained


def test_the_depths_screened_on_the_way_are_no_trials(entry, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    settings = Settings(stage=Stage.distill, tracking=Tracking.offline, runs_folder=str(tmp_path))
    with open_candidate(settings, entry) as tracker:
        tracker({"KL": 1.0})
    assert list(tmp_path.iterdir()) == []  # where stage=screen has left a run, above


def test_online_without_an_account_is_one_line_and_exit_code_2(trials, door, tmp_path):
    done, _ = trials
    arguments = (*done.settings, "stage=screen", f"candidate={done.ids[-1]}", "tracking=online")
    own = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_SWEEP_ID": "s1"}  # a sweep is told even of what is done
    finished = door(done.folder, *arguments, environment=own)
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: tracking is online") and "tracking=offline needs no account" in line
