"""The plain slice of the chosen architecture, which a compensated cut is held against (prune.against_slice)."""

from dataclasses import replace

from minitron.settings.derived import base_stage
from minitron.settings.run import PruneMethod, Settings
from minitron.stages import prune
from minitron.walk.stage import StageContext, StoredStage


def sliced(settings: Settings) -> Settings:
    """The same cut as it is, at the rate that its student is to be distilled at."""
    train = settings.distill.train
    rate = train.learning_rate if settings.prune.slice_learning_rate is None else settings.prune.slice_learning_rate
    distill = replace(settings.distill, train=replace(train, learning_rate=rate))
    return replace(settings, prune=replace(settings.prune, method=PruneMethod.slice), distill=distill)


def run(context: StageContext) -> dict:
    return prune.run(replace(context, settings=sliced(context.settings)))


STAGE = StoredStage(version=1, needs=lambda settings: (base_stage(settings), "score", "search"), what=lambda settings: {}, of_inputs=prune.of_inputs, run=run)
