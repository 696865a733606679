"""base: check the given checkpoint that is to be cut in the teacher's stead."""

from pathlib import Path

from minitron.pipeline import StageContext
from minitron.stages.models import given_checkpoint


def run(context: StageContext) -> dict:
    folder = Path(context.settings.base.path).resolve()
    return given_checkpoint(folder, folder.name)
