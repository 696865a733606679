"""base: check the given checkpoint that is to be cut in the teacher's stead."""

from pathlib import Path

from minitron.walk.models import given_checkpoint
from minitron.walk.pipeline import StageContext


def run(context: StageContext) -> dict:
    folder = Path(context.settings.base.path).resolve()
    return given_checkpoint(folder, folder.name)
