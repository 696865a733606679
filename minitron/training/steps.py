"""What the two stages that train share: the plan from settings, and every step's record to bar, file and tracker."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from enum import Enum

from distill.plan import StepRecord, TrainPlan
from distill.states import drop_damaged, newest_state
from minitron.families.base import ROUTER
from minitron.machine import processes
from minitron.settings.training import Balance, Router, TrainSettings
from minitron.walk.stage import StageContext
from minitron.walk.tracking import Tracker, open_tracker

METRICS_FILE = "metrics.jsonl"
UNTRACKED = ("loss", "step", "total_steps", "recent_loss", "seconds", "phase")


def train_plan(settings: TrainSettings) -> TrainPlan:
    """The settings as distill knows them."""
    values = {name: getattr(settings, name) for name in TrainPlan.__slots__ if hasattr(settings, name)}
    values["frozen"] = ROUTER.removeprefix("mixer") if settings.router is Router.frozen else None
    values["balance_rate"] = settings.balance_rate if settings.balance is Balance.bias else None
    if values["gradient_checkpointing"] == "auto":  # nobody has planned: the tiny teacher, which fits everywhere
        values["gradient_checkpointing"] = False
    return TrainPlan(**{name: value.value if isinstance(value, Enum) else value for name, value in values.items()})


@contextmanager
def tracked_steps(context: StageContext, description: str, tokens: int, *, loss_name: str, tracker: Tracker | None = None, alone: bool = False
                  ) -> Iterator[Callable[[StepRecord], None]]:  # fmt: skip
    """Yields on_step(record): advances the bar, appends to metrics.jsonl and tells the tracker, one of its own unless given.

    Where there is a saved state to go on from, that is said; lines of steps that will be done again are dropped. What the tracker's run is left with as its
    loss is the mean of the last steps, as the headline says it. `alone`: in the first process, while the others wait for the stage's result.
    """
    damages = drop_damaged(context.folder) if processes.rank() == 0 else None
    for damaged in damages if alone else processes.from_first(damages):
        context.console.say(damaged)
    path, saved = context.folder / METRICS_FILE, newest_state(context.folder)
    before = saved.facts["record"] if saved else {"tokens": 0}
    if saved:
        context.goes_on(f"step {before['step'] + 1:,} of {before['total_steps']:,} ({description})")
    own = open_tracker(context.settings, description) if tracker is None else nullcontext(tracker)
    with context.console.track(description, tokens, "tokens", done=before["tokens"]) as advance, own as track:
        file, seen, recent = None, before["tokens"], None

        def on_step(record: StepRecord) -> None:
            nonlocal file, seen, recent
            if file is None:
                kept = [line for line in _lines(path) if json.loads(line)["step"] < record.step]
                path.write_text("".join(kept))
                file = path.open("a", buffering=1)
            advance(record.tokens - seen, f"{loss_name} {record.recent_loss:.3f} nats/token")
            seen, recent = record.tokens, record.recent_loss
            line = {name: value for name, value in asdict(record).items() if name != "watched"} | record.watched
            file.write(json.dumps(line) + "\n")
            track({name: value for name, value in line.items() if name not in UNTRACKED} | {loss_name: record.loss})

        try:
            yield on_step
            if recent is not None:
                track.summarise({loss_name: recent})
        finally:
            if file is not None:
                file.close()


def _lines(path) -> list[str]:
    """Whole lines only: an interrupted run may have left half of one."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
