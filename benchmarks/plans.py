"""What every stage of the 12B recipes will hold on a GPU: the memory plans that the stages themselves make, for three machines. Counted, nothing is run.

python benchmarks/plans.py          # Markdown, as in docs/scale.md; the last line is one JSON object
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.engines.launch import Launch  # noqa: E402
from distill.engines.sharing import idle_rows  # noqa: E402
from memory_budget.architecture import Architecture  # noqa: E402
from memory_budget.units import GIB  # noqa: E402
from minitron.checkpoints.forward_memory import forward_memory  # noqa: E402
from minitron.door.composed import compose_settings  # noqa: E402
from minitron.importance.memory import ScoringNeeds  # noqa: E402
from minitron.settings.run import Placement, Settings  # noqa: E402
from minitron.settings.teachers import teacher_architecture  # noqa: E402
from minitron.settings.training import Rows, TrainSettings  # noqa: E402
from minitron.text.blends import phase_parts  # noqa: E402
from minitron.training.memory import PhaseMemory  # noqa: E402

BF16 = 2
PUBLISHED = {"pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", "hidden": 4480, "ffn": 15680}  # N2, arXiv 2508.14444


@dataclass(frozen=True, slots=True)
class Machines:
    """GPUs of a kind, what of each is free once CUDA has started, and what the processes of one machine share of main memory."""

    title: str
    gpus: int
    gib: float
    host_gib_per_gpu: float


MACHINES = (Machines("1 × H200", 1, 139.0, 240), Machines("8 × H100", 8, 79.1, 240), Machines("64 × H100", 64, 79.1, 240))


@dataclass(frozen=True, slots=True)
class Line:
    """One stage on one machine: what it holds, how, and whether it fits."""

    stage: str
    gib: float
    how: str
    fits: bool


def experiment(name: str) -> Settings:
    """The settings of conf/experiment/NAME.yaml."""
    return compose_settings(f"experiment={name}")


def lines(settings: Settings, machines: Machines) -> Iterator[Line]:
    """Every stage that holds models, in the order of the walk; the students are the published ones."""
    teacher, free = teacher_architecture(settings), int(machines.gib * GIB)
    deep = replace(teacher, pattern=PUBLISHED["pattern"])
    student, length = replace(teacher, **PUBLISHED), settings.data.sequence_length
    for placement in Placement:
        needs, scoring = ScoringNeeds(teacher, length, BF16, machines.gpus), replace(settings.scoring, placement=placement)
        plan = needs.plan(scoring, needs.depth_block_tokens(scoring, free))
        yield Line(f"score, {placement.name}", plan.total / GIB, f"{needs.depth_block_tokens(scoring, free):,} tokens a block", plan.total <= free)
    plan = forward_memory("shortlist", [(teacher, BF16), (deep, BF16)], tokens=settings.evaluate.batch * length, logits_tokens=1024, advice="")
    yield Line("shortlist, second lap", plan.total / GIB, "one GPU, the others wait", plan.total <= free)
    yield _training("screen, depths", deep, teacher, settings.screen.train, machines, length)
    yield _training("screen, widths", student, teacher, settings.screen.train, machines, length)
    yield _training("distill, first lap", deep, teacher, settings.distill.train, machines, length)
    for train, parts in zip(settings.distill.trains(), phase_parts(settings), strict=True):
        packed = any(part.data.rows is Rows.packed for part in parts)
        own = parts[0].data.sequence_length
        yield _training(f"distill, rows of {own:,}{', packed' * packed}", student, teacher, train, machines, own)
    longest = max([*(speed.input_tokens for speed in settings.evaluate.speed), *settings.evaluate.needle.lengths])
    both = forward_memory("evaluate", [(teacher, BF16), (student, BF16)], tokens=settings.evaluate.batch * length, logits_tokens=1024, advice="")
    alone = forward_memory("evaluate", [(teacher, BF16)], tokens=longest, logits_tokens=1024, advice="")
    plan = max(both, alone, key=lambda one: one.total)
    yield Line("evaluate", plan.total / GIB, f"one GPU, {longest:,} tokens", plan.total <= free)


def _training(stage: str, student: Architecture, teacher: Architecture, train: TrainSettings, machines: Machines, length: int) -> Line:
    """Packed rows are planned with flash attention, which makes no mask."""
    launch, free = Launch("fsdp2" if machines.gpus > 1 else "single", 0, machines.gpus), int(machines.gib * GIB)
    need = PhaseMemory(student, teacher, launch, length, BF16, on_gpu=True)
    chosen = need.with_checkpointing(train, free)
    host = need.host_bytes(chosen) / GIB
    again = "every layer computed again" if chosen.checkpoint_every == 1 else f"of every {chosen.checkpoint_every} layers one computed again"
    how = {False: "all activations kept", True: again, "host": f"inputs in main memory, {host:,.0f} GiB a GPU"}
    idle = idle_rows(train.batch, machines.gpus)
    uneven = f"; {train.batch} rows a step, {idle} GPUs wait in the last round" if idle else ""
    total = need.of(chosen).total
    return Line(stage, total / GIB, how[chosen.gradient_checkpointing] + uneven, total <= free and host <= machines.host_gib_per_gpu)


def main() -> int:
    found = {}
    for name in ("nano2", "nano2-reasoning", "nano2-base"):
        settings = experiment(name)
        columns = {machines.title: list(lines(settings, machines)) for machines in MACHINES}
        found[name] = {title: {line.stage: round(line.gib, 1) if line.fits else None for line in column} for title, column in columns.items()}
        print(f"\n**{name}**, GiB a GPU\n\n| stage | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for row in zip(*columns.values(), strict=True):
            cells = [f"{line.gib:,.1f}{'' if line.fits else ' **refused**'}, {line.how}" if line.gib else line.how for line in row]
            print(f"| {row[0].stage} | {' | '.join(cells)} |")
    print(json.dumps({"benchmark": "plans", "gib": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
