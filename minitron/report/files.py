"""summary.json and the page a person opens, from what is done; cheap, so made anew every time."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron.plan.taken import planned_and_taken
from minitron.report.html import page_html
from minitron.report.page import page_markdown
from minitron.report.plots import draw_plots
from minitron.report.summary import METRICS_FILE, MODEL_STAGES, SEARCH_FILES, build_summary
from minitron.report.sweep import sweep_yaml
from minitron.settings.run import Settings, Stage
from minitron.walk.console import Console
from minitron.walk.shown import all_without_secrets
from minitron.walk.stage import Lap
from minitron.walk.store import Result, locked, unwritable, write_text

SWEEP_FILE = "sweep.yaml"


def write_report(settings: Settings, laps: Sequence[Lap], console: Console) -> None:
    """Writes runs/<run name>/: summary.json, report.md, report.html, plots, metrics.jsonl and links to the checkpoints.

    What is left there of an earlier run and is not of this one goes: nothing in the folder contradicts summary.json. A candidate
    screened by itself leaves the folder alone: it is one row of the search's table, and several are screened at once. So does a
    merge: it is no part of the walk that the folder tells of, and a sweep makes several at once. Where the folder cannot be written to,
    a disk to read say, the page is said on the terminal.
    """
    if settings.stage is Stage.screen and settings.candidate is not None:
        return
    if settings.stage is Stage.merge:
        console.say(f"merged checkpoint: {laps[-1].results['merge'].model_folder}")
        return
    if not laps[0].results:
        raise ValueError(f"stage=report shows what is done, but nothing is under these settings in {settings.runs_folder}/store; run stage=all first")
    folder = Path(settings.runs_folder) / settings.run_name
    summary = all_without_secrets(build_summary(laps) | {"plan": planned_and_taken(settings, laps)})
    if reason := unwritable(folder):
        console.say(page_markdown(summary, []))
        console.headline("report", f"above and nowhere else: {folder} cannot be written to ({reason})")
        return
    with locked(folder, console.say):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        copy_tables(folder, laps[-1].results)
        # A first lap's depths are screened on the way, all of them.
        write_sweep(folder, None if laps[-1].settings.search.later_widths.given() else sweep_yaml(summary, all_without_secrets(sys.argv[1:])))
        for reason in link_models(folder, summary["models"]):
            console.say(reason)
        write_page(folder, summary)
    console.headline("report", f"{folder / 'report.html'}")
    if "student" in summary["models"]:
        console.headline(
            "student", f"{folder / 'student'}, a checkpoint that transformers loads; run_name={settings.run_name} stage=export makes a folder to hand out"
        )


def write_page(folder: Path, summary: Mapping[str, Any]) -> None:
    """The plots, report.md and report.html of a summary."""
    markdown = page_markdown(summary, draw_plots(summary, folder))
    write_text(folder / "report.md", markdown)
    write_text(folder / "report.html", page_html(markdown, f"Run {summary['run_name']}"))


def copy_tables(folder: Path, results: Mapping[str, Result]) -> None:
    """The distillation's metrics.jsonl and the search's tables beside the report; none where this run has no such file."""
    for stage, names in (("distill", (METRICS_FILE,)), ("search", SEARCH_FILES)):
        for name in names:
            source = results[stage].folder / name if stage in results else None
            if source is not None and source.exists():
                write_text(folder / name, source.read_text())
            else:
                (folder / name).unlink(missing_ok=True)


def write_sweep(folder: Path, text: str | None) -> None:
    """sweep.yaml, or none where this run has no sweep."""
    if text is None:
        (folder / SWEEP_FILE).unlink(missing_ok=True)
    else:
        write_text(folder / SWEEP_FILE, text)


def link_models(folder: Path, models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Relative links teacher, pruned and student to the checkpoints; a sentence for each that could not be made."""
    problems = []
    for name in MODEL_STAGES:
        link, partial, path = folder / name, folder / f"{name}.partial", models.get(name, {}).get("path")
        try:
            if path is None:
                if link.is_symlink():
                    link.unlink()
                continue
            partial.unlink(missing_ok=True)
            partial.symlink_to(os.path.relpath(Path(path).resolve(), folder.resolve()), target_is_directory=True)
            os.replace(partial, link)
        except OSError as error:  # no symlinks on this disk, or something else of that name
            partial.unlink(missing_ok=True)
            problems.append(f"no link {link} ({error.strerror}); the {name} model is in {path}")
    return problems
