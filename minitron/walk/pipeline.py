"""The walk: the stages that a setting asks for, each run once.

Asking for a stage runs what it needs first and reuses what is done, like make. Stage functions live in
`minitron/stages/`, one module per stage with `run(context) -> facts`; they are imported only when they run.
"""

import importlib
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distill.sharing import check_sharing
from minitron.importance.removal import check_rules
from minitron.machine import processes
from minitron.measures.tasks import check_tasks
from minitron.settings.derived import fewest_layers, layer_rules
from minitron.settings.hand_over import MERGEABLE
from minitron.settings.run import FROM_WHAT_IS_DONE, Settings, Stage
from minitron.settings.teachers import base_architecture, max_positions, teacher_config
from minitron.settings.training import Rows
from minitron.text.arithmetic import held_out_problems
from minitron.text.blends import rows_to_make
from minitron.text.documents import check_source
from minitron.walk.console import Console
from minitron.walk.stage_table import STAGES, WORKED_IN
from minitron.walk.store import Result, find_result, finish, locked, stage_key
from minitron.walk.tracking import record_finished


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a stage is given: the settings, its own folder, its inputs' results and the terminal."""

    settings: Settings
    folder: Path
    inputs: Mapping[str, Result]
    console: Console


def order_of(settings: Settings) -> list[str]:
    """The stored stages to run for `settings.stage`, each after what it needs."""
    # All there is ends in evaluate; so a stage that nothing needs under these settings is left out.
    everything = ("evaluate", "reasoning") if settings.reasoning.enabled else ("evaluate",)
    wanted = everything if settings.stage is Stage.all else (settings.stage.value,)
    order: list[str] = []

    def visit(name: str) -> None:
        for need in STAGES[name].needs(settings):
            visit(need)
        if name not in order:
            order.append(name)

    for name in wanted:
        visit(name)
    return order


@dataclass(frozen=True, slots=True)
class Lap:
    """One walk through the stages: its settings and what it has by now. A screened candidate's result is named "screen ID"."""

    settings: Settings
    results: dict[str, Result]
    cached: dict[str, bool]


def run_pipeline(settings: Settings, console: Console) -> None:
    """Run what is asked for, then write the run's summary and report; export and generate take what is done and leave both alone."""
    from minitron.report import files as report
    from minitron.walk.laps import depth_lap, width_lap

    check_before_work(settings)
    try:
        Path(settings.runs_folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"runs_folder is {settings.runs_folder!r}, which cannot be made a folder: {error.strerror}") from None
    if settings.stage not in FROM_WHAT_IS_DONE and "evaluate" in order_of(settings) and processes.rank() == 0:
        check_tasks(settings.evaluate, Path(settings.runs_folder) / "store")
    walk = finished_stages if settings.stage in FROM_WHAT_IS_DONE else run_stages
    first = depth_lap(settings)
    if first is None:
        laps = [walk(settings, console)]
    else:
        say = (lambda _text: None) if settings.stage in FROM_WHAT_IS_DONE else console.say
        say("first lap: depth")
        laps = [walk(first, console)]
        if "distill" in laps[0].results:
            say("second lap: widths")
            student = laps[0].results["distill"]
            laps.append(walk(width_lap(settings, student), console, {"base": student}))
    if settings.stage in (Stage.export, Stage.generate):
        _use(settings, laps, console)
        return
    if not laps[0].results:
        raise ValueError(f"stage=report shows what is done, but nothing is under these settings in {settings.runs_folder}/store; run stage=all first")
    if processes.rank() == 0:
        report.run(settings, laps, console)


def _use(settings: Settings, laps: Sequence[Lap], console: Console) -> None:
    """Export or generate, in the first process."""
    if processes.rank() == 0:
        importlib.import_module(f"minitron.{WORKED_IN[settings.stage.value]}").run(settings, laps, console)


def run_stages(settings: Settings, console: Console, given: Mapping[str, Result] = MappingProxyType({})) -> Lap:
    """Everything that `settings.stage` needs, and itself; what is `given` is there already."""
    lap = Lap(settings, dict(given), dict.fromkeys(given, True))
    for name in order_of(settings):
        if name in given:
            continue
        for one in screens_to_run(lap) if name == "screen" else [settings]:
            label = label_of(name, one)
            lap.results[label], lap.cached[label] = run_stage(name, one, lap.results, console)
        if name == "screen" and settings.candidate is None:
            for label, result in other_screens(lap).items():
                lap.results[label], lap.cached[label] = result, True
        elif name == "screen" and lap.cached[label] and processes.rank() == 0:
            record_finished(settings, lap.results["shortlist"].facts["entries"][settings.candidate], lap.results[label].facts)
    return lap


def label_of(name: str, settings: Settings) -> str:
    return f"screen {settings.candidate}" if name == "screen" else name


def screens_to_run(lap: Lap) -> list[Settings]:
    """Settings for the candidate asked for, or for each finalist: the best by zero-shot loss."""
    if lap.settings.candidate is not None:
        return [lap.settings]
    best = lap.results["shortlist"].facts["best_first"][: lap.settings.search.finalists]
    return [replace(lap.settings, candidate=candidate) for candidate in best]


def other_screens(lap: Lap) -> dict[str, Result]:
    """Shortlisted candidates that are no finalists but were screened all the same, by a sweep: they count too."""
    found = {}
    for candidate in lap.results["shortlist"].facts["best_first"][lap.settings.search.finalists :]:
        result = find_result(stage_folder("screen", replace(lap.settings, candidate=candidate), lap.results))
        if result is not None:
            found[f"screen {candidate}"] = result
    return processes.from_first(found)


def check_before_work(settings: Settings) -> None:
    """Everything that can be refused from settings and config.json alone. Raises ValueError."""
    from minitron.search.layer_order import given_layer_order
    from minitron.search.shortlist import check_search

    check_source(settings.data)
    check_sharing(settings.teacher.train.batch, settings.teacher.train.micro_batch, 1)
    if settings.stage is Stage.merge:
        check_merge(settings)
    check_reasoning(settings)
    if settings.stage not in FROM_WHAT_IS_DONE and "distill" in order_of(settings):
        check_phases(settings)
    if settings.stage not in FROM_WHAT_IS_DONE and "evaluate" in order_of(settings):
        settings.evaluate.check_positions(max_positions(settings))
    trains = () if settings.distill.phases else (("distill.train", settings.distill.train),)
    for name, train in (("teacher.train", settings.teacher.train), *trains):
        least = train.batch * settings.data.sequence_length
        if settings.data.rows is Rows.windows and train.tokens < least and not (name == "teacher.train" and settings.teacher.path is not None):
            raise ValueError(f"{name}.tokens is {train.tokens}; it must be at least one batch, {train.batch} rows of data.sequence_length: {least}")
    if settings.teacher.path is not None:
        from minitron.families.known import family_of  # brings torch, which a run that finds everything done goes without

        family_of(teacher_config(settings))
    base = base_architecture(settings)
    check_search(settings, base)
    check_rules(base.pattern, fewest_layers(settings), layer_rules(settings))
    if settings.search.layer_order:
        given_layer_order(settings.search.layer_order, base)


def check_phases(settings: Settings) -> None:
    """Refuse phases whose batches cannot be shared out, or whose rows are longer than the model's positions. Raises ValueError."""
    for train in settings.distill.trains():
        check_sharing(train.batch, train.micro_batch, processes.world_size())
    positions = settings.distill.max_positions or max_positions(settings)
    for number, phase in enumerate(settings.distill.phases):
        if phase.sequence_length is not None and phase.sequence_length > positions:
            raise ValueError(f"distill.phases[{number}].sequence_length is {phase.sequence_length}; it must be at most {positions}, "
                             "the teacher's max_position_embeddings (or distill.max_positions)")  # fmt: skip
    for data in rows_to_make(settings).values():
        check_source(data)


def check_reasoning(settings: Settings) -> None:
    """Refuse what a student of whole traces cannot learn from, and fewer problems than are to be answered. Raises ValueError."""
    asked = order_of(replace(settings, stage=Stage.all) if settings.stage in FROM_WHAT_IS_DONE else settings)
    if "distill_whole" in asked and settings.distill.cached:
        raise ValueError("distill.cached is true, but a student is to learn from whole traces too (reasoning.enabled), which the cache lacks; it must be false")
    if "reasoning" in asked and (there := len(held_out_problems(settings.data.arithmetic))) < settings.reasoning.problems:
        raise ValueError(f"reasoning.problems is {settings.reasoning.problems}, but of data.arithmetic.problems {settings.data.arithmetic.problems} "
                         f"only {there} are held out; lower the one or raise the other")  # fmt: skip


def check_merge(settings: Settings) -> None:
    """Refuse checkpoints to merge that are too few or not there. Raises ValueError."""
    names = settings.merge.checkpoints
    if len(names) < 2:
        raise ValueError(f"merge.checkpoints is {names}; stage=merge needs at least two: folders, or finished stages ({', '.join(MERGEABLE)})")
    if "base" in names and settings.base.path is None and not settings.depth_lap.enabled:
        raise ValueError("merge.checkpoints names 'base', but there is none: base.path is null and depth_lap.enabled is false")
    for name in names:
        if name not in MERGEABLE and not Path(name).is_dir():
            raise ValueError(f"merge.checkpoints names {name!r}, which is neither the folder of a checkpoint nor one of {', '.join(MERGEABLE)}")


def finished_stages(settings: Settings, _console: Console, given: Mapping[str, Result] = MappingProxyType({})) -> Lap:
    """What is already done under these settings."""
    lap = Lap(settings, dict(given), {})
    for name in order_of(replace(settings, stage=Stage.all)):
        if name in given:
            continue
        if not all(need in {label.split(" ")[0] for label in lap.results} for need in STAGES[name].needs(settings)):
            continue
        for one in screens_to_run(lap) if name == "screen" else [settings]:
            found = find_result(stage_folder(name, one, lap.results))
            if found is not None:
                lap.results[label_of(name, one)] = found
        if name == "screen":
            lap.results.update(other_screens(lap))
    lap.cached.update(dict.fromkeys(lap.results, True))
    return lap


def inputs_of(name: str, settings: Settings, results: Mapping[str, Result]) -> dict[str, Result]:
    """The results that a stage needs, by their labels."""
    needs = STAGES[name].needs(settings)
    return {label: result for label, result in results.items() if label.split(" ")[0] in needs}


def stage_folder(name: str, settings: Settings, results: Mapping[str, Result]) -> Path:
    """Where a stage's result lies, or will: <runs folder>/store/<stage>/<key>."""
    spec = STAGES[name]
    inputs = inputs_of(name, settings, results)
    key = stage_key(name, spec.version, spec.what(settings), {label: result.key for label, result in inputs.items()})
    return Path(settings.runs_folder) / "store" / name / key


def run_stage(name: str, settings: Settings, results: Mapping[str, Result], console: Console) -> tuple[Result, bool]:
    """The stage's result and whether it was already there."""
    folder = stage_folder(name, settings, results)
    found = processes.from_first(find_result(folder))
    if found is not None:
        console.headline(name, f"{found.facts['headline']} (already done)")
        return found, True
    if processes.rank() > 0:
        if STAGES[name].parallel:
            _run(name, settings, folder, results, console)
        return processes.from_first(None), False
    with locked(folder, console.say):
        found = find_result(folder)  # another run may have finished it meanwhile
        if found is not None:
            assert processes.world_size() == 1, f"another run finished {folder} while the processes of this one were at work"
            console.headline(name, f"{found.facts['headline']} (done by another run)")
            return found, True
        folder.mkdir(parents=True, exist_ok=True)
        result = finish(folder, _run(name, settings, folder, results, console))
    console.headline(name, f"{result.facts['headline']} ({result.record['seconds']:,.0f} s)")
    return processes.from_first(result), False


def _run(name: str, settings: Settings, folder: Path, results: Mapping[str, Result], console: Console) -> dict[str, Any]:
    """Do the stage's work; gives the record for done.json."""
    spec = STAGES[name]
    inputs = inputs_of(name, settings, results)
    started = time.monotonic()
    facts = importlib.import_module(f"minitron.{WORKED_IN.get(name, f'stages.{name}')}").run(StageContext(settings, folder, inputs, console))
    return {
        "stage": name,
        "key": folder.name,
        "version": spec.version,
        "settings": spec.what(settings),
        "inputs": {need: result.key for need, result in inputs.items()},
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "facts": facts,
    }


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
