"""Where a finished stage keeps its model."""

from pathlib import Path

from minitron.store import Result


def result_model_folder(result: Result) -> Path:
    """The checkpoint folder of a teacher, prune or distill result; a path in its facts is relative to the result's folder."""
    return result.folder / result.facts["path"]
