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
from types import MappingProxyType
from typing import Any

from memory_budget.architecture import Architecture
from minitron import processes
from minitron.console import Console
from minitron.documents import check_source, source_identity
from minitron.importance.removal import LayerRules, check_rules
from minitron.setting_rules import key_settings
from minitron.settings import Rows, Settings, Stage
from minitron.store import Result, find_result, finish, locked, stage_key
from minitron.teachers import base_architecture, teacher_config, teacher_folder, teacher_identity
from minitron.tracking import record_finished
from nas.exchange import read_export_config
from nas.space import Floors, axis_options

SCORES_FILE = "scores.safetensors"
# In the data's key through source_identity, which takes files by their contents.
SOURCE_SETTINGS = ("files", "dataset", "dataset_config", "dataset_revision", "dataset_split", "text_field")
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


def base_stage(settings: Settings) -> str:
    """The stage whose model is cut: the teacher itself, or a base of its own."""
    return "teacher" if settings.base.path is None else "base"


def has_ladder(settings: Settings) -> bool:
    """Whether finalists are distilled before one is chosen: not without weights, nor where there is one candidate only."""
    search = settings.search
    return bool(search.finalists) and search.shortlist_size > 1 and not search.layer_order and not search.fixed.given()


def fixed_sizes(settings: Settings, teacher: Architecture) -> dict[str, int | str]:
    """What `search.fixed` asks for, its file's sizes first and the settings of its own over them; "num_layers" where only the depth is known."""
    given = settings.search.fixed.given()
    path = given.pop("file", None)
    if path is None:
        return given
    try:
        imported = read_export_config(Path(path), teacher)
    except ValueError as error:
        raise ValueError(f"search.fixed.file: {error}") from None
    sizes = {name: value for name, value in imported.sizes.items() if value != getattr(teacher, name)}
    depth = {"num_layers": imported.num_layers} if imported.pattern is None else {"pattern": imported.pattern}
    return {**sizes, **depth, **given}


def fewest_layers(settings: Settings) -> int:
    """The depth that layer removal must reach: the smallest option of the search, or the fixed one's."""
    base = base_architecture(settings)
    if settings.search.fixed.given():
        fixed = fixed_sizes(settings, base)
        return len(fixed["pattern"]) if "pattern" in fixed else fixed.get("num_layers", base.num_layers)
    return axis_of(settings, "layers", base)[0]


def axis_of(settings: Settings, axis: str, teacher: Architecture) -> tuple[int, ...]:
    """Options of one axis of the search. Bounds up to 1 are shares of the teacher's value, rounded up to whole steps below it."""
    value, natural = {
        "layers": (teacher.num_layers, 1),
        "hidden": (teacher.hidden, 128 if teacher.hidden >= 2048 else 16),
        "ffn": (teacher.ffn, 64),
        "mamba_heads": (teacher.mamba_num_heads, teacher.mamba_num_groups),
        "mamba_channels": (teacher.mamba_head_dim, 8),
        "attention_heads": (teacher.num_attention_heads, teacher.num_key_value_heads),
    }[axis]
    given = getattr(settings.search, axis)
    step = natural if given.step is None else given.step

    def bound(number: float | None) -> int | None:
        if number is None or number > 1:
            return None if number is None else int(number)
        return value - int(value * (1 - number) + 1e-9) // max(step, 1) * step

    return axis_options(axis, value, given.values, bound(given.low), bound(given.high), step)


def file_digest(path: str | Path, setting: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise ValueError(f"{setting} is {str(path)!r}, which cannot be read: {error.strerror}") from None


def _what_data(settings: Settings) -> Any:
    own = settings.teacher.path is None
    rows = {name: value for name, value in key_settings(settings.data).items() if name not in SOURCE_SETTINGS}
    return {**rows, "vocab": settings.data.vocab if own else None, "source": source_identity(settings.data)}


def _what_teacher(settings: Settings) -> Any:
    if settings.teacher.path is None:
        return {"tiny": key_settings(settings.teacher.tiny), "train": key_settings(settings.teacher.train), "seed": settings.seed}
    from minitron.checkpoints import Checkpoint

    # The folder too: the result says where the weights lie, and a card names them.
    folder = teacher_folder(settings)
    return {"weights": Checkpoint(folder).fingerprint, "folder": str(folder)}


def _what_score(settings: Settings) -> Any:
    return {**key_settings(settings.scoring), "floors": floors(settings), "fewest_layers": fewest_layers(settings)}


def _what_base(settings: Settings) -> Any:
    from minitron.checkpoints import Checkpoint

    folder = Path(settings.base.path)
    return {"weights": Checkpoint(folder).fingerprint, "folder": str(folder.resolve())}


CHOOSING = ("finalists", "select", "loss_within", "weights")  # of the search's settings, those that the shortlist does not know


def _what_shortlist(settings: Settings) -> Any:
    order, fixed = settings.search.layer_order, settings.search.fixed.file
    return {
        **{name: value for name, value in key_settings(settings.search).items() if name not in CHOOSING},
        "layer_order": file_digest(order, "search.layer_order") if order else None,
        "fixed_file": file_digest(fixed, "search.fixed.file") if fixed else None,
        "workload": key_settings(settings.workload),
        "budget": key_settings(settings.budget),
        "throughput": key_settings(settings.throughput),
        "teacher": teacher_identity(settings),
        "tiny": {**key_settings(settings.teacher.tiny), "vocab": settings.data.vocab} if settings.teacher.path is None else None,
    }


def _what_search(settings: Settings) -> Any:
    return {name: value for name, value in key_settings(settings.search).items() if name in CHOOSING}


def _what_cache(settings: Settings) -> Any:
    return {"top_k": settings.screen.top_k, "tokens": settings.screen.train.tokens}


def _what_screen(settings: Settings) -> Any:
    return {"candidate": settings.candidate, "seed": settings.seed, **key_settings(settings.screen)}


def _what_distill(settings: Settings) -> Any:
    return {**key_settings(settings.distill), "seed": settings.seed}


STAGES: Mapping[str, StageSpec] = {
    # The tiny teacher is trained on the data; a given one brings the tokenizer that the data needs.
    "data": StageSpec(1, lambda s: () if s.teacher.path is None else ("teacher",), _what_data),
    "teacher": StageSpec(1, lambda s: ("data",) if s.teacher.path is None else (), _what_teacher),
    "base": StageSpec(1, lambda s: ("teacher",), _what_base),
    "score": StageSpec(3, lambda s: ("data", base_stage(s)), _what_score, parallel=True),
    # A given layer order makes the search plain arithmetic on config.json: no weights, no scores.
    "shortlist": StageSpec(1, lambda s: () if s.search.layer_order else ("data", base_stage(s), "teacher", "score"), _what_shortlist),
    "teacher_cache": StageSpec(1, lambda s: ("data", "teacher"), _what_cache),
    # Once for every finalist, or for settings.candidate alone.
    "screen": StageSpec(1, lambda s: ("data", base_stage(s), "teacher_cache", "score", "shortlist"), _what_screen),
    "search": StageSpec(3, lambda s: ("shortlist", "screen") if has_ladder(s) else ("shortlist",), _what_search),
    "prune": StageSpec(3, lambda s: (base_stage(s), "score", "search"), lambda s: {}),
    "distill": StageSpec(1, lambda s: ("data", "teacher", "prune"), _what_distill),
    "evaluate": StageSpec(1, lambda s: ("data", "teacher", "prune", "distill"), lambda s: key_settings(s.evaluate)),
}


def order_of(settings: Settings) -> list[str]:
    """The stored stages to run for `settings.stage`, each after what it needs."""
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


@dataclass(frozen=True, slots=True)
class Lap:
    """One walk through the stages: its settings and what it has by now. A screened candidate's result is named "screen ID"."""

    settings: Settings
    results: dict[str, Result]
    cached: dict[str, bool]


def run_pipeline(settings: Settings, console: Console) -> None:
    """Run what is asked for, then write the run's summary and report."""
    from minitron.laps import depth_lap, width_lap
    from minitron.stages import report

    check_before_work(settings)
    try:
        Path(settings.runs_folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"runs_folder is {settings.runs_folder!r}, which cannot be made a folder: {error.strerror}") from None
    walk = finished_stages if settings.stage is Stage.report else run_stages
    first = depth_lap(settings)
    if first is None:
        laps = [walk(settings, console)]
    else:
        console.say("first lap: depth")
        laps = [walk(first, console)]
        if "distill" in laps[0].results:
            console.say("second lap: widths")
            student = laps[0].results["distill"]
            laps.append(walk(width_lap(settings, student), console, {"base": student}))
    if not laps[0].results:
        raise ValueError(f"stage=report shows what is done, but nothing is under these settings in {settings.runs_folder}/store; run stage=all first")
    if processes.rank() == 0:
        report.run(settings, laps, console)


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
    from minitron.stages.layer_order import given_layer_order
    from minitron.stages.shortlist import check_search

    check_source(settings.data)
    for name, train in (("teacher.train", settings.teacher.train), ("distill.train", settings.distill.train)):
        least = train.batch * settings.data.sequence_length
        if settings.data.rows is Rows.windows and train.tokens < least and not (name == "teacher.train" and settings.teacher.path is not None):
            raise ValueError(f"{name}.tokens is {train.tokens}; it must be at least one batch, {train.batch} rows of data.sequence_length: {least}")
    if settings.teacher.path is not None:
        from minitron.families import family_of  # brings torch, which a run that finds everything done goes without

        family_of(teacher_config(settings))
    base = base_architecture(settings)
    check_search(settings, base)
    check_rules(base.pattern, fewest_layers(settings), layer_rules(settings))
    if settings.search.layer_order:
        given_layer_order(settings.search.layer_order, base)


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
