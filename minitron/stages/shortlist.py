"""Every architecture that passes the filters, a diversified few of them, and their zero-shot losses."""

import hashlib
from pathlib import Path
from typing import Any

from minitron.search.layer_order import given_layer_order
from minitron.search.space import check_search
from minitron.settings.derived import asked_candidate_samples, base_stage, ranks_refitted, ranks_rotated
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings
from minitron.settings.search import CHOOSING
from minitron.settings.teachers import base_architecture, is_trained, teacher_identity
from minitron.walk.stage import StageContext, StoredStage


def needs(settings: Settings) -> tuple[str, ...]:
    # A given layer order makes the search plain arithmetic on config.json: no weights, no scores.
    return () if settings.search.layer_order else ("data", base_stage(settings), "teacher", "score")


def what(settings: Settings) -> Any:
    order, fixed = settings.search.layer_order, settings.search.fixed.file
    return {
        **{name: value for name, value in key_settings(settings.search).items() if name not in CHOOSING},
        "layer_order": _digest(order, "search.layer_order") if order else None,
        "fixed_file": _digest(fixed, "search.fixed.file") if fixed else None,
        "workload": key_settings(settings.workload),
        "budget": key_settings(settings.budget),
        "throughput": key_settings(settings.throughput),
        "teacher": teacher_identity(settings),
        "tiny": {**key_settings(settings.teacher.tiny), "vocab": settings.data.vocab} if is_trained(settings) else None,
        **({"rotated_samples": asked_candidate_samples(settings)} if ranks_rotated(settings) else {}),
        **({"refitted": {"samples": asked_candidate_samples(settings), "ridge": settings.prune.ridge}} if ranks_refitted(settings) else {}),
    }


def _digest(path: str | Path, setting: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise ValueError(f"{setting} is {str(path)!r}, which cannot be read: {error.strerror}") from None


def check(settings: Settings) -> None:
    base = base_architecture(settings)
    check_search(settings, base)
    if settings.search.layer_order:
        given_layer_order(settings.search.layer_order, base)


def run(context: StageContext) -> dict:
    from minitron.search.shortlist import make_shortlist

    return make_shortlist(context)


STAGE = StoredStage(version=2, needs=needs, what=what, check=check, run=run, in_one_lap=lambda settings: bool(settings.search.layer_order))
