"""Teacher, pruned and student measured alike: held-out text, speed, long context, prompts gone on with, tasks of lm-eval."""

from pathlib import Path
from typing import Any

from minitron.machine import processes
from minitron.measures.tasks import check_tasks, tasks_identity
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings
from minitron.settings.teachers import max_positions
from minitron.walk.stage import StageContext, StoredStage
from minitron.walk.store import make_runs_folder


def what(settings: Settings) -> Any:
    measured = key_settings(settings.evaluate)
    given = [name for name in ("prompts", "held_out_prompts") if measured[name]]
    names = ("samples", "speed", "needle", *given, *(["new_tokens"] if given else []))  # the last ones keys of earlier versions do not have
    return {**{name: measured[name] for name in names}, "tasks": tasks_identity(settings.evaluate)}


def check(settings: Settings) -> None:
    settings.evaluate.check_positions(max_positions(settings))
    if settings.evaluate.tasks and processes.rank() == 0:
        make_runs_folder(settings.runs_folder)  # where tasks that were found good are remembered
        check_tasks(settings.evaluate, Path(settings.runs_folder) / "store")


def run(context: StageContext) -> dict:
    from minitron.measures.evaluation import evaluate_models

    return evaluate_models(context)


STAGE = StoredStage(version=2, needs=lambda settings: ("data", "teacher", "prune", "distill"), what=what, check=check, run=run, ends_all=lambda settings: True)
