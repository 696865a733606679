"""The plan as a person reads it: a few lines before the work, and the whole of it for stage=plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

from memory_budget.units import format_gib
from minitron.machine import processes
from minitron.machine.rate import duration
from minitron.plan.done import done_stages
from minitron.plan.plan import DEPTH, TRAINING, WIDTHS, Plan, StagePlan, plan_of
from minitron.plan.refusals import check_before_work, refused_because
from minitron.settings.run import Settings, Stage
from minitron.walk.console import Console
from minitron.walk.need import nothing_to_cut
from nas.axes import AXES

LONGEST = 3  # stages that the few lines name
ORDINALS = {"": "", DEPTH: "first", WIDTHS: "second"}
LAPS = {lap: f"{ordinal} lap, " * bool(ordinal) for lap, ordinal in ORDINALS.items()}


def begin(settings: Settings, console: Console) -> None:
    """The first lines of a run, in its first process. Raises ValueError, after them, for what cannot end well. A merge is no walk, and says enough itself."""
    if settings.stage.value == "merge":
        return
    done = done_stages(settings, quickly=False)
    plan, ends_here = plan_of(settings, done), nothing_to_cut(settings) is not None
    if processes.rank() == 0:
        for line in [_said(_uncut_line(plan))] if ends_here else lines(plan):
            console.say(line)
    if not ends_here:
        check_before_work(settings, done)


def print_plan(settings: Settings, console: Console) -> None:
    """The whole plan, and what a run would refuse of it."""
    settings = replace(settings, stage=Stage.all)
    done = done_stages(settings, quickly=True)
    for line in table(plan_of(settings, done)):
        console.say(line)
    if settings.followed:
        console.say(f"followed from the model and the budget: {' '.join(settings.followed)}")
    if said := nothing_to_cut(settings):
        console.say(f"such a run would end before any work: {said}")
    elif refused := refused_because(settings, done):
        console.say(f"such a run would be refused here: {refused}")


def lines(plan: Plan) -> list[str]:
    """What a run says first: what is cut, whether it fits, time, memory and disk; at most six lines."""
    cut = (_cut_line(plan), _uncut_line(plan)) if plan.cuts else ()
    ahead = (_space_line(plan), *_other_lines(plan)) if plan.ahead else ()
    return [_said(text) for text in (*cut, _time_line(plan), *ahead)]


def _said(text: str) -> str:
    return f"{'plan':>9}  {text}"


def table(plan: Plan) -> list[str]:
    """All of it: the few lines, then every stage with what decides it."""
    head = ("stage", "time", "memory", "disk", "tokens", "decided by")
    rows = [head, *(_row(stage) for stage in plan.stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    cells = ["  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in range(1, len(widths))), row[-1]]).rstrip() for row in rows]
    notes = [f"not counted: {note}" for note in plan.notes]
    return [*lines(plan), "", *cells, "", *notes, *_footnotes(plan)]


def _cut_line(plan: Plan) -> str:
    ranges = (f"{AXES[axis].title} {_range(low, high)} of {whole:,}" + " (following)" * (axis in plan.follow)
              for axis, (low, high, whole) in plan.ranges.items())  # fmt: skip
    cut = ", ".join(ranges) or "nothing is cut"
    verdict = "fits" if plan.student_fits else "does not fit"
    about = "" if plan.fixed else "about "
    has_experts = plan.teacher_active != plan.teacher_parameters
    active = f" ({_count(plan.teacher_active)} → {_count(plan.student_active)} active per token)" if has_experts else ""
    return (f"{cut}: {_count(plan.teacher_parameters)} → {about}{_count(plan.student_parameters)} parameters{active}, {format_gib(plan.student_bytes)}, which "
            f"{verdict} {format_gib(plan.budget_bytes)}{'' if plan.budget_name.endswith(' GiB') else f' of {plan.budget_name}'}")  # fmt: skip


def _uncut_line(plan: Plan) -> str:
    weighed = ", ".join(f"{format_gib(size)} in {dtype}{' (fits)' * (size <= plan.budget_bytes)}" for dtype, size in plan.uncut_bytes.items())
    fits = f"fits uncut, with {format_gib(plan.spare_bytes)} to spare" if plan.teacher_fits else "does not fit uncut"
    return f"the teacher {fits}; it would take {weighed}"


def _time_line(plan: Plan) -> str:
    ahead = plan.ahead
    done = len(plan.stages) - len(ahead)
    before = f"{done} of {len(plan.stages)} stages are done already; " if done else ""
    if not ahead:
        return "everything is done already"
    if plan.seconds is None:
        return f"{before}how long it takes on {plan.device or 'this GPU'} is not known: plan.device names GPUs that are"
    longest = sorted(ahead, key=lambda stage: -stage.seconds)[:LONGEST]
    named = ", ".join(f"{stage.stage}{_of_lap(stage)} {duration(stage.seconds / 3600)}" for stage in longest)
    return f"{before}about {duration(plan.seconds / 3600)} on {plan.device}, most of it {named}"


def _of_lap(stage: StagePlan) -> str:
    return f" of the {ORDINALS[stage.lap]} lap" if stage.lap else ""


def _space_line(plan: Plan) -> str:
    most = max(plan.ahead, key=lambda stage: stage.memory_bytes, default=None)
    room = "more than" if most and most.memory_bytes > plan.available_bytes else "of"
    held = f"{format_gib(most.memory_bytes)} of memory at most ({most.stage}), {room} {format_gib(plan.available_bytes)} there" if most else "no memory"
    return f"{held}, {format_gib(plan.disk_bytes)} of disk"


def _other_lines(plan: Plan) -> Iterator[str]:
    if plan.distill_tokens:
        cost = "" if plan.device_hours is None else f", {_hours(plan.device_hours)}"
        processes = f" on {plan.processes} devices" if plan.processes > 1 else ""
        yield f"distillation learns from {plan.distill_tokens:,} tokens{cost}{processes}"
    if plan.download_bytes:
        yield f"about {format_gib(plan.download_bytes)} of the teacher are to be downloaded from the Hub"


def _hours(hours: float) -> str:
    return f"{hours:,.0f} device-hours" if hours >= 10 else f"{hours:,.2f} device-hours"


def _row(stage: StagePlan) -> Sequence[str]:
    name = f"{LAPS[stage.lap]}{stage.stage}" + (f" × {stage.times}" if stage.times > 1 else "")
    time = "done" if stage.done else "?" if stage.seconds is None else duration(stage.seconds / 3600)
    disk = format_gib(stage.disk_bytes) + (f" + {format_gib(stage.scratch_bytes)}" if stage.scratch_bytes else "")
    return name, time, format_gib(stage.memory_bytes), disk, f"{stage.tokens:,}" if stage.stage in TRAINING else "", _decided(stage.decided_by)


def _decided(settings: Mapping[str, Any]) -> str:
    """Short values as they are, others by their setting's name alone."""
    shown = []
    for name, value in settings.items():
        text = value.value if isinstance(value, Enum) else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        shown.append(f"{name}={text}" if len(text) <= 40 and "Settings(" not in text else name)
    return " ".join(shown)


def _footnotes(plan: Plan) -> Iterator[str]:
    yield "disk: what stays, + what is there besides while the stage runs; memory: of each process" + (" on its GPU" if "×" in plan.device else "")
    if plan.seconds is not None:
        yield "times are right within a factor of two for a stage, mostly less for the whole (docs/plan.md)"


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _count(parameters: int) -> str:
    """2.9 M, 12.3 B."""
    return f"{parameters / 1e9:,.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.1f} M"
