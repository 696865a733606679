"""Importance of every width unit (one forward pass) and of every layer (iterative removal)."""

from typing import Any

from minitron.importance.removal import check_rules, layer_rules
from minitron.search.space import space_of
from minitron.settings.derived import base_stage, fewest_layers, floors
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings
from minitron.settings.teachers import base_architecture
from minitron.walk.stage import StageContext, StoredStage


def what(settings: Settings) -> Any:
    return {**key_settings(settings.scoring), "floors": floors(settings), "fewest_layers": fewest_layers(settings)}


def check(settings: Settings) -> None:
    base = base_architecture(settings)
    space_of(settings, base)  # its depths say how many layers are removed
    check_rules(base.layer_kinds, fewest_layers(settings), layer_rules(settings))


def run(context: StageContext) -> dict:
    from minitron.importance.scoring import score_model

    return score_model(context)


STAGE = StoredStage(version=3, needs=lambda settings: ("data", base_stage(settings)), what=what, check=check, run=run, parallel=True, ends_first_lap=True)
