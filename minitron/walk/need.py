"""Whether there is anything to cut: a teacher that fits its budget as it is ends a run before any work, unless somebody said what to cut it to."""

from memory_budget.calculator import memory_report
from memory_budget.units import format_gib
from minitron.settings.derived import budget_of, workload_of
from minitron.settings.follow import has_own_space
from minitron.settings.run import Settings
from minitron.settings.teachers import teacher_architecture
from minitron.walk.stage import UsingStage
from minitron.walk.table import order_of, stages

CUTS = {"shortlist", "prune"}  # stages that a run which cuts anything goes through
ALWAYS = {"evaluate"}  # asked for by name, it measures whatever there is


def nothing_to_cut(settings: Settings) -> str | None:
    """What to say where the run would cut a teacher that fits and nobody asked for it by a size, a space, a base or search.even_if_it_fits; else None."""
    told = settings.search.even_if_it_fits or settings.search.fixed.given() or settings.base.path is not None or has_own_space(settings)
    uses = isinstance(stages().get(settings.stage.value), UsingStage)
    if told or uses or settings.stage.value in ALWAYS or not CUTS & set(order_of(settings)):
        return None
    teacher, workload, budget = teacher_architecture(settings), workload_of(settings), budget_of(settings)
    needed = memory_report(teacher, workload).total
    if needed > budget.bytes:
        return None
    return (f"the teacher fits as it is ({budget.name}): it takes {format_gib(needed)} of {format_gib(budget.bytes)} at {workload.context_tokens:,} tokens, so "
            f"nothing needs cutting and nothing was done. To cut it all the same: search.even_if_it_fits=true, or name sizes, e.g. search.fixed={{layers: "
            f"{teacher.num_layers * 3 // 4}}}")  # fmt: skip
