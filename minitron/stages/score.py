"""Importance of every width unit (one forward pass) and of every layer (iterative removal)."""

from typing import Any

from minitron.importance.removal import check_rules, layer_rules
from minitron.importance.scores import protected_experts
from minitron.search.space import space_of
from minitron.settings.derived import base_stage, fewest_layers, floors
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings
from minitron.settings.teachers import base_architecture
from minitron.walk.stage import StageContext, StoredStage
from minitron.walk.store import Result


def what(settings: Settings) -> Any:
    return {**key_settings(settings.scoring), "floors": floors(settings), "fewest_layers": fewest_layers(settings)}


def width_scoring(settings: Settings, score: Result, *, of_experts: bool = False) -> dict[str, Any]:
    """What the ranking of width units follows from, `of_experts` among them: the walk over the rows, and how sums are put together; not how layers went."""
    search, record = settings.search, score.record
    experts = {"rank_experts": search.rank_experts.name, "protect_experts": search.protect_experts} if of_experts else {}
    return {**experts, "version": record["version"], "data": record["inputs"]["data"], "samples": record["settings"]["samples"],
            "aggregate_tokens": search.aggregate_tokens.name, "aggregate_samples": search.aggregate_samples.name}  # fmt: skip


def check(settings: Settings) -> None:
    base = base_architecture(settings)
    space_of(settings, base)  # its depths say how many layers are removed
    protected_experts(settings)
    check_rules(base.layer_kinds, fewest_layers(settings), layer_rules(settings, base.layer_kinds))


def run(context: StageContext) -> dict:
    from minitron.importance.scoring import score_model

    return score_model(context)


STAGE = StoredStage(version=3, needs=lambda settings: ("data", base_stage(settings)), what=what, check=check, run=run, parallel=True, ends_first_lap=True)
