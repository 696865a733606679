"""wandb, and nothing else knows of it. Off by default; offline needs no account."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from memory_budget.units import to_gib
from minitron.pipeline import StageContext
from minitron.settings import Tracking, key_settings


@contextmanager
def open_tracker(context: StageContext, name: str) -> Iterator[Callable[[dict], None]]:
    """Yields track(values), one call per step; a no-op when tracking is disabled."""
    if context.settings.tracking is Tracking.disabled:
        yield lambda values: None
        return
    run = _start(context, name, config=key_settings(context.settings))
    try:
        yield run.log
    finally:
        run.finish()


def record_candidate(context: StageContext, entry: dict, measured: dict) -> None:
    """A run per candidate: the search is its group, its architecture and GiB its config, every measurement its summary."""
    if context.settings.tracking is Tracking.disabled:
        return
    memory = {f"{part}_gib": to_gib(size) for part, size in entry["memory_bytes"].items()}
    run = _start(context, entry["id"], config={"candidate": entry["id"], **entry["architecture"], "parameters": entry["parameters"], **memory})
    run.summary.update({name: value for name, value in {**entry, **measured}.items() if isinstance(value, int | float)})
    run.finish()


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
