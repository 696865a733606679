"""What a run will do and take, from settings and config.json alone."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distill.engines.launch import Launch, read_launch
from memory_budget.architecture import Architecture
from memory_budget.budget import PRESETS
from memory_budget.calculator import memory_report
from memory_budget.hf_config import read_config
from memory_budget.parameters import count_active_parameters, count_total_parameters
from memory_budget.units import GIB
from minitron.machine.memory import process_share_bytes
from minitron.machine.pace import Pace, device_pace, gpu_names, pace_here
from minitron.plan.costs import Cost, cost_of
from minitron.plan.done import DEPTH, WIDTHS, Done
from minitron.plan.downloads import download_bytes
from minitron.plan.students import students_of, uncut
from minitron.plan.view import LapView
from minitron.settings.derived import budget_of, workload_of
from minitron.settings.run import Settings, Stage
from minitron.settings.teachers import base_architecture, is_converted, is_tiny, teacher_architecture, teacher_config
from minitron.walk.laps import depth_lap, width_lap
from minitron.walk.need import CUTS
from minitron.walk.store import Result
from minitron.walk.table import order_of, using_stages
from nas.axes import AXES

WEIGHTS_DTYPES = ("bf16", "fp8", "int4")  # that the uncut teacher is weighed in
TRAINING = ("screen", "distill", "distill_slice", "distill_whole")
# Settings that decide what a stage takes; those of a group as they are in it.
DECIDED_BY = {
    "teacher": ("teacher.path", "teacher.gguf", "teacher.package", "teacher.train_anew"),
    "data": ("data.files", "data.dataset", "data.embedded", "data.max_train_tokens", "data.sequence_length"),
    "score": ("scoring.samples", "scoring.layer_samples", "scoring.criterion"),
    "shortlist": ("search.shortlist_size", "search.screen_samples"),
    "teacher_cache": ("screen.train.tokens", "screen.top_k"),
    "screen": ("search.finalists", "screen.train.tokens"),
    "prune": ("prune.method", "prune.samples"),
    "distill_cache": ("distill.train.tokens", "screen.top_k"),
    "distill": ("distill.train.tokens", "distill.train.batch", "distill.phases"),
    "distill_slice": ("prune.against_slice", "distill.train.tokens"),
    "distill_whole": ("reasoning.enabled", "distill.train.tokens"),
    "evaluate": ("evaluate.samples", "evaluate.speed", "evaluate.needle.lengths", "evaluate.prompts", "evaluate.held_out_prompts"),
    "against_slice": ("prune.against_slice", "evaluate.samples"),
    "reasoning": ("reasoning.problems", "reasoning.budgets"),
}


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of one lap ("", "depth", "widths"), `times` of it. `seconds` None where nobody knows the device's pace; `memory_bytes` in each process; bytes
    on disk that are kept, and `scratch_bytes` beside them while it runs; tokens trained on; the settings that decide it, with their values."""

    stage: str
    lap: str
    times: int
    seconds: float | None
    memory_bytes: int
    disk_bytes: int
    scratch_bytes: int
    tokens: int
    decided_by: Mapping[str, Any] = field(default_factory=dict)
    done: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do and take; where it `cuts` nothing, no budget is looked at.

    `ranges`: of every axis that is cut, by its name, the smallest and largest option and the teacher's size; `follow` names those of them whose sizes follow
    from others. `…_active`: parameters that one token passes through. `uncut_bytes`: what the whole teacher takes under
    the workload by its weights' format. `spare_bytes`: of the budget, beside the uncut teacher; negative where it does not fit. `available_bytes` is memory
    for a process.
    """

    device: str
    processes: int
    stages: tuple[StagePlan, ...]
    cuts: bool
    budget_name: str
    budget_bytes: int
    teacher_bytes: int
    uncut_bytes: Mapping[str, int]
    teacher_parameters: int
    teacher_active: int
    student_parameters: int
    student_active: int
    smallest_parameters: int
    student_bytes: int
    ranges: Mapping[str, tuple[int, int, int]]
    candidates: int
    available_bytes: int
    download_bytes: int
    fixed: bool
    follow: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def teacher_fits(self) -> bool:
        return self.spare_bytes >= 0

    @property
    def spare_bytes(self) -> int:
        return self.budget_bytes - self.teacher_bytes

    @property
    def student_fits(self) -> bool:
        """Whether the likely student, or the given one, fits."""
        return self.student_bytes <= self.budget_bytes

    @property
    def ahead(self) -> tuple[StagePlan, ...]:
        """The stages that are not done yet."""
        return tuple(stage for stage in self.stages if not stage.done)

    @property
    def seconds(self) -> float | None:
        """Of all that is ahead; None where the device's pace is not known."""
        spent = [stage.seconds for stage in self.ahead]
        return None if None in spent else sum(spent)

    @property
    def memory_bytes(self) -> int:
        return max((stage.memory_bytes for stage in self.ahead), default=0)

    @property
    def disk_bytes(self) -> int:
        """The most that the run has written at once, of what is ahead."""
        return most_on_disk(self.ahead)

    @property
    def distill_tokens(self) -> int:
        """Of all training to the teacher's distribution, screens among it."""
        return sum(stage.tokens for stage in self.ahead if stage.stage in TRAINING)

    @property
    def device_hours(self) -> float | None:
        """Of the same, all devices together."""
        spent = [stage.seconds for stage in self.ahead if stage.stage in TRAINING]
        return None if None in spent else sum(spent) * self.processes / 3600


def most_on_disk(stages: Collection[StagePlan]) -> int:
    """Bytes kept by each stage and all before it, with its scratch; the most of that."""
    kept = most = 0
    for stage in stages:
        kept += stage.disk_bytes
        most = max(most, kept + stage.scratch_bytes)
    return most


def plan_of(settings: Settings, done: Done = frozenset()) -> Plan:
    """The plan of a run under these settings; for a stage that uses what is done, of stage=all. `done` names stages, with their laps, that are known to be
    done.

    Raises ValueError for settings that the run's own checks refuse.
    """
    settings = replace(settings, stage=Stage.all) if settings.stage.value in using_stages() else settings
    pace, views = pace_of(settings), list(lap_views(settings))
    cuts, teacher, workload = bool(CUTS & set(order_of(settings))), teacher_architecture(settings), workload_of(settings)
    budget = budget_of(settings) if cuts else None  # what cuts nothing needs none
    stages = tuple(stage for lap, view, names in views for name in names if (stage := _stage_plan(name, lap, view, pace, done)).times)
    last, smallest = views[-1][1], views[-1][1].students.smallest
    return Plan(
        device=pace.name if pace else ", ".join(sorted(set(gpu_names()))),
        processes=views[0][1].launch.world_size,
        stages=stages,
        cuts=cuts,
        budget_name=budget.name if budget else "",
        budget_bytes=budget.bytes if budget else 0,
        teacher_bytes=memory_report(teacher, workload).total,
        uncut_bytes={dtype: memory_report(teacher, replace(workload, weights_dtype=dtype)).total for dtype in WEIGHTS_DTYPES},
        teacher_parameters=count_total_parameters(teacher),
        teacher_active=count_active_parameters(teacher),
        student_parameters=count_total_parameters(last.student),
        student_active=count_active_parameters(last.student),
        smallest_parameters=count_total_parameters(smallest),
        student_bytes=memory_report(last.student, workload).total,
        ranges=_ranges(views, teacher),
        candidates=last.students.candidates,
        available_bytes=views[0][1].available,
        download_bytes=download_bytes(settings, views[0][1].weights(teacher)),
        fixed=bool(settings.search.fixed.given()),
        follow=tuple(dict.fromkeys(axis for _, view, _ in views for axis in view.students.follow)),
        notes=tuple(_notes(settings, views)),
    )


def pace_of(settings: Settings) -> Pace | None:
    """Of the device that the plan reckons with; None for a GPU here that is not in the table."""
    if settings.plan.device is not None:
        return device_pace(settings.plan.device, settings.plan.gpus or 1)
    return pace_here("cuda" if on_gpu(settings) else "cpu", read_launch().world_size)


def on_gpu(settings: Settings) -> bool:
    """Whether the plan is one for GPUs: named, or of this machine and not passed over."""
    return settings.plan.device is not None or (settings.device != "cpu" and bool(gpu_names()))


def lap_views(settings: Settings) -> Iterator[tuple[str, LapView, list[str]]]:
    """Every lap's name, what its costs follow from, and its stages but those that an earlier one has done."""
    teacher, first = teacher_architecture(settings), depth_lap(settings)
    if first is None:
        yield "", _view(settings, teacher, base_architecture(settings), order := order_of(settings)), order
        return
    order = order_of(first)
    yield DEPTH, (view := _view(first, teacher, base_architecture(first), order)), order
    if "distill" not in order:
        return
    second = width_lap(settings, Result(Path("of the first lap"), {"facts": {"path": "checkpoint"}}))
    again = {"base", "data", "teacher", *(["teacher_cache"] if first.screen.train.tokens == second.screen.train.tokens else [])}
    order = order_of(second)
    yield WIDTHS, _view(second, teacher, view.student, order), [name for name in order if name not in again]


def _view(settings: Settings, teacher: Architecture, base: Architecture, order: list[str]) -> LapView:
    launch, gpu, students = _launch(settings), on_gpu(settings), students_of(settings, base) if CUTS & set(order) else uncut(base)
    return LapView(settings, teacher, base, students, stored_width(settings), launch, gpu, _available(settings, gpu))


def _launch(settings: Settings) -> Launch:
    """As this process was started; on a named device one process a GPU, their weights in slices."""
    if settings.plan.device is None:
        return read_launch()
    gpus = settings.plan.gpus or 1
    return Launch("fsdp2" if gpus > 1 else "single", 0, gpus)


def _available(settings: Settings, gpu: bool) -> int:
    """Memory for a process: what a device has by its preset, or what is free here; all that one may wish for on a GPU that is not known."""
    if not gpu:
        return process_share_bytes()[0]
    pace = pace_of(settings)
    return int(PRESETS[pace.name.rpartition(" ")[2]].device_gib * GIB) if pace else 2**62


def stored_width(settings: Settings) -> int:
    """Bytes of a number of the model that is cut, as it is stored: float32 for what this walk makes, else as its config.json says."""
    if is_converted(settings) or is_tiny(settings):
        return 4
    path = settings.base.path
    config = read_config(path) if path is not None and Path(path).is_dir() else teacher_config(settings)
    return 4 if str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.") in ("float32", "float64") else 2


def _stage_plan(name: str, lap: str, view: LapView, pace: Pace | None, done: Done) -> StagePlan:
    cost: Cost = cost_of(name, view)
    seconds = pace.seconds(cost.work, shared=cost.shared) * cost.times if pace else None
    return StagePlan(name, lap, cost.times, seconds, cost.held, cost.kept * cost.times, cost.scratch, cost.tokens * cost.times,
                     _decided_by(name, view.settings), (name, lap) in done)  # fmt: skip


def _decided_by(name: str, settings: Settings) -> dict[str, Any]:
    """The settings that are given, with their values; a null decides nothing."""
    found = {}
    for setting in DECIDED_BY.get(name, ()):
        value: Any = settings
        for part in setting.split("."):
            value = getattr(value, part)
        if value not in (None, [], False):
            found[setting] = value
    return found


def _ranges(views: list[tuple[str, LapView, list[str]]], teacher: Architecture) -> dict[str, tuple[int, int, int]]:
    """Of the axes that any lap cuts."""
    found = {}
    for _, view, _ in views:
        for axis, (low, high) in view.students.ranges.items():
            whole = AXES[axis].size(teacher)
            if low < AXES[axis].size(view.base):
                found[axis] = (low, high, whole)
    return found


def _notes(settings: Settings, views: list[tuple[str, LapView, list[str]]]) -> Iterator[str]:
    """What the figures leave out."""
    if settings.data.dataset and settings.data.max_train_tokens is None:
        yield f"how long {settings.data.dataset} is nobody knows before it is read: rows and their time are not counted (data.max_train_tokens bounds them)"
    if settings.evaluate.tasks and any("evaluate" in names for _, _, names in views):
        yield "evaluate.tasks are not counted: how long they take goes by their documents"
