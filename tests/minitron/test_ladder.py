"""The search's ladder and its two laps, through the door."""

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config, read_config
from minitron.search.choice import choose
from minitron.walk.store import write_json

LAPS = ("depth_lap.enabled=true", "depth_lap.tokens=4000", "depth_lap.screen_tokens=2000")


@pytest.fixture(scope="module")
def table(walk) -> list[dict]:
    return [json.loads(line) for line in (walk.stage_folder("search") / "candidates.jsonl").read_text().splitlines()]


@pytest.fixture
def copied(walk, tmp_path) -> tuple[str, ...]:
    """The walk's settings on a copy of its store, which may be changed."""
    shutil.copytree(walk.runs, tmp_path / "runs", symlinks=True)
    return (*walk.settings, f"runs_folder={tmp_path / 'runs'}")


def searched(door, folder: Path, *settings: str) -> dict:
    finished = door(folder, *settings, "stage=search")
    assert finished.returncode == 0, finished.stderr
    return json.loads((folder / "runs" / "tiny" / "summary.json").read_text())


# One lap.


def test_the_best_by_zero_shot_loss_are_distilled(table):
    assert len(table) == 3 and all(entry["zero_shot_loss"] > 0 and entry["zero_shot_kl"] > 0 for entry in table)
    by_loss = sorted(table, key=lambda entry: entry["zero_shot_loss"])
    assert [entry["short_distill_loss"] is not None for entry in by_loss] == [True, True, False]


def test_a_short_distillation_lowers_every_finalists_loss(table):
    assert all(entry["short_distill_loss"] < entry["zero_shot_loss"] for entry in table if entry["short_distill_loss"] is not None)


def test_the_lowest_loss_after_distillation_is_chosen(table, walk):
    finalists = [entry for entry in table if entry["short_distill_loss"] is not None]
    chosen = min(finalists, key=lambda entry: entry["short_distill_loss"])
    assert [entry["id"] for entry in table if entry["chosen"]] == [chosen["id"]]
    assert architecture_from_config(read_config(walk.checkpoint("student"))) == Architecture(**chosen["architecture"])
    assert "after a short distillation" in walk.summary["search"]["reason"] and chosen["on_pareto_front"]


def test_every_candidate_is_made_of_weights_of_its_own(table):
    assert len({entry["view_digest"] for entry in table}) == len(table)
    assert all(entry["copied_bytes"] < 0.05 * 2 * 96_480 for entry in table)


def test_the_csv_lists_all_that_fit_with_the_measurements(walk, table):
    with (walk.runs / "tiny" / "candidates.csv").open() as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert len(rows) == walk.summary["search"]["num_fitting"] > len(table)
    for entry in table:
        row = rows[entry["id"]]
        assert int(row["total_bytes"]) == entry["memory_bytes"]["total"] and float(row["zero_shot_loss"]) == entry["zero_shot_loss"]
        assert row["short_distill_loss"] == ("" if entry["short_distill_loss"] is None else str(entry["short_distill_loss"]))


def test_the_choices_export_config_fixes_the_same_architecture(walk, door, tmp_path, copied, table):
    summary = searched(door, tmp_path, *copied, f"search.fixed.file={walk.runs / 'tiny' / 'export_config.json'}")
    (fixed,), (chosen,) = summary["candidates"], [entry for entry in table if entry["chosen"]]
    assert fixed["architecture"] == chosen["architecture"] and fixed["kept_layers"] == chosen["kept_layers"]


def test_filters_hold_for_all_that_is_listed(door, tmp_path, copied, walk):
    most = walk.summary["candidates"][0]["parameters"] - 1000
    summary = searched(door, tmp_path, *copied, f"search.max_parameters={most}", "search.finalists=0")
    assert summary["search"]["num_fitting"] < walk.summary["search"]["num_fitting"]
    assert all(candidate["parameters"] <= most for candidate in summary["candidates"])


def test_zero_shot_measurements_of_an_interrupted_run_are_kept(walk, door, tmp_path, copied):
    folder = tmp_path / "runs" / walk.stage_folder("shortlist").relative_to(walk.runs)
    (folder / "done.json").unlink()
    marked = walk.summary["candidates"][0]["id"]
    facts = {"copied_bytes": 0, "copied_mamba_bytes": 0, "view_digest": "of the first run"}
    (folder / "zero_shot.partial.jsonl").write_text(json.dumps([marked, 0, [1e6, 1.0, 1], facts]) + '\n["half a li')
    finished = door(tmp_path, *copied, "search.finalists=0", "stage=search")
    assert "shortlist  goes on from 1 of " in finished.stdout, finished.stderr
    losses = {entry["id"]: entry["zero_shot_loss"] for entry in json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())["candidates"]}
    before = {entry["id"]: entry["zero_shot_loss"] for entry in walk.summary["candidates"]}
    assert before.pop(marked) + 100 < losses.pop(marked)
    assert losses == before


def test_a_candidate_whose_distillation_diverges_stays_in_the_table_and_is_never_chosen(door, tmp_path, copied):
    finished = door(tmp_path, *copied, "stage=search", "screen.train.learning_rate=1e30", "screen.train.optimizer=adamw", "screen.train.clip_norm=1e30")
    assert finished.returncode == 2 and "finite loss" in finished.stderr and len(finished.error_lines) == 1
    assert finished.stdout.count("diverged; never chosen") == 2


def test_a_choice_that_a_further_screen_changes_is_said_and_why(walk, door, tmp_path, copied, table):
    """With the further one's loss planted: far above the others nothing is chosen anew, far below it is."""
    (further,) = [entry["id"] for entry in table if entry["short_distill_loss"] is None]
    (chosen,) = [entry["id"] for entry in table if entry["chosen"]]
    store = tmp_path / "runs" / "store"
    before = {stage: set((store / stage).glob("*/")) for stage in ("screen", "search")}
    assert door(tmp_path, *copied, "stage=screen", f"candidate={further}").returncode == 0
    ((screen,), said) = set((store / "screen").glob("*/")) - before["screen"], []
    record = json.loads((screen / "done.json").read_text())
    del record["digest"]  # which knows of no planted loss
    for loss in (99.0, 0.1):
        write_json(screen / "done.json", record | {"facts": record["facts"] | {"short_distill_loss": loss}})
        finished = door(tmp_path, *copied, "stage=search")
        said.append([line.strip() for line in finished.stdout.splitlines() if "chosen anew" in line])
        for folder in set((store / "search").glob("*/")) - before["search"]:
            shutil.rmtree(folder)
    line = f"search  chosen anew: {further} in place of {chosen}, since {further} was screened too; the cut and what follows from it are its own"
    assert said == [[], [line]]


def test_batches_of_one_row_are_learnt_from_the_cache(door, tmp_path, copied, table):
    finished = door(tmp_path, *copied, "stage=screen", f"candidate={table[0]['id']}", "screen.train.batch=1")
    assert finished.returncode == 0 and "nats/token after 1,984 tokens" in finished.stdout, finished.stderr


@pytest.mark.parametrize(("rule", "expected"), [("lowest_loss", 1), ("loss_within", 2), ("weighted", 3)])
def test_each_rule_chooses_by_its_own_measure(rule, expected, stage_context):
    def entry(loss, gib, speed):
        measured = {"zero_shot_loss": 9.0, "short_distill_loss": loss, "modelled_tokens_per_second": speed}
        return {"id": str(speed), "memory_bytes": {"total": gib}, "parameters": 1, **measured}

    entries = [entry(None, 1, 99.0), entry(1.0, 4, 1.0), entry(1.01, 4, 5.0), entry(1.5, 2, 4.0)]
    context = stage_context("search.loss_within=0.02", "search.weights={loss: 0.1, memory: 1, throughput: 0}", f"search.select={rule}")
    assert choose(context, entries, distilled=True).row == expected


@pytest.fixture
def stage_context(tmp_path):
    from minitron.door.composed import compose_settings
    from minitron.walk.console import Console
    from minitron.walk.stage import StageContext

    def context(*overrides):
        return StageContext(compose_settings(*overrides), tmp_path, {}, Console(quiet=True))

    return context


def test_a_candidate_without_a_number_is_not_chosen(stage_context):
    base = {"id": "one", "zero_shot_loss": 2.0, "memory_bytes": {"total": 1}, "modelled_tokens_per_second": 1.0, "parameters": 1}
    entries = [{**base, "short_distill_loss": None}, {**base, "short_distill_loss": 1.9}]
    assert choose(stage_context(), entries, distilled=True).row == 1
    assert choose(stage_context(), list(reversed(entries)), distilled=True).row == 0


# Two laps.


@pytest.fixture(scope="module")
def two_laps(walk, door, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("laps")
    shutil.copytree(walk.runs, folder / "runs", symlinks=True)
    finished = door(folder, *walk.settings, *LAPS, f"runs_folder={folder / 'runs'}")
    assert finished.returncode == 0, finished.stderr
    return json.loads((folder / "runs" / "tiny" / "summary.json").read_text())


def test_the_first_lap_cuts_depth_alone_and_the_second_widths_alone(two_laps):
    first = next(candidate for candidate in two_laps["depth_lap"]["candidates"] if candidate["chosen"])["architecture"]
    teacher, student = (Architecture(**two_laps["models"][name]["architecture"]) for name in ("teacher", "student"))
    assert Architecture(**first) == replace(teacher, pattern=student.pattern) != teacher
    assert student.hidden < teacher.hidden and len(two_laps["removed_layers"]) == teacher.num_layers - student.num_layers > 0


def test_two_laps_of_another_budget_and_label_share_cuts_and_students_of_both(two_laps, walk, door, tmp_path):
    runs, bytes_less = Path(two_laps["stages"]["prune"]["path"]).parents[2], (two_laps["budget"]["bytes"] - 16) / 2**30
    finished = door(tmp_path, *walk.settings, *LAPS, f"runs_folder={runs}", "budget.name=other", "run_name=other", f"budget.device_gib={bytes_less:.12f}")
    assert finished.returncode == 0, finished.stderr
    made = [line.split()[0] for line in finished.stdout.splitlines() if re.search(r"\(\d+ s\)$", line)]
    assert made == ["shortlist", "search"] * 2
    other = json.loads((runs / "other" / "summary.json").read_text())
    for one, first in ((other, two_laps), (other["depth_lap"], two_laps["depth_lap"])):
        assert all(one["stages"][stage]["key"] == first["stages"][stage]["key"] for stage in ("score", "prune", "distill"))
        assert one["stages"]["search"]["key"] != first["stages"]["search"]["key"]


def test_the_second_lap_starts_from_the_first_laps_student_and_learns_from_the_teacher(two_laps):
    done = {name: json.loads((Path(stage["path"]) / "done.json").read_text()) for name, stage in two_laps["stages"].items()}
    first = two_laps["depth_lap"]["stages"]["distill"]["key"]
    assert done["prune"]["inputs"]["base"] == done["score"]["inputs"]["base"] == first
    assert done["distill"]["inputs"]["teacher"] == done["teacher"]["key"]


def test_a_moved_store_is_still_done(two_laps, walk, door, tmp_path):
    runs = Path(two_laps["stages"]["teacher"]["path"]).parent.parent.parent
    shutil.copytree(runs, tmp_path / "moved", symlinks=True)
    finished = door(tmp_path, *walk.settings, *LAPS, "runs_folder=moved")
    assert finished.returncode == 0 and finished.stdout.count("(already done)") > 20
    assert len(list((tmp_path / "moved" / "store").glob("*/*/done.json"))) == len(list((runs / "store").glob("*/*/done.json")))


def test_depths_are_held_against_the_widths_to_come(two_laps):
    candidates, budget = two_laps["depth_lap"]["candidates"], two_laps["budget"]["bytes"]
    assert any(candidate["memory_bytes"]["total"] > budget for candidate in candidates)
    assert two_laps["models"]["student"]["fits"]


def test_depths_that_leave_no_room_are_left_out(two_laps):
    facts = two_laps["depth_lap"]["search"]
    assert 0 < facts["num_fitting"] < facts["num_candidates"] == 4


def test_removed_layers_are_the_teachers(two_laps):
    teacher, student = (two_laps["models"][name]["architecture"]["pattern"] for name in ("teacher", "student"))
    assert "".join(letter for layer, letter in enumerate(teacher) if layer not in two_laps["removed_layers"]) == student


def test_losses_are_numbers_on_both_laps(two_laps):
    for candidates in (two_laps["candidates"], two_laps["depth_lap"]["candidates"]):
        assert candidates and all(math.isfinite(candidate["zero_shot_loss"]) for candidate in candidates)


def test_a_screen_beside_the_teacher_does_as_one_from_its_whole_distribution(door, tmp_path, copied, walk):
    """At top_k of the whole vocabulary the cache is the distribution, rounded to float16; the top 8 are another thing."""
    losses = {}
    for name, settings in {"live": ["screen.cached=false"], "whole": ["screen.top_k=512"], "top 8": ["screen.top_k=8"]}.items():
        summary = searched(door, tmp_path, *copied, *settings)
        losses[name] = next(candidate["short_distill_loss"] for candidate in summary["candidates"] if candidate["chosen"])
    assert losses["whole"] == pytest.approx(losses["live"], abs=2e-4)
    assert abs(losses["top 8"] - losses["live"]) > 1e-3
