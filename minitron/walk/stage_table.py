"""The stage table: which stage needs which, and what goes into its key."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.measures.tasks import tasks_identity
from minitron.settings.derived import base_stage, candidate_samples, fewest_layers, floors, has_ladder, ranks_refitted, ranks_rotated
from minitron.settings.hand_over import MERGEABLE
from minitron.settings.rules import key_settings
from minitron.settings.run import PruneMethod, Settings
from minitron.settings.teachers import teacher_folder, teacher_identity
from minitron.text.blends import phase_parts, rows_identity, rows_to_make, without_truncation


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One row of the stage table. `version` rises when the stage's results change for the same settings.

    A `parallel` stage runs in every process of `accelerate launch`; the others run in the first while the rest wait.
    """

    version: int
    needs: Callable[[Settings], tuple[str, ...]]
    what: Callable[[Settings], Any]
    parallel: bool = False


def file_digest(path: str | Path, setting: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise ValueError(f"{setting} is {str(path)!r}, which cannot be read: {error.strerror}") from None


def _what_data(settings: Settings) -> Any:
    own = settings.teacher.path is None
    return {**rows_identity(settings.data), "vocab": settings.data.vocab if own else None}


def _what_phase_rows(settings: Settings) -> Any:
    return {name: {**rows_identity(data), "vocab": None} for name, data in rows_to_make(settings).items()}


def _what_teacher(settings: Settings) -> Any:
    if settings.teacher.path is None:
        return {"tiny": key_settings(settings.teacher.tiny), "train": key_settings(settings.teacher.train), "seed": settings.seed}
    from minitron.checkpoints.files import Checkpoint

    # The folder too: the result says where the weights lie, and a card names them.
    folder = teacher_folder(settings)
    return {"weights": Checkpoint(folder).fingerprint, "folder": str(folder)}


def _what_score(settings: Settings) -> Any:
    return {**key_settings(settings.scoring), "floors": floors(settings), "fewest_layers": fewest_layers(settings)}


def _what_base(settings: Settings) -> Any:
    from minitron.checkpoints.files import Checkpoint

    folder = Path(settings.base.path)
    return {"weights": Checkpoint(folder).fingerprint, "folder": str(folder.resolve())}


WORKED_IN = {
    "data": "text.tokenise", "phase_rows": "text.phase_rows", "teacher": "training.tiny_teacher", "teacher_cache": "training.teacher_cache",
    "score": "importance.scoring", "shortlist": "search.shortlist", "screen": "search.screen", "search": "search.choice", "prune": "pruning.disk_to_disk",
    "distill": "training.distillation", "evaluate": "measures.evaluation", "reasoning": "measures.reasoning", "merge": "hand_over.merge",
    "export": "hand_over.export", "generate": "generation.answer",
}  # fmt: skip
CHOOSING = ("finalists", "select", "loss_within", "weights")  # of the search's settings, those that the shortlist does not know


def _what_shortlist(settings: Settings) -> Any:
    order, fixed = settings.search.layer_order, settings.search.fixed.file
    return {
        **{name: value for name, value in key_settings(settings.search).items() if name not in CHOOSING},
        "layer_order": file_digest(order, "search.layer_order") if order else None,
        "fixed_file": file_digest(fixed, "search.fixed.file") if fixed else None,
        "workload": key_settings(settings.workload),
        "budget": key_settings(settings.budget),
        "throughput": key_settings(settings.throughput),
        "teacher": teacher_identity(settings),
        "tiny": {**key_settings(settings.teacher.tiny), "vocab": settings.data.vocab} if settings.teacher.path is None else None,
        **({"rotated_samples": candidate_samples(settings)} if ranks_rotated(settings) else {}),
        **({"refitted": {"samples": candidate_samples(settings), "ridge": settings.prune.ridge}} if ranks_refitted(settings) else {}),
    }


def _what_search(settings: Settings) -> Any:
    return {name: value for name, value in key_settings(settings.search).items() if name in CHOOSING}


def _what_cache(settings: Settings) -> Any:
    return {"top_k": settings.screen.top_k, "tokens": settings.screen.train.tokens}


def _what_distill_cache(settings: Settings) -> Any:
    return {"top_k": settings.screen.top_k, "tokens": settings.distill.train.tokens}


def _what_screen(settings: Settings) -> Any:
    cut = {"prune": {**key_settings(settings.prune), "samples": candidate_samples(settings)}} if settings.prune.method is PruneMethod.compensated else {}
    short = {name: value for name, value in key_settings(settings.screen).items() if name != "cut_samples"}
    return {"candidate": settings.candidate, "seed": settings.seed, **short, **cut}


def _what_prune(settings: Settings) -> Any:
    if settings.prune.method is PruneMethod.slice:
        return {}  # nothing else to choose
    return {**key_settings(settings.prune), "held_out": settings.search.screen_samples}


def _what_distill(settings: Settings) -> Any:
    # The phases in full: what one leaves out is distill.train's.
    return {**key_settings(settings.distill), "train": None, "phases": key_settings(settings.distill.trains()),
            "rows": [[(part.name, part.weight) for part in parts] for parts in phase_parts(settings)], "seed": settings.seed}  # fmt: skip


def _needs_of_distill(settings: Settings) -> tuple[str, ...]:
    rows = ("phase_rows",) if rows_to_make(settings) else ()
    return ("data", "teacher", "prune", *rows, *(("distill_cache",) if settings.distill.cached else ()))


def _what_merge(settings: Settings) -> Any:
    from minitron.checkpoints.files import Checkpoint

    def identity(name: str) -> Any:  # a stage's own key is among the inputs; a folder's name stands on the card
        return name if name in MERGEABLE else {"weights": Checkpoint(Path(name)).fingerprint, "name": Path(name).resolve().name}

    merge = settings.merge
    chosen = {"sweep": merge.candidates(), "samples": merge.samples} if merge.candidates() else {"weights": merge.shares()}
    return {"checkpoints": [identity(name) for name in merge.checkpoints], **chosen}


def _what_evaluate(settings: Settings) -> Any:
    measured = key_settings(settings.evaluate)
    return {**{name: measured[name] for name in ("samples", "speed", "needle")}, "tasks": tasks_identity(settings.evaluate)}


STAGES: Mapping[str, StageSpec] = {
    # The tiny teacher is trained on the data; a given one brings the tokenizer that the data needs.
    "data": StageSpec(2, lambda s: () if s.teacher.path is None else ("teacher",), _what_data),
    "teacher": StageSpec(1, lambda s: ("data",) if s.teacher.path is None else (), _what_teacher),
    "base": StageSpec(1, lambda s: ("teacher",), _what_base),
    "score": StageSpec(3, lambda s: ("data", base_stage(s)), _what_score, parallel=True),
    # A given layer order makes the search plain arithmetic on config.json: no weights, no scores.
    "shortlist": StageSpec(2, lambda s: () if s.search.layer_order else ("data", base_stage(s), "teacher", "score"), _what_shortlist),
    "teacher_cache": StageSpec(2, lambda s: ("data", "teacher"), _what_cache),
    # Once for every finalist, or for settings.candidate alone.
    "screen": StageSpec(2, lambda s: ("data", base_stage(s), "teacher_cache" if s.screen.cached else "teacher", "score", "shortlist"), _what_screen),
    "search": StageSpec(3, lambda s: ("shortlist", "screen") if has_ladder(s) else ("shortlist",), _what_search),
    "prune": StageSpec(3, lambda s: (base_stage(s), "score", "search", *(("data",) if s.prune.method is PruneMethod.compensated else ())), _what_prune),
    # Only where the student learns from a cache.
    "distill_cache": StageSpec(1, lambda s: ("data", "teacher"), _what_distill_cache),
    # Only where a phase of distillation wants other rows than the data stage's.
    "phase_rows": StageSpec(1, lambda s: ("data", "teacher"), _what_phase_rows),
    "distill": StageSpec(3, _needs_of_distill, _what_distill, parallel=True),
    # The same on whole reasoning traces alone, to show what the cut ones do.
    "whole_rows": StageSpec(1, lambda s: ("data", "teacher"), lambda s: _what_phase_rows(without_truncation(s))),
    "distill_whole": StageSpec(1, lambda s: ("data", "teacher", "prune", "whole_rows"), lambda s: _what_distill(without_truncation(s)), parallel=True),
    # Asked for by name alone: of given folders and weights it needs no stage.
    "merge": StageSpec(1, lambda s: (*(("data",) if s.merge.candidates() else ()), *s.merge.stages()), _what_merge),
    "evaluate": StageSpec(2, lambda s: ("data", "teacher", "prune", "distill"), _what_evaluate),
    "reasoning": StageSpec(1, lambda s: ("data", "teacher", "distill", "distill_whole"), lambda s: key_settings(s.reasoning)),
}
