"""What is refused before any work, because it could not end well: hours, batches, disk, memory. From the smallest student that may be chosen and from
bounds, so that nothing is refused that would have worked.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from memory_budget.parameters import count_total_parameters
from memory_budget.units import format_gib
from minitron.machine.memory import process_share_bytes
from minitron.plan.costs import Cost, cost_of, top_k_bytes
from minitron.plan.done import DEPTH, Done
from minitron.plan.plan import lap_views, on_gpu
from minitron.plan.text_size import text_size
from minitron.plan.view import LapView
from minitron.pruning.cut_cost import CutCost
from minitron.pruning.plan import recipe_of
from minitron.settings.derived import calibration_samples, candidate_samples, has_ladder
from minitron.settings.run import PlanSettings, PruneMethod, Settings
from minitron.settings.training import Rows, TrainSettings
from minitron.text.blends import phase_parts
from minitron.training.memory import PhaseMemory, check_fits, state_bytes
from minitron.training.time import check_hours, training_flops
from minitron.walk.pipeline import check_before_work as check_settings
from minitron.walk.pipeline import check_rows
from minitron.walk.store import DONE

CERTAIN_TEXT = 0.25  # of the tokens that a text probably has
CACHES = ("teacher_cache", "distill_cache")
CERTAIN_DISK = 0.95  # of the bytes that are counted: tensors to the byte, and little else


def check_before_work(settings: Settings, done: Done) -> None:
    """Raises ValueError, one line that names the setting, its value and what would work; for the machine that the run is on, whatever plan.device is, and for
    what is not `done` already."""
    settings = replace(settings, plan=PlanSettings())
    views = [(lap, _with_smallest(view), [name for name in names if (name, lap) not in done]) for lap, view, names in lap_views(settings)]
    if (most := text_size(settings.data, views[0][1].teacher.vocab).most_rows) is not None:
        check_rows(settings, most, "at most")
    for lap, view, names in views:
        check_times(view, names)
        check_screened_rows(lap, view, names)
        if not on_gpu(settings):
            check_memory(view, names)
    check_disk(settings, views)


def refused_because(settings: Settings, done: Done) -> str | None:
    """What check_before_work would say on this machine; None where it would pass, and for another device, whose disk and kernels nobody knows here."""
    if settings.plan.device is not None:
        return None
    try:
        check_settings(settings)
        check_before_work(settings, done)
    except ValueError as error:
        return str(error)
    return None


def check_times(view: LapView, names: list[str]) -> None:
    """On a processor: distillation that products alone keep busy for longer than distill.max_hours."""
    settings = view.settings
    if view.on_gpu or "distill" not in names or settings.distill.max_hours is None:
        return
    phases = [(train, parts[0].data.sequence_length) for train, parts in zip(settings.distill.trains(), phase_parts(settings), strict=True)]
    flops = training_flops(view.student, None if settings.distill.cached else view.teacher, phases)
    check_hours(flops, phases[0][0].precision, processes=view.launch.world_size, max_hours=settings.distill.max_hours, has_mamba="M" in view.student.pattern)


def check_screened_rows(lap: str, view: LapView, names: list[str]) -> None:
    """Screens learn from as many rows as hold their tokens: fewer of them than a batch cannot be drawn."""
    train = view.settings.screen.train
    if "screen" not in names or not has_ladder(view.settings) or view.settings.data.rows is not Rows.windows:
        return
    if train.batch > -(-train.tokens // view.length):
        name = "depth_lap.screen_tokens" if lap == DEPTH else "screen.train.tokens"
        raise ValueError(f"{name} is {train.tokens:,}; it must be at least one batch of screen.train.batch, {train.batch:,} rows of data.sequence_length: "
                         f"{train.batch * view.length:,}")  # fmt: skip


def check_memory(view: LapView, names: list[str]) -> None:
    """What the stages themselves refuse, by what is free now."""
    settings, (available, place) = view.settings, process_share_bytes()
    if "screen" in names and has_ladder(settings):
        cutting = 4 * (count_total_parameters(view.base) + count_total_parameters(view.student))
        if view.launch.world_size == 1 and cutting > available:
            raise ValueError(f"screen: cutting a candidate in memory needs {format_gib(cutting)}; {place} has {format_gib(available)}; "
                             "search.finalists=0 screens none")  # fmt: skip
        _check_training(view, settings.screen.train, view.length, settings.screen.cached, "screen", available, place)
    if "distill" in names:
        for train, parts in zip(settings.distill.trains(), phase_parts(settings), strict=True):
            _check_training(view, train, parts[0].data.sequence_length, settings.distill.cached, "distill", available, place)
    if settings.prune.method is PruneMethod.compensated and {"prune", "screen"} & set(names):
        samples = calibration_samples(settings, view.base) if "prune" in names else candidate_samples(settings, view.base)
        samples = min(samples, _certain_tokens(view) // view.length)
        if samples:
            CutCost(view.base, view.student, recipe_of(settings.prune, view.student), samples, samples * view.length, view.width).check_memory(available, place)


def _check_training(view: LapView, train: TrainSettings, length: int, cached: bool, stage: str, available: int, place: str) -> None:
    need = PhaseMemory(view.student, view.teacher, view.launch, length, 0 if cached else view.width, view.on_gpu)
    check_fits(need.of(need.with_checkpointing(train, available)), available, place, stage)


def check_disk(settings: Settings, views: list[tuple[str, LapView, list[str]]]) -> None:
    """More bytes to be written than the runs folder's file system has free, with those of half made results, which one of them may go on from."""
    folder = _existing(Path(settings.runs_folder))
    free, kept, most, why = shutil.disk_usage(folder).free, 0.0, 0.0, ""
    for lap, view, names in views:
        for name in names:
            cost = cost_of(name, view)
            if not cost.times or name in ("data", "phase_rows", "whole_rows"):  # how long texts are is a rule of thumb
                continue
            scratch = _certain_scratch(name, view, cost)
            kept += _certain_cache(name, view) if name in CACHES else cost.kept * cost.times
            if kept + scratch > most:
                most, why = kept + scratch, f"{lap} {name}".strip()
    needed = int(most * CERTAIN_DISK)
    if needed > free and needed > free + _half_made_bytes(Path(settings.runs_folder) / "store"):
        raise ValueError(f"runs_folder is {settings.runs_folder!r}, whose file system has {format_gib(free)} free; until {why} this run writes at least "
                         f"{format_gib(needed)}, saved states among it: free so much, or set runs_folder to where it is")  # fmt: skip


def _certain_tokens(view: LapView) -> int:
    """Train tokens that the data has at least: a part of what a rule of thumb says, none where rows are padded or their number is not known before reading."""
    size, data = text_size(view.settings.data, view.teacher.vocab), view.settings.data
    return 0 if data.dataset or data.rows is not Rows.windows else int(CERTAIN_TEXT * size.train_tokens)


def _certain_cache(name: str, view: LapView) -> int:
    """Of a cache of the teacher's outputs, which has no more rows than the data."""
    train = view.settings.screen.train if name == "teacher_cache" else view.settings.distill.train
    return int(min(train.tokens, _certain_tokens(view)) * top_k_bytes(view.teacher.vocab, view.settings.screen.top_k))


def _certain_scratch(name: str, view: LapView, cost: Cost) -> int:
    """Of what a stage has on disk besides: one saved state, which every training writes at its end."""
    settings = view.settings
    if name == "screen":
        return state_bytes(view.student, settings.screen.train)
    if name in ("distill", "distill_slice", "distill_whole"):
        return state_bytes(view.student, settings.distill.train)
    return 0


def _half_made_bytes(store: Path) -> int:
    """Of results that are not whole."""
    half_made = [folder for folder in store.glob("*/*") if folder.is_dir() and not (folder / DONE).exists()]
    return sum(os.lstat(os.path.join(place, name)).st_size for folder in half_made for place, _, names in os.walk(folder) for name in names)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def _with_smallest(view: LapView) -> LapView:
    return replace(view, students=replace(view.students, likely=view.students.smallest))
