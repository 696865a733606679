"""The student trained to the teacher's distribution: forward KL on logits."""

from typing import Any

from distill.engines.sharing import check_sharing
from minitron.families.known import FAMILIES
from minitron.families.table import has_router_bias
from minitron.machine import processes
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings
from minitron.settings.teachers import max_positions, teacher_architecture
from minitron.settings.training import Balance, Router, TrainSettings
from minitron.sources.source import check_source
from minitron.text.blends import DATA_ROWS, phase_parts, rows_to_make
from minitron.walk.stage import StageContext, StoredStage


def needs(settings: Settings) -> tuple[str, ...]:
    rows = ("phase_rows",) if rows_to_make(settings) else ()
    return ("data", "teacher", "prune", *rows, *(("distill_cache",) if settings.distill.cached else ()))


def what(settings: Settings) -> Any:
    # The phases in full: what one leaves out is distill.train's.
    return {**key_settings(settings.distill), "train": None, "phases": key_settings(settings.distill.trains()),
            "rows": [[(part.name, part.weight) for part in parts] for parts in phase_parts(settings)], "seed": settings.seed}  # fmt: skip


def check(settings: Settings) -> None:
    """Refuse batches that cannot be shared out or are more than there is to learn, and rows longer than the model's positions."""
    if not settings.distill.phases:
        settings.data.check_tokens("distill.train", settings.distill.train)
    check_experts("distill.train", settings.distill.train, settings)
    for train in settings.distill.trains():
        check_sharing(train.batch, train.micro_batch, processes.world_size(), cached=settings.distill.cached)
    positions = settings.distill.max_positions or max_positions(settings)
    for number, phase in enumerate(settings.distill.phases):
        if phase.sequence_length is not None and phase.sequence_length > positions:
            raise ValueError(f"distill.phases[{number}].sequence_length is {phase.sequence_length}; it must be at most {positions}, "
                             "the teacher's max_position_embeddings (or distill.max_positions)")  # fmt: skip
    for data in rows_to_make(settings).values():
        check_source(data)


def check_experts(name: str, train: TrainSettings, settings: Settings) -> None:
    """Refuse settings of a mixture of experts where the teacher is none, or has no correction biases."""
    teacher = teacher_architecture(settings)
    if train.router is Router.frozen and "E" not in teacher.mixers:
        raise ValueError(f"{name}.router is frozen, but the teacher has no experts and so no router; it must be trained")
    if train.balance is Balance.bias and not has_router_bias(FAMILIES[teacher.model_type], teacher):
        why = f"whose routers have no correction bias ({teacher.model_type})" if "E" in teacher.mixers else "which has no experts"
        raise ValueError(f"{name}.balance is bias, but the teacher is a model {why}; it must be none")


def check_rows(settings: Settings, rows: int, told: str) -> None:
    """Of phases that draw from the data stage's rows alone."""
    for number, (train, parts) in enumerate(zip(settings.distill.trains(), phase_parts(settings), strict=True)):
        if [part.name for part in parts] == [DATA_ROWS]:
            own = settings.distill.phases and settings.distill.phases[number].batch is not None
            settings.data.check_rows(f"distill.phases[{number}]" if own else "distill.train", train, rows, told)


def run(context: StageContext) -> dict:
    from minitron.training.distillation import distill_student

    return distill_student(context)


STAGE = StoredStage(version=3, needs=needs, what=what, check=check, check_rows=check_rows, run=run, parallel=True)
