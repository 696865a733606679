"""All measurements, the Pareto front of loss, memory and modelled speed, the choice and its reason."""

from typing import Any

from minitron.settings.derived import has_ladder
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings
from minitron.settings.search import CHOOSING
from minitron.walk.stage import StageContext, StoredStage


def needs(settings: Settings) -> tuple[str, ...]:
    return ("shortlist", "screen") if has_ladder(settings) else ("shortlist",)


def what(settings: Settings) -> Any:
    return {name: value for name, value in key_settings(settings.search).items() if name in CHOOSING}


def run(context: StageContext) -> dict:
    from minitron.search.choice import choose_candidate

    return choose_candidate(context, what(context.settings))


STAGE = StoredStage(version=3, needs=needs, what=what, run=run, in_one_lap=lambda settings: bool(settings.search.layer_order))
