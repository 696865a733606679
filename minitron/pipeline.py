"""The walk: which stage needs which, what goes into its key, and running it once.

Asking for a stage runs what it needs first and reuses what is done, like make. Stage functions live in
`minitron/stages/`, one module per stage with `run(context) -> facts`; they are imported only when they run.
"""

import hashlib
import importlib
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.sharing import check_sharing
from memory_budget.architecture import Architecture
from minitron import processes
from minitron.blends import phase_parts, rows_identity, rows_to_make
from minitron.console import Console
from minitron.documents import check_source
from minitron.importance.removal import LayerRules, check_rules
from minitron.settings import Rows, Settings, Stage, key_settings
from minitron.store import Result, find_result, finish, locked, stage_key
from minitron.teachers import max_positions, teacher_architecture, teacher_config, teacher_folder, teacher_identity
from nas.space import Floors, axis_options

SCORES_FILE = "scores.safetensors"
KIND_LETTERS = {"mamba": "M", "attention": "*", "ffn": "-"}


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a stage is given: the settings, its own folder, its inputs' results and the terminal."""

    settings: Settings
    folder: Path
    inputs: Mapping[str, Result]
    console: Console


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One row of the stage table. `version` rises when the stage's results change for the same settings.

    A `parallel` stage runs in every process of `accelerate launch`; the others run in the first while the rest wait.
    """

    version: int
    needs: Callable[[Settings], tuple[str, ...]]
    what: Callable[[Settings], Any]
    parallel: bool = False


def floors(settings: Settings) -> Floors:
    """Least number of layers per kind, by letter."""
    return {KIND_LETTERS[kind]: number for kind, number in settings.search.floors.items()}


def layer_rules(settings: Settings) -> LayerRules:
    """What may go when layers are removed."""
    ceilings = {KIND_LETTERS[kind]: number for kind, number in settings.scoring.ceilings.items() if number is not None}
    return LayerRules(floors(settings), ceilings, tuple(settings.scoring.protect))


def scores_of(score: Result, settings: Settings) -> Any:
    """The ImportanceScores of a score stage, under the aggregation of the settings."""
    from minitron.importance.scores import load_scores

    search = settings.search
    return load_scores(score.folder / SCORES_FILE, tokens=search.aggregate_tokens.name, samples=search.aggregate_samples.name)


def fewest_layers(settings: Settings) -> int:
    """The depth that layer removal must reach: the smallest option of the search, or the fixed pattern's."""
    teacher = teacher_architecture(settings)
    if settings.search.fixed.given():
        return len(settings.search.fixed.pattern or teacher.pattern)
    return axis_of(settings, "layers", teacher)[0]


def axis_of(settings: Settings, axis: str, teacher: Architecture) -> tuple[int, ...]:
    """Options of one axis of the search. Bounds up to 1 are shares of the teacher's value, rounded up to whole steps below it."""
    value = {"layers": teacher.num_layers, "hidden": teacher.hidden, "ffn": teacher.ffn, "mamba_heads": teacher.mamba_num_heads}[axis]
    natural = {"layers": 1, "hidden": 128 if value >= 2048 else 16, "ffn": 64, "mamba_heads": teacher.mamba_num_groups}[axis]
    given = getattr(settings.search, axis)
    step = natural if given.step is None else given.step

    def bound(number: float | None) -> int | None:
        if number is None or number > 1:
            return None if number is None else int(number)
        return value - int(value * (1 - number) + 1e-9) // max(step, 1) * step

    return axis_options(axis, value, given.values, bound(given.low), bound(given.high), step)


def _file_digest(path: str | Path) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise ValueError(f"search.layer_order is {str(path)!r}, which cannot be read: {error.strerror}") from None


def _what_data(settings: Settings) -> Any:
    own = settings.teacher.path is None
    return {**rows_identity(settings.data), "vocab": settings.data.vocab if own else None}


def _what_phase_rows(settings: Settings) -> Any:
    return {name: {**rows_identity(data), "vocab": None} for name, data in rows_to_make(settings).items()}


def _what_teacher(settings: Settings) -> Any:
    if settings.teacher.path is None:
        return {"tiny": key_settings(settings.teacher.tiny), "train": key_settings(settings.teacher.train), "seed": settings.seed}
    from minitron.checkpoints import Checkpoint

    # The folder too: the result says where the weights lie, and a card names them.
    folder = teacher_folder(settings)
    return {"weights": Checkpoint(folder).fingerprint, "folder": str(folder)}


def _what_score(settings: Settings) -> Any:
    return {**key_settings(settings.scoring), "floors": floors(settings), "fewest_layers": fewest_layers(settings)}


def _what_search(settings: Settings) -> Any:
    order = settings.search.layer_order
    return {
        **key_settings(settings.search),
        "layer_order": _file_digest(order) if order else None,
        "workload": key_settings(settings.workload),
        "budget": key_settings(settings.budget),
        "teacher": teacher_identity(settings),
        "tiny": {**key_settings(settings.teacher.tiny), "vocab": settings.data.vocab} if settings.teacher.path is None else None,
    }


def _what_distill(settings: Settings) -> Any:
    # The phases in full: what one leaves out is distill.train's.
    return {**key_settings(settings.distill), "train": None, "phases": key_settings(settings.distill.trains()),
            "rows": [[(part.name, part.weight) for part in parts] for parts in phase_parts(settings)], "seed": settings.seed}  # fmt: skip


STAGES: Mapping[str, StageSpec] = {
    # The tiny teacher is trained on the data; a given one brings the tokenizer that the data needs.
    "data": StageSpec(1, lambda s: () if s.teacher.path is None else ("teacher",), _what_data),
    "teacher": StageSpec(1, lambda s: ("data",) if s.teacher.path is None else (), _what_teacher),
    "score": StageSpec(2, lambda s: ("data", "teacher"), _what_score, parallel=True),
    # A given layer order makes the search plain arithmetic on config.json: no weights, no scores.
    "search": StageSpec(1, lambda s: () if s.search.layer_order else ("data", "teacher", "score"), _what_search),
    "prune": StageSpec(2, lambda s: ("teacher", "score", "search"), lambda s: {}),
    # Only where a phase of distillation wants other rows than the data stage's.
    "phase_rows": StageSpec(1, lambda s: ("data", "teacher"), _what_phase_rows),
    "distill": StageSpec(2, lambda s: ("data", "teacher", "prune", *(("phase_rows",) if rows_to_make(s) else ())), _what_distill, parallel=True),
    "evaluate": StageSpec(1, lambda s: ("data", "teacher", "prune", "distill"), lambda s: key_settings(s.evaluate)),
}


def order_of(settings: Settings) -> list[str]:
    """The stored stages to run for `settings.stage`, each after what it needs."""
    # All there is ends in evaluate; so a stage that nothing needs under these settings is left out.
    wanted = ("evaluate",) if settings.stage is Stage.all else (settings.stage.value,)
    order: list[str] = []

    def visit(name: str) -> None:
        for need in STAGES[name].needs(settings):
            visit(need)
        if name not in order:
            order.append(name)

    for name in wanted:
        visit(name)
    return order


def run_pipeline(settings: Settings, console: Console) -> None:
    """Run what is asked for, then write the run's summary and report."""
    from minitron.stages import report

    check_before_work(settings)
    try:
        Path(settings.runs_folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"runs_folder is {settings.runs_folder!r}, which cannot be made a folder: {error.strerror}") from None
    results: dict[str, Result] = {}
    cached: dict[str, bool] = {}
    if settings.stage is Stage.report:
        results = finished_stages(settings)
        cached = dict.fromkeys(results, True)
    else:
        for name in order_of(settings):
            results[name], cached[name] = run_stage(name, settings, results, console)
    if processes.rank() == 0:
        report.run(settings, results, cached, console)


def check_before_work(settings: Settings) -> None:
    """Everything that can be refused from settings and config.json alone. Raises ValueError."""
    from minitron.stages.layer_order import given_layer_order
    from minitron.stages.search import check_search

    check_source(settings.data)
    check_sharing(settings.teacher.train.batch, settings.teacher.train.micro_batch, 1)
    if settings.stage is not Stage.report and "distill" in order_of(settings):
        check_phases(settings)
    trains = () if settings.distill.phases else (("distill.train", settings.distill.train),)
    for name, train in (("teacher.train", settings.teacher.train), *trains):
        least = train.batch * settings.data.sequence_length
        if settings.data.rows is Rows.windows and train.tokens < least and not (name == "teacher.train" and settings.teacher.path is not None):
            raise ValueError(f"{name}.tokens is {train.tokens}; it must be at least one batch, {train.batch} rows of data.sequence_length: {least}")
    if settings.teacher.path is not None:
        from minitron.families import family_of  # brings torch, which a run that finds everything done goes without

        family_of(teacher_config(settings))
    teacher = teacher_architecture(settings)
    check_search(settings, teacher)
    check_rules(teacher.pattern, fewest_layers(settings), layer_rules(settings))
    if settings.search.layer_order:
        given_layer_order(settings.search.layer_order, teacher)


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


def finished_stages(settings: Settings) -> dict[str, Result]:
    """What is already done under these settings. Raises ValueError where nothing is."""
    results: dict[str, Result] = {}
    for name in order_of(replace(settings, stage=Stage.all)):
        if all(need in results for need in STAGES[name].needs(settings)):
            found = find_result(stage_folder(name, settings, results))
            if found is not None:
                results[name] = found
    if not results:
        raise ValueError(f"stage=report shows what is done, but nothing is under these settings in {settings.runs_folder}/store; run stage=all first")
    return results


def stage_folder(name: str, settings: Settings, results: Mapping[str, Result]) -> Path:
    """Where a stage's result lies, or will: <runs folder>/store/<stage>/<key>."""
    spec = STAGES[name]
    key = stage_key(name, spec.version, spec.what(settings), {need: results[need].key for need in spec.needs(settings)})
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
    inputs = {need: results[need] for need in spec.needs(settings)}
    started = time.monotonic()
    facts = importlib.import_module(f"minitron.stages.{name}").run(StageContext(settings, folder, inputs, console))
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
