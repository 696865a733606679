"""What of a walk the store has already: looked up by keys, nothing is run or downloaded for it."""

from pathlib import Path

from minitron.formats.files import matching_files
from minitron.plan.downloads import download_bytes
from minitron.settings.run import Settings
from minitron.settings.teachers import is_converted, is_tiny
from minitron.walk.laps import depth_lap
from minitron.walk.pipeline import finished_laps
from minitron.walk.table import order_of, stage_of, stored_stages

DEPTH, WIDTHS = "depth", "widths"
QUICKLY_READ_BYTES = 2**28  # of files whose contents are in a key

Done = frozenset[tuple[str, str]]


def done_stages(settings: Settings, *, quickly: bool) -> Done:
    """(stage, lap) of all that is done, laps by their names. None of it where the teacher is yet to be downloaded, whose files are in every key.

    `quickly`: nothing either where keys ask the Hub, or are made of large files.
    """
    if download_bytes(settings, 1) or (quickly and not _is_quick(settings)):
        return frozenset()
    names, found = ("",) if depth_lap(settings) is None else (DEPTH, WIDTHS), set()
    try:
        laps = finished_laps(settings)
    except (ValueError, OSError):  # weights that are not there yet, or a runs folder that cannot be: the run itself tells
        return frozenset()
    for lap, name in zip(laps, names, strict=False):
        for stage in order_of(lap.settings):
            each = stored_stages()[stage].per_candidate
            labels = [label for label in lap.results if stage_of(label) == stage]
            wanted = len(each.wanted(lap)) if each and lap.settings.candidate is None and "shortlist" in lap.results else 1
            if len(labels) >= max(wanted, 1):
                found.add((stage, name))
    return frozenset(found)


def _is_quick(settings: Settings) -> bool:
    local = is_tiny(settings) or is_converted(settings) or Path(settings.teacher.path).is_dir()
    files = sum(path.stat().st_size for path in matching_files(settings.data.files)) if settings.data.files else 0
    return local and files <= QUICKLY_READ_BYTES and not settings.evaluate.tasks and not settings.distill.phases
