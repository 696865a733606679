"""The report, made of a small run whose store is written here: stage folders as the stages leave them, no model run."""

import copy
import functools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from memory_budget.architecture import Architecture, as_dict
from memory_budget.calculator import memory_report
from memory_budget.parameters import count_total_parameters
from memory_budget.workload import Workload
from minitron.checkpoints.publish import model_card
from minitron.report import files as report
from minitron.report.data import row_lines
from minitron.report.evaluation import speed_note, speed_table
from minitron.report.html import page_html
from minitron.report.page import page_markdown
from minitron.report.plots import PLOTS, draw_plots
from minitron.report.plots_search import non_dominated
from minitron.report.search import architecture_table, candidates_table, choice_sentences, pattern_lines, table_notes
from minitron.report.summary import MOST_CURVE_POINTS, SEARCH_FILES, best_first, build_summary, removed_layers, thinned_curve
from minitron.report.verdict import verdict
from minitron.settings.run import BudgetSettings, Settings, TeacherSettings, TinyTeacherSettings, WorkloadSettings
from minitron.walk.console import Console
from minitron.walk.laps import depth_lap, width_lap
from minitron.walk.stage import Lap
from minitron.walk.store import Result, finish

STAGES = ("data", "teacher", "score", "shortlist", "teacher_cache", "screen L8-F32", "screen L8-F24", "search", "prune", "distill", "evaluate")
SECTIONS = ("data", "teacher", "score", "shortlist", "teacher_cache", "screen", "search", "prune", "distill", "evaluate")
ONE_LAP_PLOTS = ("memory.png", "lengths.png", "layer_importance.png", "width_importance.png", "candidates.png", "pareto.png", "distillation.png",
                 "teacher_training.png")  # fmt: skip
CARD = {
    "sequence_length": 256, "rows": "windows", "answers_only": False, "refused": [["document 7 of a.jsonl", "it holds an image"]],
    "forms": [["a.jsonl", 'conversations in "messages"']],
    "splits": {
        "heldout": {"documents": 2, "tokens": 900, "longest_tokens": 600, "rows": 3, "row_tokens": 768, "lengths": {"512": 1, "1024": 1},
                    "sources": [{"source": "a", "documents": 2, "tokens": 900}], "left_out": {}, "without_reasoning": 0},
        "train": {"documents": 40, "tokens": 20_000, "longest_tokens": 3_000, "rows": 70, "row_tokens": 17_920, "lengths": {"256": 10, "1024": 29, "4096": 1},
                  "sources": [{"source": "a", "documents": 30, "tokens": 15_000}, {"source": "b", "documents": 10, "tokens": 5_000}],
                  "left_out": {"without text": 3, "refused": 7}, "without_reasoning": 0},
    },
    "examples": [{"row": 35, "tokens": 256, "first_token": 0, "shown_tokens": 256, "parts": [["Once upon\na time", True]]}],
}  # fmt: skip
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
    made = Settings(runs_folder=str(folder / "runs"), run_name="small", teacher=TeacherSettings(tiny=TinyTeacherSettings(**sizes), train_anew=True))
    made.data.vocab = 300
    made.budget = BudgetSettings(name="small-device", device_gib=0.00012, cushion_fraction=0.0)
    made.workload = WorkloadSettings(context_tokens=256)
    return made


def finished_stages(settings: Settings, tiny: Architecture, config_of: Callable) -> dict[str, Result]:
    """What every stage of one lap left: the facts, and the files that the report reads. FFN layers are cut to 32 or 24 neurons."""
    teacher = replace(tiny, vocab=300)
    student = replace(teacher, pattern="".join(teacher.pattern[layer] for layer in KEPT), ffn=32)
    shortlist = [_candidate("L8-F32", student, KEPT, (5.1, 5.0), chosen=True), _candidate("L8-F24", replace(student, ffn=24), KEPT, (5.05, 5.2)),
                 _candidate("L8-F16", replace(student, ffn=16), KEPT, (5.9, None))]  # fmt: skip
    made = {name: _finished(settings, name, facts) for name, facts in _before_search().items()}
    made |= _search(settings, shortlist, "0123456789ab") | _cut_and_trained(settings, config_of, student, [7], "0123456789ab")
    _write(made["teacher"].folder / "checkpoint" / "config.json", json.dumps(config_of(teacher)))
    _write_metrics(made["teacher"])
    rounds = [{"layer": 7, "score": 0.005, "scores": FIRST_SCORES}]
    _write_layers(made["score"], pattern=teacher.pattern, removal_order=[7], rounds=rounds)
    return made


def two_finished_laps(settings: Settings, tiny: Architecture, config_of: Callable) -> list[Lap]:
    """A first lap that goes from 9 layers to 8 and not to 7, and a second that narrows the FFN layers of those 8."""
    settings.depth_lap.enabled = True
    wide = finished_stages(settings, tiny, config_of)
    teacher = replace(tiny, vocab=300)
    deep, shallow = ("".join(teacher.pattern[layer] for layer in layers) for layers in (KEPT, KEPT[:-1]))
    depths = [_candidate("L8", replace(teacher, pattern=deep), KEPT, (5.3, 5.02), chosen=True),
              _candidate("L7", replace(teacher, pattern=shallow), KEPT[:-1], (5.2, 5.3))]  # fmt: skip
    shared = {name: wide[name] for name in ("data", "teacher", "score")}
    first = shared | _search(settings, depths, "1" * 12) | _cut_and_trained(settings, config_of, replace(teacher, pattern=deep), [7], "1" * 12)
    first.pop("evaluate")
    student = replace(teacher, pattern=deep, ffn=32)
    widths = [_candidate("L8-F32", student, range(8), (5.1, 5.0), chosen=True), _candidate("L8-F24", replace(student, ffn=24), range(8), (5.05, 5.2))]
    score = _finished(settings, "score", {}, "2" * 12)
    _write_layers(score, pattern=deep, removal_order=[], rounds=[])
    base = _finished(settings, "base", {"path": str(first["distill"].folder / "checkpoint")})
    second = {"data": wide["data"], "teacher": wide["teacher"], "base": base, "score": score}
    second |= _search(settings, widths, "2" * 12) | _cut_and_trained(settings, config_of, student, [], "2" * 12)
    return [lap_of(depth_lap(settings), first), lap_of(width_lap(settings, first["distill"]), second)]


def lap_of(settings: Settings, results: dict[str, Result], cached: bool = False) -> Lap:
    return Lap(settings, results, dict.fromkeys(results, cached))


def _before_search() -> dict[str, dict]:
    data = {"source": "a.jsonl and 1 other file", "train_documents": 40, "train_tokens": 17_920, "card": CARD}
    return {"data": data, "teacher": {"path": "checkpoint", "headline": "small | teacher, pattern M-M*-M-*-"}, "score": {}}


def _search(settings: Settings, shortlist: list[dict], key: str) -> dict[str, Result]:
    """The shortlist, a short distillation for each that has a loss of one, and the choice."""
    after = ("short_distill_loss", "short_distill_tokens", "tokens_per_second")
    entries = {one["id"]: {name: value for name, value in one.items() if name not in (*after, "chosen", "on_pareto_front")} for one in shortlist}
    made = {"shortlist": _finished(settings, "shortlist", {"entries": entries, "best_first": list(entries)}, key)}
    made["teacher_cache"] = _finished(settings, "teacher_cache", {}, key)
    for place, one in enumerate(shortlist):
        if one["short_distill_loss"] is not None:
            facts = {"id": one["id"], **{name: one[name] for name in after}}
            made[f"screen {one['id']}"] = _finished(settings, "screen", facts, f"{place}{key[1:]}")
    chosen = next(one for one in shortlist if one["chosen"])
    facts = {"num_candidates": 4, "num_fitting": len(shortlist), "reason": "lowest loss", "shortlist": shortlist, "chosen": chosen}
    made["search"] = _finished(settings, "search", facts, key)
    for name in SEARCH_FILES:
        _write(made["search"].folder / name, "a table\n")
    return made


def _cut_and_trained(settings: Settings, config_of: Callable, student: Architecture, removed: list[int], key: str) -> dict[str, Result]:
    losses = {"teacher": (5.0, 0.0), "pruned": (5.5, 0.4), "student": (5.2, 0.1)}
    models = {name: {"loss_nats_per_token": loss, "kl_to_teacher_nats_per_token": kl, "top1_agreement": 0.9, "tokens": 2040,
                     "decode_tokens_per_second": 50.0} for name, (loss, kl) in losses.items()}  # fmt: skip
    facts = {
        "prune": {"path": "checkpoint", "removed_layers": removed},
        "distill": {"path": "checkpoint", "tokens": 5120, "steps": 20, "seconds": 3.0, "final_kl_nats_per_token": 0.1},
        "evaluate": {"models": models, "lost_nats_per_token": 0.5, "recovered_share": 0.6},
    }
    made = {name: _finished(settings, name, facts[name], key) for name in facts}
    for name in ("prune", "distill"):
        _write(made[name].folder / "checkpoint" / "config.json", json.dumps(config_of(student)))
    _write_metrics(made["distill"])
    return made


def _write_metrics(result: Result) -> None:
    steps = [{"step": step, "tokens": 256 * (step + 1), "loss": 2.0 * 0.9**step} for step in range(20)]
    _write(result.folder / "metrics.jsonl", "".join(json.dumps(step) + "\n" for step in steps))


def _write_layers(result: Result, **layers) -> None:
    _write(result.folder / "layers.json", json.dumps({**layers, "width_curves": WIDTH_CURVES}))


def _candidate(identifier: str, architecture: Architecture, kept, losses: tuple[float, float | None], *, chosen: bool = False) -> dict:
    """An entry of the table; `losses` are zero-shot and after a short distillation."""
    memory = memory_report(architecture, Workload(context_tokens=256)).as_dict()
    zero_shot, short = losses
    return {"id": identifier, "architecture": asdict(architecture), "parameters": count_total_parameters(architecture), "memory_bytes": memory,
            "kept_layers": list(kept), "serving_batch": 1, "modelled_tokens_per_second": 1e9 / memory["total"], "zero_shot_loss": zero_shot,
            "zero_shot_kl": 0.1, "short_distill_loss": short, "short_distill_tokens": None if short is None else 1024,
            "tokens_per_second": None if short is None else 40.0, "on_pareto_front": short is not None, "chosen": chosen}  # fmt: skip


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
    return json.loads(json.dumps(build_summary([lap_of(settings, results)])))


@pytest.fixture
def two_laps(settings, tiny, config_of) -> dict:
    """The summary of a run of two laps, to be changed at will."""
    return json.loads(json.dumps(build_summary(two_finished_laps(settings, tiny, config_of))))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny, config_of) -> tuple[Path, list[str]]:
    """The run folder of a whole run, not to be changed, and what was said."""
    settings, console = small_settings(tmp_path_factory.mktemp("whole"), tiny), Recorder()
    report.write_report(settings, [lap_of(settings, finished_stages(settings, tiny, config_of))], console)
    return Path(settings.runs_folder) / settings.run_name, console.said


@pytest.fixture
def make_report(settings, results) -> Callable[..., tuple[Path, dict, list[str]]]:
    """Makes the report of the stages named (all without any): (run folder, summary, what was said)."""

    def make(*stages: str) -> tuple[Path, dict, list[str]]:
        console = Recorder()
        report.write_report(settings, [lap_of(settings, {name: results[name] for name in stages or STAGES})], console)
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
    pages = {"summary.json", "report.md", "report.html", "metrics.jsonl", "sweep.yaml", *SEARCH_FILES}
    assert {path.name for path in folder.iterdir()} == pages | set(ONE_LAP_PLOTS) | {"teacher", "pruned", "student"}
    assert said == []


def test_the_page_is_made_of_summary_json_alone(whole):
    folder, _ = whole
    summary = json.loads((folder / "summary.json").read_text())
    assert page_markdown(summary, ONE_LAP_PLOTS) == (folder / "report.md").read_text()


@pytest.mark.parametrize("last", [2, 3, 4, 7, 8, 9, 10])  # after every stage that adds a plot or a choice
def test_a_run_cut_short_has_a_page_of_what_is_done(make_report, last):
    folder, summary, _ = make_report(*STAGES[:last])
    page = (folder / "report.md").read_text()
    started = {name.split(" ")[0] for name in STAGES[:last]}
    assert re.findall("\n## (\\w+)\n", page) == [name for name in SECTIONS if name in started]
    assert ("metrics.jsonl" in {path.name for path in folder.iterdir()}) == ("distill" in summary["stages"])


def test_a_search_from_config_json_alone_has_a_page(make_report, results):
    for candidate in results["search"].facts["shortlist"]:
        candidate.update(zero_shot_loss=None, zero_shot_kl=None, short_distill_loss=None, tokens_per_second=None)
    folder, summary, _ = make_report("search")
    page = (folder / "report.md").read_text()
    assert summary["models"]["teacher"]["path"] is None
    assert "The chosen architecture L8-F32, not cut yet, needs" in page and "zero-shot loss" not in page
    assert {path.name for path in folder.glob("*.png")} == {"memory.png"}


def test_a_shorter_run_of_the_same_name_leaves_nothing_of_the_longer_one(make_report):
    make_report()
    folder, _, _ = make_report("data", "teacher")
    names = {path.name for path in folder.iterdir()}
    assert names == {"summary.json", "report.md", "report.html", "memory.png", "lengths.png", "teacher_training.png", "teacher"}


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
    report.copy_tables(tmp_path, results)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (results["distill"].folder / "metrics.jsonl").read_bytes()


def test_layers_at_their_floor_have_no_importance(summary):
    assert summary["importance"]["first_round_scores"] == [FIRST_SCORES.get(layer) for layer in range(9)]
    assert summary["importance"]["removal_order"] == [7] and summary["importance"]["removal_scores"] == [0.005]


def data_section(summary: dict, plots: Sequence[str] = ()) -> str:
    page = page_markdown(summary, plots)
    return page[page.index("## data") : page.index("## teacher")]


def test_the_section_on_data_shows_what_the_card_says(summary):
    section = data_section(summary, ["lengths.png"])
    assert "| train | 40 | 20,000 | 3,000 | 70 | 17,920 | 100.0 % |" in section and "| held-out | 2 | 900 | 600 | 3 | 768 | 100.0 % |" in section
    assert "| b | 10 | 5,000 | 25.0 % |" in section and "](lengths.png)" in section
    assert "Of 50 train documents 10 (20.0 %) were left out: 3 without text, 7 refused." in section and "- document 7 of a.jsonl: it holds an image" in section
    assert '- conversations in "messages" (a.jsonl)' in section
    assert summary["data"]["source"] == "a.jsonl and 1 other file" and summary["data"]["train_tokens"] == 17_920


def test_what_the_card_does_not_have_is_not_shown(summary):
    for split in summary["data"]["splits"].values():
        split.update(left_out={}, sources=split["sources"][:1])
    summary["data"].update(refused=[], forms=[], examples=[])
    section = data_section(summary)
    assert "No document was left out." in section and "| train | 40 |" in section
    assert not [words for words in ("refused", "share of tokens", "read as", "```", "lengths.png") if words in section]


def test_data_made_by_an_earlier_version_has_a_headline_and_no_more(settings, results, tmp_path):
    del results["data"].facts["card"]
    summary = build_summary([lap_of(settings, results)])
    assert data_section(summary, list(PLOTS)).splitlines()[2] == "Data is done." and "|" not in data_section(summary, list(PLOTS))
    assert summary["data"] == {"source": "a.jsonl and 1 other file", "train_documents": 40, "train_tokens": 17_920}
    assert PLOTS["lengths.png"](summary) is None


def test_only_documents_without_a_row_of_their_own_are_said_to_have_none(summary):
    summary["data"].update(rows="documents")
    summary["data"]["splits"]["train"]["documents"], summary["data"]["splits"]["heldout"]["documents"] = 72, 3
    assert "2 train documents have nothing to learn from" in data_section(summary)
    summary["data"]["splits"]["train"]["limit_tokens"] = 17_920  # whether they had one is not known then
    assert "nothing to learn from" not in data_section(summary) and "stopped at 17,920 tokens" in data_section(summary)


HOSTILE = "a | b\n````\n# A heading\n<script>alert(1)</script>\n![x](y) $x$ &amp;\n- item\x1b[31m\u202e\ud800\r\n"


def html_of(summary: dict) -> str:
    return page_html(page_markdown(summary, []), "")


def test_no_document_breaks_the_page(summary):
    """What is compared is the page's skeleton: its tags, with and without the hostile text. The control has it between simple fences."""
    tags = re.compile(r"<(\w+)[^>]*>")
    before = tags.findall(html_of(summary))
    data = summary["data"]
    data["examples"][0]["parts"] = [[HOSTILE + "````", True]]
    data["refused"], data["forms"] = [[HOSTILE, HOSTILE]], [[HOSTILE, HOSTILE]]
    data["splits"]["train"]["sources"][1]["source"] = data["source"] = HOSTILE
    data["splits"]["train"]["left_out"] = {HOSTILE: 3}
    page = html_of(summary)
    assert tags.findall(page) == before
    assert "&lt;script&gt;" in page and "# A heading⏎" in page and "␛[31m&lt;U+202E&gt;&lt;U+D800&gt;␍⏎" in page and not set("\x1b\u202e\ud800") & set(page)
    assert {"h1", "img", "li"} <= set(tags.findall(page_html(f"```\n{HOSTILE}```\n", "")))


def places_of_text(value, place=()):
    """Where a summary has a text."""
    if isinstance(value, str):
        yield place
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_of_text(one, (*place, key))


# What the page looks things up by, and what is drawn as code letter by letter: no text of others.
LOOKED_UP = {"pattern", "model_type", "kinds", "rows", "kept_layers"}


def test_no_text_at_all_breaks_the_page(summary):
    """Every text of the summary in turn, a candidate's id wherever it stands, but for those that Python looks things up by, which are ours."""
    tags, seen_as_text = re.compile(r"<(\w+)[^>]*>"), 0
    before, places = tags.findall(html_of(summary)), [place for place in places_of_text(summary) if not LOOKED_UP & set(place)]
    for place in places:
        other = copy.deepcopy(summary)
        holder = functools.reduce(lambda value, key: value[key], place[:-1], other)
        if place[-1] == "id":
            other = json.loads(json.dumps(summary).replace(holder["id"], json.dumps(HOSTILE + "````")[1:-1]))
        else:
            holder[place[-1]] = HOSTILE + "````"
        page = html_of(other)
        assert "<script" not in page and not set("\x1b\u202e\ud800") & set(page) and tags.findall(page) == before, place
        seen_as_text += "&lt;script" in page
    assert seen_as_text > 40 and len(places) > 60


def test_what_counts_for_the_loss_is_marked_where_not_all_of_it_does(summary):
    parts = [["user: hi\nassistant:", False], [" Hello!\n+ 1", True], ["\nuser", False]]
    example = {"row": 0, "tokens": 90, "first_token": 5, "shown_tokens": 40, "parts": parts}
    assert row_lines(example) == ["…", "  user: hi⏎", "  assistant:", "+  Hello!⏎", "+ + 1", "  ⏎", "  user", "…"]
    whole = example | {"parts": [["".join(text for text, _ in parts), True]]}
    assert not [line for line in row_lines(whole) if line.startswith("+")] and "  user: hi⏎" in row_lines(whole)
    summary["data"].update(answers_only=True, counted_share=0.25, examples=[example])
    assert "Only answers count for the loss, 25.0 % of all tokens" in data_section(summary) and "```diff\n…\n  user: hi⏎" in data_section(summary)
    summary["data"].update(answers_only=False)
    assert "Every token counts" in data_section(summary) and "```text" in data_section(summary)


def test_a_row_is_shown_letter_by_letter_until_it_is_long():
    text = "  two  spaces " * 40 + "\n\n" + "x" * 300 + "\tend"
    example = {"row": 0, "tokens": 90, "first_token": 0, "shown_tokens": 90, "parts": [[text, True]]}
    lines = row_lines(example)
    assert "".join(line[2:] for line in lines).replace("⏎", "\n") == text and max(map(len, lines)) <= 112
    long = row_lines(example | {"parts": [["line\n" * 500, True]]})
    assert len(long) == 16 and long[12] == "… 485 lines"
    assert len(row_lines(example | {"parts": [["a\n", False], ["b\n", True]] * 500})) == 49


def test_rows_made_for_distillation_are_told_with_what_they_left_out(settings, results):
    made = {"source": "b|c.jsonl", "sequence_length": 128, "rows": 10, "tokens": 640, "filled_share": 0.5}
    more = made | {"documents": 9, "left_out": {"without text": 1}, "refused": [["document 1 of b", "why"]]}
    earlier = made | {"source": "old.jsonl"}  # an earlier version did not count what it left out
    results["phase_rows"] = _finished(settings, "phase_rows", {"rows": {"0123": more, "4567": earlier}})
    summary = build_summary([lap_of(settings, results)])
    page = page_markdown(summary, [])
    section = page[page.index("## phase_rows") :]
    assert summary["more_rows"] == {"phase_rows": [more, earlier]}
    assert "| b\\|c.jsonl | 128 | 10 | 640 | 50.0 % |" in section and "| old.jsonl | 128 |" in section
    assert "b\\|c.jsonl: Of 10 train documents 1 (10.0 %) were left out: 1 without text." in section and "- document 1 of b: why" in section
    assert section.count("were left out") == 1


def test_the_plot_of_lengths_is_drawn_again_when_the_lengths_change(summary, tmp_path, monkeypatch):
    monkeypatch.setattr("minitron.report.plots.PLOTS", {"lengths.png": PLOTS["lengths.png"]})
    drawn = []
    for change in ({}, {"refused": []}, {"sequence_length": 512}):
        summary["data"].update(change)
        draw_plots(summary, tmp_path)
        drawn.append((tmp_path / "lengths.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_plot_of_lengths_has_a_bar_for_each_power_and_the_rows_length(summary):
    axes = PLOTS["lengths.png"](summary).axes[0]
    assert [[bar.get_height() for bar in bars] for bars in axes.containers] == [[25.0, 0.0, 72.5, 2.5], [0.0, 50.0, 50.0, 0.0]]
    assert [int(bar.get_x()) for bar in axes.containers[0]] == [7, 8, 9, 11]  # from 129, 257, 513 and 2,049 tokens on
    assert axes.lines[0].get_xdata()[0] == 8 and "256 tokens" in axes.lines[0].get_label()


def test_the_table_has_the_lowest_loss_of_the_highest_rung_first(summary):
    rows = [line.split(" | ") for line in candidates_table(summary["candidates"]).splitlines()[2:]]
    assert [row[0] for row in rows] == ["| 1. **L8-F32**", "| 2. L8-F24", "| 3. L8-F16"]  # by zero-shot loss L8-F24 would lead
    assert [row[1] for row in rows] == ["5.000", "5.200", "–"]
    assert [row[-1] for row in rows] == ["**chosen**, front |", "front |", " |"]


def test_a_diverged_candidate_stays_in_the_table_with_its_note(summary):
    summary["candidates"][1].update(short_distill_loss=None, tokens_per_second=None, on_pareto_front=False, note="its short distillation diverged")
    assert re.search(r"3?\. L8-F24 .*its short distillation diverged \|", candidates_table(summary["candidates"]))
    page = page_markdown(summary, [])
    assert "| L8-F24 | diverged |" in page and "| L8-F32 | 5.000 |" in page


def test_a_speed_measured_beside_other_work_is_marked(summary):
    """True and not known are the controls."""
    for candidate, alone in zip(summary["candidates"], (True, False, None), strict=True):
        candidate["speed_alone"] = alone
    marked = [line.split(" | ")[0] for line in candidates_table(summary["candidates"]).splitlines() if "decoded beside other work" in line]
    assert marked == ["| 2. L8-F24"] and "too low to compare" in table_notes(summary, summary)
    speed = {"input_tokens": 8, "output_tokens": 4, "batch": 1, "prefill_seconds": 1.0, "prefill_tokens_per_second": 8.0, "decode_tokens_per_second": 4.0,
             "peak_bytes": 2**20, "device": "cpu", "threads": 1}  # fmt: skip
    for name, alone in (("teacher", True), ("pruned", False), ("student", None)):
        summary["models"][name]["evaluation"]["speed"] = [speed | {"alone": alone}]
    assert [line.split(" | ")[1] for line in speed_table(summary).splitlines()[2:]] == ["teacher", "pruned †", "student"]
    assert "† other processes kept this machine's cores busy" in speed_note(summary)


def test_the_choice_is_told_with_its_rivals(summary):
    first, rival, zero_shot = choice_sentences(summary)
    assert first == "**L8-F32** was chosen of 4 architectures (3 fit, 3 came on the shortlist, 2 of them were distilled briefly): lowest loss."
    assert "L8-F24, is 0.200 nats/token higher" in rival and zero_shot == "By zero-shot loss alone L8-F24 was first."
    summary["candidates"][1]["zero_shot_loss"] = 5.2
    assert choice_sentences(summary)[2] == "It was first by zero-shot loss too."


def test_before_the_search_the_table_has_what_is_measured_and_nobody_is_chosen(settings, results):
    summary = build_summary([lap_of(settings, {name: results[name] for name in STAGES[: STAGES.index("screen L8-F24")]})])
    losses = {one["id"]: one["short_distill_loss"] for one in summary["candidates"]}
    assert losses == {"L8-F32": 5.0, "L8-F24": None, "L8-F16": None} and not any(one["chosen"] for one in summary["candidates"])
    assert "| 1. L8-F32 | 5.000 |" in page_markdown(summary, [])
    assert removed_layers(summary) == []


def test_two_laps_have_a_section_each_and_shared_stages_one(two_laps):
    page = page_markdown(two_laps, list(PLOTS))
    assert re.findall("\n## (.+)\n", page) == ["What they write", "data", "teacher", "First lap: depth", "Second lap: widths", "Where and how"]
    laps = page[page.index("## First lap") :].split("## Second lap")
    after_score = ["shortlist", "teacher_cache", "screen", "search", "prune", "distill"]
    assert re.findall("\n### (\\w+)\n", laps[0]) == ["score", *after_score]
    assert re.findall("\n### (\\w+)\n", laps[1]) == ["base", "score", *after_score, "evaluate"]
    assert "| L7 | 5.300 |" in laps[0] and "L8-F24" not in laps[0] and "| L8-F24 | 5.200 |" in laps[1] and "L7" not in laps[1]


def test_every_plot_of_two_laps_says_of_which_it_is(two_laps):
    page = page_markdown(two_laps, list(PLOTS))
    captions = {name: caption for caption, name in re.findall(r"!\[(.*)\]\((.*)\)", page)}
    first, second = ("depth_lap.png", "layer_importance.png"), ("width_importance.png", "candidates.png", "pareto.png", "distillation.png")
    assert set(captions) == set(PLOTS) - {"thinking_budget.png"}  # of a stage that these laps have not
    assert all(captions[name].startswith("First lap: ") for name in first) and all(captions[name].startswith("Second lap: ") for name in second)
    assert not captions["memory.png"].startswith(("First", "Second"))


def test_the_data_of_two_laps_is_told_once(two_laps):
    page = page_markdown(two_laps, list(PLOTS))
    assert page.count("Once upon") == 1 == page.count("](lengths.png)") and page.index("Once upon") < page.index("## First lap")


def test_layers_removed_in_the_first_lap_are_the_teachers_while_the_second_is_under_way(two_laps):
    del two_laps["models"]["pruned"], two_laps["models"]["student"]
    assert removed_layers(two_laps) == [7]  # the second lap's candidates keep layers 0 to 7, of the first lap's student
    assert "student  M-M*-M- -" in pattern_lines(two_laps)


def test_the_architecture_of_two_laps_is_held_against_the_real_teacher(two_laps):
    page = page_markdown(two_laps, [])
    assert "| layers | 9 | 8 | −11.1 % |" in page and "| FFN neurons | 48 | 32 | −33.3 % |" in page


def test_a_first_lap_alone_is_not_judged_as_the_whole_run(settings, tiny, config_of):
    laps = two_finished_laps(settings, tiny, config_of)
    text = verdict(build_summary(laps[:1]))
    assert "Only the first lap, depth, is under way" in text and "not distilled yet" not in text
    assert "Only the first lap" not in verdict(build_summary(laps))


def test_a_second_lap_that_has_not_begun_says_so(two_laps):
    assert "Nothing of it is done yet" not in page_markdown(two_laps, [])
    two_laps["stages"] = {name: two_laps["stages"][name] for name in ("data", "teacher")}
    assert "## Second lap: widths\n\nNothing of it is done yet." in page_markdown(two_laps, [])


def test_layers_of_a_given_base_are_called_the_bases(summary):
    summary["base"] = {"architecture": {"pattern": "M-M*-M-*"}}
    summary["removed_layers"] = [6]
    assert "base     M-M*-M-*" in pattern_lines(summary) and "teacher" not in pattern_lines(summary)


def test_unmeasured_candidates_come_last():
    zero, short, none = ({"id": name, "zero_shot_loss": a, "short_distill_loss": b} for name, a, b in (("z", 1.0, None), ("s", 9.0, 8.0), ("n", None, None)))
    assert [one["id"] for one in best_first([none, zero, short])] == ["s", "z", "n"]


def test_the_front_of_speed_and_loss_is_what_nothing_beats():
    points = [(10.0, 5.0), (20.0, 5.5), (15.0, 5.6), (20.0, 5.7), (5.0, 4.9), (10.0, 5.0)]
    beaten = [a for a in points if any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in points)]
    assert sorted(non_dominated(points)) == sorted(set(points) - set(beaten))


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
    for name, speed in (("pruned", 60.0), ("teacher", 40.0)):
        summary["models"][name]["evaluation"]["decode_tokens_per_second"] = speed
    assert "decodes 1.25 × as fast" in verdict(summary) and "good to 20 % only" in verdict(summary)


def test_removed_layers_are_marked_under_their_letters(summary):
    layers, teacher, removed, student = (line[9:] for line in pattern_lines(summary).splitlines()[1:5])
    assert teacher == "M-M*-M-*-" and student == "M-M*-M- -" and removed == "       ^"


WINDOWS = Architecture(model_type="gemma3_text", pattern="W-W-*-W-", hidden=32, vocab=300, ffn=48, ffn_gated=True, num_attention_heads=4,
                       num_key_value_heads=2, attention_head_dim=8, window=128, post_norms=True)  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "left", "picture", "legend", "rows"),
    [
        ("W-W-*-W-", "W-*-W-", "WWBW", "1. B is a block of attention and FFN, W is a block of attention within a window and FFN.",
         ["layers | 4 | 3", "– attention + FFN | 1 | 1", "– attention within a window + FFN | 3 | 2", "window of attention (tokens) | 128 | 128"]),
        ("W-W-W-W-", "W-W-W-", "WWWW", "1. W is a block of attention within a window and FFN.", ["layers (attention within a window + FFN) | 4 | 3"]),
        ("*-*-*-*-", "*-*-*-", "BBBB", "1. B is a block of attention and FFN.", ["layers (attention + FFN) | 4 | 3"]),
    ],
)  # fmt: skip
def test_blocks_within_a_window_have_a_letter_and_a_row_of_their_own(pattern, left, picture, legend, rows):
    teacher, student = (replace(WINDOWS, pattern=one) for one in (pattern, left))
    models = {"teacher": {"architecture": as_dict(teacher), "parameters": 2000}, "pruned": {}}
    lines = pattern_lines({"models": models, "base": {}, "depth_lap": {}, "candidates": [], "removed_layers": [1]})
    assert lines.splitlines()[2] == f"teacher  {picture}" and lines.endswith(f"removed: {legend}")
    table = architecture_table({"models": models}, {"architecture": as_dict(student), "parameters": 1500})
    assert all(f"| {row} |" in table for row in [*rows, "query heads | 4 | 4"]) and ("window" in table) == ("W" in pattern)


def test_the_card_of_a_model_with_windows_says_how_many(tiny):
    card = model_card("x", lines=[], architecture=WINDOWS, base=None)
    assert "| layers | 4 blocks of attention and FFN, 3 of them within a window of 128 tokens |" in card and "Pattern letters" not in card
    assert "Pattern letters" in model_card("x", lines=[], architecture=tiny, base=None)


def test_names_and_headlines_are_text_and_no_markup(summary):
    summary["run_name"] = "<b>small*run*</b>"
    page = page_html(page_markdown(summary, []), "<b>")
    assert "Small | teacher, pattern M-M*-M-*-." in page and "<h1>Run &lt;b&gt;small*run*&lt;/b&gt;</h1>" in page and "<title>&lt;b>" in page
    assert "<p>&lt;b&gt;</p>" in page_html("<b>", "")


def test_the_html_page_has_tables_and_images_beside_it(whole):
    page = (whole[0] / "report.html").read_text()
    assert page.count("<table>") == 8 and all(f'<img src="{name}"' in page for name in ONE_LAP_PLOTS)


def folded(page: str) -> list[str]:
    """What stands in the lines that a reader sees of folded sections."""
    return [re.sub(r"<[^>]+>", " ", line) for line in re.findall(r"<summary>(.*?)</summary>", page)]


def test_what_a_stage_did_is_folded_under_its_one_line_and_the_verdict_is_not(whole):
    page = (whole[0] / "report.html").read_text()
    lines, (before, *_) = folded(page), page.split("<details>")
    assert [line.split()[0] for line in lines] == [*SECTIONS, "Planned", "Where"] and "Small | teacher, pattern M-M*-M-*-." in lines[1]
    assert "<strong>The student fits</strong>" in before and "<table>" in before and 'src="memory.png"' in before and "lengths.png" not in before
    assert page.count("<details>") == page.count("</details>") == len(lines)
    assert folded(page_html("# Title\n\nwords\n", "")) == [], "the control: a page without sections has nothing to fold"


def test_laps_are_folded_with_their_stages_folded_within(two_laps):
    page = html_of(two_laps)
    first = page.split("<summary><h2>First lap: depth</h2>")[1].split("<summary><h2>Second lap")[0]
    assert [line.split()[0] for line in folded(first)] == ["score", "shortlist", "teacher_cache", "screen", "search", "prune", "distill"]


def fetched(page: str) -> list[str]:
    """What a browser would ask of others when it shows a page: all but files beside it, and links that wait for a click."""
    places = re.findall(r"""(?:src|srcset|poster|data|action)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)|@import\s+(\S+)|<link[^>]*>|<script""", page)
    return [place for place in map("".join, places) if not re.fullmatch(r"\w+\.png", place)]


def test_the_page_asks_nothing_of_others(whole, two_laps):
    assert fetched((whole[0] / "report.html").read_text()) == [] == fetched(html_of(two_laps))


@pytest.mark.parametrize("planted", ["![x](https://example.org/x.png)", "![x](//example.org/x.png)", "![x](../x.png)"])
def test_a_page_that_would_ask_others_is_caught(planted):
    assert len(fetched(page_html(planted, ""))) == 1


def with_errors(summary: dict, **errors: float) -> dict:
    """The summary with standard errors of what the cut cost, what was won back and what is left."""
    summary["recovery"]["differences"] = {name: {"nats_per_token": 0.0, "standard_error": error} for name, error in errors.items()}
    return summary


def test_a_difference_within_noise_is_said_to_be_none(summary):
    """Losses are 5.0, 5.5 and 5.2; small errors and none are the controls."""
    assert "it is worse than the teacher: +0.200 nats per token" in verdict(summary) and "±" not in verdict(summary)
    said = verdict(with_errors(summary, cut=0.01, won=0.01, left=0.01))
    assert "it is worse than the teacher: +0.200 ± 0.020 nats per token, perplexity +22.1 %" in said
    assert "cost 0.500 ± 0.020 nats" in said and "60 % of it" in said
    said = verdict(with_errors(summary, cut=0.2, won=0.2, left=0.2))
    assert "it is as good as the teacher, as far as these rows can tell: +0.200 ± 0.392" in said and "distillation hardly changed that" in said


def test_a_plain_slice_within_noise_is_called_as_good(summary):
    sliced = {name: summary["models"][name]["evaluation"] | {"loss_nats_per_token": loss} for name, loss in (("pruned", 6.0), ("student", 5.25))}
    summary["against_slice"] = {"models": sliced, "tokens": 5120, "learning_rate": 0.005}
    assert "trained on the same tokens, is 0.050 nats worse." in verdict(summary) and "cannot tell" not in verdict(summary)
    summary["against_slice"]["difference"] = {"nats_per_token": 0.05, "standard_error": 0.04}
    said = verdict(summary)
    assert "is as good, as far as these rows can tell." in said and "0.050 ± 0.078 lower. These rows cannot tell that from nothing." in said


def test_speeds_no_further_apart_than_noise_are_called_equal(summary):
    for name, speed in (("teacher", 50.0), ("pruned", 60.0), ("student", 52.0)):
        summary["models"][name]["evaluation"]["decode_tokens_per_second"] = speed
    assert "too rough to tell student and teacher apart" in verdict(summary) and "1.04 ×" not in verdict(summary)
    summary["models"]["student"]["evaluation"]["decode_tokens_per_second"] = 62.0
    assert "decodes 1.24 × as fast as the teacher" in verdict(summary)


def test_what_it_took_counts_shared_stages_of_two_laps_once(two_laps):
    """Every stage took 1.5 s; data and teacher are of both laps."""
    distinct = {(stage["key"], label) for lap in (two_laps, two_laps["depth_lap"]) for label, stage in lap["stages"].items() if label != "base"}
    number = sum(len(lap["stages"]) for lap in (two_laps, two_laps["depth_lap"]))
    assert f"**What it took.** {1.5 * len(distinct):.1f} s" in verdict(two_laps) and len(distinct) < number - 1
    assert "Distillation learnt from 5,120 and 5,120 tokens." in verdict(two_laps)


def test_a_plot_is_drawn_again_only_when_its_data_changed(summary, tmp_path):
    draw_plots(summary, tmp_path)
    before, drawn = {name: (tmp_path / name).stat().st_ino for name in ONE_LAP_PLOTS}, (tmp_path / "memory.png").read_bytes()
    draw_plots(summary, tmp_path)
    assert {name: (tmp_path / name).stat().st_ino for name in ONE_LAP_PLOTS} == before
    summary["budget"]["bytes"] += 10_000
    draw_plots(summary, tmp_path)
    assert (tmp_path / "memory.png").read_bytes() != drawn


def test_a_plot_of_the_first_lap_is_drawn_again_when_its_losses_change(two_laps, tmp_path, monkeypatch):
    monkeypatch.setattr("minitron.report.plots.PLOTS", {"depth_lap.png": PLOTS["depth_lap.png"]})
    draw_plots(two_laps, tmp_path)
    drawn = (tmp_path / "depth_lap.png").read_bytes()
    two_laps["depth_lap"]["stages"]["score"]["cached"] = True
    draw_plots(two_laps, tmp_path)
    assert (tmp_path / "depth_lap.png").read_bytes() == drawn
    two_laps["depth_lap"]["candidates"][1]["short_distill_loss"] = 5.1
    draw_plots(two_laps, tmp_path)
    assert (tmp_path / "depth_lap.png").read_bytes() != drawn


def test_candidates_without_a_modelled_speed_have_no_pareto_plot(summary):
    assert PLOTS["pareto.png"](summary) is not None
    for candidate in summary["candidates"]:
        candidate["modelled_tokens_per_second"] = None
    assert PLOTS["pareto.png"](summary) is None


def test_every_plot_is_a_png_of_readme_width(whole):
    for name in ONE_LAP_PLOTS:
        data = (whole[0] / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n") and int.from_bytes(data[16:20], "big") == 960


def test_the_page_of_an_unchanged_run_loads_neither_torch_nor_matplotlib(whole, repository, environment):
    folder, _ = whole
    code = f"""
import json, sys
from pathlib import Path
from minitron.report.plots import draw_plots
from minitron.report.html import page_html
from minitron.report.page import page_markdown
summary = json.loads(Path({str(folder / "summary.json")!r}).read_text())
page = page_html(page_markdown(summary, draw_plots(summary, Path({str(folder)!r}))), "")
print(len(page) > 1000, [name for name in ("torch", "transformers", "matplotlib") if name in sys.modules])
"""
    printed = subprocess.run([sys.executable, "-c", code], env=environment, cwd=repository, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "True []"
