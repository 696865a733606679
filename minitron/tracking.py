"""wandb, and nothing else knows of it. Off by default; offline needs no account."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from memory_budget.units import to_gib
from minitron.pipeline import StageContext
from minitron.setting_rules import key_settings
from minitron.settings import Tracking


class Tracker:
    """One wandb run; calling it logs a step's values. Without a run it keeps silent."""

    def __init__(self, run=None):
        self._run = run

    def __call__(self, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.log(dict(values))

    def summarise(self, values: Mapping[str, Any]) -> None:
        """What is left of the run at a glance: its numbers."""
        if self._run is not None:
            self._run.summary.update({name: value for name, value in values.items() if isinstance(value, int | float | str)})


@contextmanager
def open_tracker(context: StageContext, name: str, config: Mapping[str, Any] | None = None) -> Iterator[Tracker]:
    """A run of this name in the group of the run; `config` is the settings unless given."""
    if context.settings.tracking is Tracking.disabled:
        yield Tracker()
        return
    run = _start(context, name, config=key_settings(context.settings) if config is None else config)
    try:
        yield Tracker(run)
    finally:
        run.finish()


def candidate_config(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A candidate's run is configured by its architecture and its GiB."""
    memory = {f"{part}_gib": to_gib(size) for part, size in entry["memory_bytes"].items()}
    return {"candidate": entry["id"], **entry["architecture"], "parameters": entry["parameters"], **memory}


def record_search(context: StageContext, entries: list[dict]) -> None:
    """The table of all candidates and their Pareto plot."""
    if context.settings.tracking is Tracking.disabled:
        return
    import wandb

    columns = sorted({name for entry in entries for name, value in entry.items() if not isinstance(value, dict | list)})
    rows = [[entry.get(name) for name in columns] + [to_gib(entry["memory_bytes"]["total"])] for entry in entries]
    table = wandb.Table(columns=[*columns, "memory_gib"], data=rows)
    loss = "short_distill_loss" if any(entry["short_distill_loss"] is not None for entry in entries) else "zero_shot_loss"
    run = _start(context, "search", config=key_settings(context.settings.search))
    run.log({"candidates": table, "pareto": wandb.plot.scatter(table, "memory_gib", loss, title="Memory against loss")})
    run.finish()


def _start(context: StageContext, name: str, *, config: dict):
    import wandb

    settings = context.settings
    return wandb.init(project="minitron", group=settings.run_name, name=f"{settings.run_name}: {name}", config=config,
                      mode=settings.tracking.value, dir=settings.runs_folder, reinit="finish_previous")  # fmt: skip
