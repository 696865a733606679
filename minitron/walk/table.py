"""The stages there are, in which order they run, and where a stage's result lies. The modules of minitron/stages/ are loaded here, by their names."""

import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from minitron.settings.run import Settings, Stage
from minitron.walk.stage import StoredStage, UsingStage
from minitron.walk.store import Result, stage_key


@cache
def stages() -> Mapping[str, StoredStage | UsingStage]:
    """Every stage's declaration by its name."""
    return {stage.value: importlib.import_module(f"minitron.stages.{stage.value}").STAGE for stage in Stage if stage is not Stage.all}


def stored_stages() -> Mapping[str, StoredStage]:
    """Those whose results are kept."""
    return {name: stage for name, stage in stages().items() if isinstance(stage, StoredStage)}


def using_stages() -> Mapping[str, UsingStage]:
    """Those that use what is done."""
    return {name: stage for name, stage in stages().items() if isinstance(stage, UsingStage)}


def order_of(settings: Settings) -> list[str]:
    """The stored stages to run for `settings.stage`, each after what it needs; of a stage that uses what is done, those of stage=all."""
    # All there is are the stages that end it and what they need; so a stage that nothing needs under these settings is left out.
    table, order = stored_stages(), []
    wanted = [settings.stage.value] if settings.stage.value in table else [name for name, stage in table.items() if stage.ends_all(settings)]

    def visit(name: str) -> None:
        for need in table[name].needs(settings):
            visit(need)
        if name not in order:
            order.append(name)

    for name in wanted:
        visit(name)
    return order


def label_of(name: str, settings: Settings) -> str:
    """What a result is called in a lap."""
    return f"{name} {settings.candidate}" if stored_stages()[name].per_candidate else name


def stage_of(label: str) -> str:
    """The stage of a result by what it is called."""
    return label.split(" ")[0]


def inputs_of(name: str, settings: Settings, results: Mapping[str, Result]) -> dict[str, Result]:
    """The results that a stage needs, by their labels."""
    needs = stored_stages()[name].needs(settings)
    return {label: result for label, result in results.items() if stage_of(label) in needs}


def stage_folder(name: str, settings: Settings, results: Mapping[str, Result]) -> Path:
    """Where a stage's result lies, or will: <runs folder>/store/<stage>/<key>."""
    stage = stored_stages()[name]
    key = stage_key(name, stage.version, stage.what(settings), stage.of_inputs(settings, inputs_of(name, settings, results)))
    return Path(settings.runs_folder) / "store" / name / key
