"""wandb, and nothing else knows of it. Off by default; offline needs no account; wandb's own environment variables come first."""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from memory_budget.units import to_gib
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings, Stage, Tracking
from minitron.walk.shown import all_without_secrets, without_secrets


class Tracker:
    """One wandb run; calling it logs a step's values. Without a run it keeps silent."""

    def __init__(self, run=None):
        self._run = run

    def __call__(self, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.log(dict(values))

    def summarise(self, values: Mapping[str, Any]) -> None:
        """What is left of the run at a glance: its numbers and words."""
        if self._run is not None:
            self._run.summary.update({name: value for name, value in values.items() if isinstance(value, int | float | str)})


def open_tracker(settings: Settings, name: str) -> AbstractContextManager[Tracker]:
    """A context that gives the Tracker of a run of this name, grouped by run_name and configured by the settings."""
    return _tracker(settings, name, key_settings(settings))


def open_candidate(settings: Settings, entry: Mapping[str, Any]) -> AbstractContextManager[Tracker]:
    """The same for a candidate of the shortlist, configured by its architecture and its GiB; under `wandb agent` it is the sweep's run."""
    memory = {f"{part}_gib": to_gib(size) for part, size in entry["memory_bytes"].items()}
    config = {"candidate": entry["id"], **entry["architecture"], "parameters": entry["parameters"], **memory}
    # With two laps, the first screens depths on the way to what was asked for: those are no trials.
    return _tracker(settings, entry["id"], config, trial=settings.stage is Stage.screen)


def record_finished(settings: Settings, entry: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Give a sweep the measurements of a candidate that was done before; outside of sweeps what is done is recorded already."""
    if _in_sweep():
        with open_candidate(settings, entry) as tracker:
            tracker.summarise({**entry, **facts})


def record_search(settings: Settings, entries: list[dict]) -> None:
    """The table of all candidates and their Pareto plot."""
    run = _start(settings, "search", key_settings(settings.search))
    if run is None:
        return
    import wandb

    columns = sorted({name for entry in entries for name, value in entry.items() if not isinstance(value, dict | list)})
    rows = [[entry.get(name) for name in columns] + [to_gib(entry["memory_bytes"]["total"])] for entry in entries]
    table = wandb.Table(columns=[*columns, "memory_gib"], data=rows)
    loss = "short_distill_loss" if any(entry["short_distill_loss"] is not None for entry in entries) else "zero_shot_loss"
    with run:
        run.log({"candidates": table, "pareto": wandb.plot.scatter(table, "memory_gib", loss, title="Memory against loss")})


@contextmanager
def _tracker(settings: Settings, name: str, config: Mapping[str, Any], *, trial: bool = False) -> Iterator[Tracker]:
    run = _start(settings, name, config, trial=trial)
    if run is None:
        yield Tracker()
        return
    with run:  # ends it as failed where an exception passes
        yield Tracker(run)


def _start(settings: Settings, name: str, config: Mapping[str, Any], *, trial: bool = False):
    """A run, or None where none is kept: tracking is off, or this is work on the way to a sweep's trial, which has one run only.

    Raises ValueError where wandb refuses, for want of an account say.
    """
    if settings.tracking is Tracking.disabled or (_in_sweep() and not trial):
        return None
    if not {"WANDB_SILENT", "WANDB_QUIET"} & os.environ.keys():  # its own lines stay off the terminal; offline there is nothing in them to follow
        offline = os.environ.get("WANDB_MODE", settings.tracking.value) == "offline"
        os.environ["WANDB_SILENT" if offline else "WANDB_QUIET"] = "true"
    import wandb

    ours = {"mode": settings.tracking.value, "dir": settings.runs_folder}
    if not _in_sweep():  # a sweep's runs are in the sweep's project
        ours["project"] = "minitron"
    ours = {name: value for name, value in ours.items() if f"WANDB_{name.upper()}" not in os.environ}
    try:
        return wandb.init(group=settings.run_name, name=f"{settings.run_name}: {name}", config=all_without_secrets(config), reinit="finish_previous", **ours)
    except wandb.Error as error:
        reason = without_secrets(" ".join(str(error).split()))
        raise ValueError(f"tracking is {settings.tracking.value}, which wandb refuses: {reason}; tracking=offline needs no account") from None


def _in_sweep() -> bool:
    """Whether `wandb agent` has started this process."""
    return "WANDB_SWEEP_ID" in os.environ
