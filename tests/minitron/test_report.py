"""The report, made of a small run whose store is written here: stage folders as the stages leave them, no model run."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from memory_budget.architecture import Architecture
from memory_budget.calculator import memory_report
from memory_budget.parameters import count_total_parameters
from memory_budget.workload import Workload
from minitron.console import Console
from minitron.plots import PLOTS, draw_plots
from minitron.report_page import page_html, page_markdown, pattern_lines, verdict
from minitron.settings import BudgetSettings, Settings, TeacherSettings, TinyTeacherSettings, WorkloadSettings
from minitron.stages import report
from minitron.store import Result, finish
from minitron.summary import MOST_CURVE_POINTS, build_summary, thinned_curve

STAGES = ("data", "teacher", "score", "search", "prune", "distill", "evaluate")
KEPT = (0, 1, 2, 3, 4, 5, 6, 8)  # of M-M*-M-*-
FIRST_SCORES = {0: 0.2, 1: 0.01, 2: 0.03, 4: 0.02, 5: 0.04, 6: 0.005, 8: 0.006}  # attention is at its floor
CONTRACT = {"run_name", "command", "versions", "seed", "budget", "stages", "models", "candidates", "removed_layers", "distillation"}


class Recorder(Console):
    """A console that keeps what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


WIDTH_CURVES = {"hidden": {"0": [1.0, 0.5, 0.2]}, "ffn": {"1": [1.0, 0.3, 0.0]}}

def small_settings(folder: Path, tiny: Architecture) -> Settings:
    sizes = {field.name: getattr(tiny, field.name) for field in fields(TinyTeacherSettings)}
    made = Settings(runs_folder=str(folder / "runs"), run_name="small", teacher=TeacherSettings(tiny=TinyTeacherSettings(**sizes)))
    made.data.vocab = 300
    made.budget = BudgetSettings(name="small-device", device_gib=0.00012, cushion_fraction=0.0)
    made.workload = WorkloadSettings(context_tokens=256)
    return made


def finished_stages(settings: Settings, tiny: Architecture, config_of: Callable) -> dict[str, Result]:
    """What every stage left: the facts, and the files that the report reads."""
    teacher = replace(tiny, vocab=300)
    student = replace(teacher, pattern="".join(teacher.pattern[layer] for layer in KEPT), ffn=32)
    candidates = [_candidate("L8-F32", student, 5.1, chosen=True), _candidate("L8-F24", replace(student, ffn=24), 5.4, chosen=False)]
    losses = {"teacher": (5.0, 0.0), "pruned": (5.5, 0.4), "student": (5.2, 0.1)}
    models = {name: {"loss_nats_per_token": loss, "kl_to_teacher_nats_per_token": kl, "top1_agreement": 0.9, "tokens": 2040,
                     "decode_tokens_per_second": 50.0} for name, (loss, kl) in losses.items()}  # fmt: skip
    facts = {
        "data": {},
        "teacher": {"path": "checkpoint", "headline": "small | teacher, pattern M-M*-M-*-"},
        "score": {},
        "search": {"num_candidates": 4, "num_fitting": 2, "shortlist": candidates, "chosen": candidates[0]},
        "prune": {"path": "checkpoint", "removed_layers": [7]},
        "distill": {"path": "checkpoint", "tokens": 5120, "steps": 20, "seconds": 3.0, "final_kl_nats_per_token": 0.1},
        "evaluate": {"models": models, "lost_nats_per_token": 0.5, "recovered_share": 0.6},
    }
    made = {name: _finished(settings, name, facts[name]) for name in STAGES}
    for name, architecture in (("teacher", teacher), ("prune", student), ("distill", student)):
        _write(made[name].folder / "checkpoint" / "config.json", json.dumps(config_of(architecture)))
    for name in ("teacher", "distill"):
        steps = [{"step": step, "tokens": 256 * (step + 1), "loss": 2.0 * 0.9**step} for step in range(20)]
        _write(made[name].folder / "metrics.jsonl", "".join(json.dumps(step) + "\n" for step in steps))
    rounds = [{"layer": 7, "score": 0.005, "scores": FIRST_SCORES}]
    _write(made["score"].folder / "layers.json", json.dumps({"pattern": teacher.pattern, "removal_order": [7], "rounds": rounds, "width_curves": WIDTH_CURVES}))
    return made


def _candidate(identifier: str, architecture: Architecture, loss: float, *, chosen: bool) -> dict:
    memory = memory_report(architecture, Workload(context_tokens=256)).as_dict()
    return {"id": identifier, "architecture": asdict(architecture), "parameters": count_total_parameters(architecture), "memory_bytes": memory,
            "kept_layers": list(KEPT), "zero_shot_loss": loss, "short_distill_loss": None, "tokens_per_second": None, "chosen": chosen}  # fmt: skip


def _finished(settings: Settings, name: str, facts: dict, key: str = "0123456789ab") -> Result:
    folder = Path(settings.runs_folder) / "store" / name / key
    folder.mkdir(parents=True)
    settings = {"criterion": "iterative_mse", "normalised": True}
    record = {"key": key, "seconds": 1.5, "peak_rss_bytes": 2**30, "settings": settings, "facts": {"headline": f"{name} is done", **facts}}
    return finish(folder, record)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def settings(tmp_path, tiny) -> Settings:
    return small_settings(tmp_path, tiny)


@pytest.fixture
def results(settings, tiny, config_of) -> dict[str, Result]:
    return finished_stages(settings, tiny, config_of)


@pytest.fixture
def summary(settings, results) -> dict:
    """The summary of the whole run, to be changed at will."""
    return json.loads(json.dumps(build_summary(settings, results, dict.fromkeys(results, False))))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny, config_of) -> tuple[Path, list[str]]:
    """The run folder of a whole run, not to be changed, and what was said."""
    settings, console = small_settings(tmp_path_factory.mktemp("whole"), tiny), Recorder()
    results = finished_stages(settings, tiny, config_of)
    report.run(settings, results, dict.fromkeys(results, False), console)
    return Path(settings.runs_folder) / settings.run_name, console.said


@pytest.fixture
def make_report(settings, results) -> Callable[..., tuple[Path, dict, list[str]]]:
    """Makes the report of the stages named (all without any): (run folder, summary, what was said)."""

    def make(*stages: str) -> tuple[Path, dict, list[str]]:
        done, console = {name: results[name] for name in stages or STAGES}, Recorder()
        report.run(settings, done, {name: name == "data" for name in done}, console)
        folder = Path(settings.runs_folder) / settings.run_name
        return folder, json.loads((folder / "summary.json").read_text()), console.said

    return make


def test_the_summary_has_every_key_of_the_contract(summary):
    assert set(summary) >= CONTRACT
    assert set(summary["stages"]["score"]) >= {"key", "path", "seconds", "cached", "peak_rss_bytes"}
    assert set(summary["models"]["student"]) == {"path", "parameters", "architecture", "memory_bytes", "fits", "evaluation"}
    assert set(summary["distillation"]) == {"tokens", "steps", "seconds", "final_kl_nats_per_token"}


def test_a_whole_run_leaves_every_file(whole):
    folder, said = whole
    pages = {"summary.json", "report.md", "report.html", "metrics.jsonl"}
    assert {path.name for path in folder.iterdir()} == pages | set(PLOTS) | {"teacher", "pruned", "student"}
    assert said == []


def test_the_page_is_made_of_summary_json_alone(whole):
    folder, _ = whole
    summary = json.loads((folder / "summary.json").read_text())
    assert page_markdown(summary, list(PLOTS)) == (folder / "report.md").read_text()


@pytest.mark.parametrize("last", range(2, len(STAGES)))
def test_a_run_cut_short_has_a_page_of_what_is_done(make_report, last):
    folder, summary, _ = make_report(*STAGES[:last])
    page = (folder / "report.md").read_text()
    assert [name for name in STAGES if f"\n## {name}\n" in page] == list(STAGES[:last])
    assert ("metrics.jsonl" in {path.name for path in folder.iterdir()}) == ("distill" in summary["stages"])


def test_a_search_from_config_json_alone_has_a_page(make_report, results):
    for candidate in results["search"].facts["shortlist"]:
        candidate["zero_shot_loss"] = None
    folder, summary, _ = make_report("search")
    page = (folder / "report.md").read_text()
    assert summary["models"]["teacher"]["path"] is None
    assert "The chosen architecture L8-F32, not cut yet, needs" in page and "zero-shot loss" not in page
    assert {path.name for path in folder.glob("*.png")} == {"memory.png"}


def test_a_shorter_run_of_the_same_name_leaves_nothing_of_the_longer_one(make_report):
    make_report()
    folder, _, _ = make_report("data", "teacher")
    names = {path.name for path in folder.iterdir()}
    assert names == {"summary.json", "report.md", "report.html", "memory.png", "teacher_training.png", "teacher"}


def test_links_lead_to_the_checkpoints_wherever_the_runs_folder_is_moved(settings, summary, tmp_path):
    folder = Path(settings.runs_folder) / "small"
    folder.mkdir()
    assert report.link_models(folder, summary["models"]) == []
    moved = shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    for name, stage in (("teacher", "teacher"), ("pruned", "prune"), ("student", "distill")):
        link = Path(moved) / "small" / name
        assert not link.readlink().is_absolute()
        assert link.resolve(strict=True) == (tmp_path / "elsewhere" / "store" / stage / "0123456789ab" / "checkpoint").resolve()


def test_links_follow_the_run_to_other_checkpoints(summary, tmp_path):
    report.link_models(tmp_path, summary["models"])
    summary["models"]["student"]["path"] = str(tmp_path / "other")
    report.link_models(tmp_path, summary["models"])
    assert (tmp_path / "student").readlink() == Path("other")


def test_a_link_that_cannot_be_made_is_said_and_the_report_still_written(make_report, settings):
    in_the_way = Path(settings.runs_folder) / "small" / "student"
    _write(in_the_way / "notes.txt", "mine")
    folder, summary, said = make_report()
    assert len(said) == 1 and "student" in said[0] and summary["models"]["student"]["path"] in said[0]
    assert (in_the_way / "notes.txt").read_text() == "mine" and (folder / "report.html").exists() and (folder / "pruned").is_symlink()
    assert not list(folder.glob("*.partial"))


def test_metrics_are_the_distillations_own(results, tmp_path):
    report.copy_metrics(tmp_path, results["distill"])
    assert (tmp_path / "metrics.jsonl").read_bytes() == (results["distill"].folder / "metrics.jsonl").read_bytes()


def test_layers_at_their_floor_have_no_importance(summary):
    assert summary["importance"]["first_round_scores"] == [FIRST_SCORES.get(layer) for layer in range(9)]
    assert summary["importance"]["removal_order"] == [7] and summary["importance"]["removal_scores"] == [0.005]


@pytest.mark.parametrize("length", [0, 1, 199, 200, 201, 401, 5000])
def test_curves_are_thinned_to_at_most_200_points_that_end_where_the_run_did(length):
    points = [(10 * (step + 1), float(step)) for step in range(length)]
    curve = thinned_curve(points, "loss")
    assert len(curve["tokens"]) == len(curve["loss"]) <= MOST_CURVE_POINTS
    assert curve["tokens"][-1:] == [10 * length][: min(length, 1)]
    if length <= MOST_CURVE_POINTS:
        assert list(zip(curve["tokens"], curve["loss"], strict=True)) == points


def test_a_thinned_curve_keeps_the_mean():
    curve = thinned_curve([(step, math.sin(step)) for step in range(1000)], "loss")
    assert sum(curve["loss"]) / len(curve["loss"]) == pytest.approx(sum(map(math.sin, range(1000))) / 1000, abs=1e-12)


@pytest.mark.parametrize(
    ("teacher", "pruned", "student", "said"),
    [
        (5.0, 5.5, 5.2, "distillation won 60 % of it back, 0.200 are left"),
        (5.0, 5.5, 4.9, "distillation won all of it back and 0.100 more"),
        (5.0, 5.5, 5.495, "distillation hardly changed that (−0.0050 nats per token)"),
        (5.0, 5.5, 5.8, "distillation raised the held-out loss by 0.300 nats per token, so none of it is won back"),
        (5.0, 5.004, 5.1, "cost next to nothing on held-out text (+0.0040 nats per token), so there is hardly anything to win back; distillation raised"),
        (5.0, 4.98, 4.98, "cost nothing on held-out text (−0.020 nats per token), so there is nothing to win back; distillation left it there"),
    ],
)
def test_the_verdict_gives_a_share_only_of_something_lost(summary, teacher, pruned, student, said):
    for name, loss in (("teacher", teacher), ("pruned", pruned), ("student", student)):
        summary["models"][name]["evaluation"]["loss_nats_per_token"] = loss
    text = verdict(summary)
    assert said in text
    assert ("% of it back" in text) == (said.startswith("distillation won 60"))


def test_the_verdict_says_what_fits(summary):
    assert "it **does not fit** the" in verdict(summary) and "it **fits**" in verdict(summary)
    summary["models"]["student"]["memory_bytes"]["total"] = summary["budget"]["bytes"] + 1
    assert "it **fits**" not in verdict(summary)


def test_speeds_that_differ_between_equal_architectures_are_called_rough(summary):
    assert "good to" not in verdict(summary)
    summary["models"]["pruned"]["evaluation"]["decode_tokens_per_second"] = 60.0
    assert "good to 20 % only" in verdict(summary)


def test_removed_layers_are_marked_under_their_letters(summary):
    layers, teacher, removed, student = (line[9:] for line in pattern_lines(summary).splitlines()[1:5])
    assert teacher == "M-M*-M-*-" and student == "M-M*-M- -" and removed == "       ^"


def test_names_and_headlines_are_text_and_no_markup(summary):
    summary["run_name"] = "<b>small*run*</b>"
    page = page_html(page_markdown(summary, []), "<b>")
    assert "Small | teacher, pattern M-M*-M-*-." in page and "<h1>Run &lt;b&gt;small*run*&lt;/b&gt;</h1>" in page and "<title>&lt;b>" in page
    assert "<p>&lt;b&gt;</p>" in page_html("<b>", "")


def test_the_html_page_has_tables_and_images_beside_it(whole):
    page = (whole[0] / "report.html").read_text()
    assert page.count("<table>") == 4 and all(f'<img src="{name}"' in page for name in PLOTS)


def test_a_plot_is_drawn_again_only_when_its_data_changed(summary, tmp_path):
    draw_plots(summary, tmp_path)
    before, drawn = {name: (tmp_path / name).stat().st_ino for name in PLOTS}, (tmp_path / "memory.png").read_bytes()
    draw_plots(summary, tmp_path)
    assert {name: (tmp_path / name).stat().st_ino for name in PLOTS} == before
    summary["budget"]["bytes"] += 10_000
    draw_plots(summary, tmp_path)
    assert (tmp_path / "memory.png").read_bytes() != drawn


def test_every_plot_is_a_png_of_readme_width(whole):
    for name in PLOTS:
        data = (whole[0] / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n") and int.from_bytes(data[16:20], "big") == 960


def test_the_page_of_an_unchanged_run_loads_neither_torch_nor_matplotlib(whole, repository, environment):
    folder, _ = whole
    code = f"""
import json, sys
from pathlib import Path
from minitron.plots import draw_plots
from minitron.report_page import page_html, page_markdown
summary = json.loads(Path({str(folder / "summary.json")!r}).read_text())
page = page_html(page_markdown(summary, draw_plots(summary, Path({str(folder)!r}))), "")
print(len(page) > 1000, [name for name in ("torch", "transformers", "matplotlib") if name in sys.modules])
"""
    printed = subprocess.run([sys.executable, "-c", code], env=environment, cwd=repository, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "True []"
