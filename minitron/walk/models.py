"""Where finished stages keep their models, and what is said of a checkpoint that was given."""

from pathlib import Path
from typing import Any

from memory_budget.hf_config import architecture_from_config, read_config
from minitron.settings.derived import base_stage
from minitron.settings.run import Settings
from minitron.walk.pipeline import StageContext
from minitron.walk.store import Result

SCORES_FILE = "scores.safetensors"


def result_model_folder(result: Result) -> Path:
    """The checkpoint folder of a teacher, base, prune or distill result; a path in its facts is relative to the result's folder."""
    return result.folder / result.facts["path"]


def base_folder(context: StageContext) -> Path:
    """The checkpoint that is cut: the teacher's, or the one of base.path."""
    return result_model_folder(context.inputs[base_stage(context.settings)])


def scores_of(score: Result, settings: Settings) -> Any:
    """The ImportanceScores of a score stage, under the aggregation of the settings."""
    from minitron.importance.scores import load_scores

    search = settings.search
    return load_scores(score.folder / SCORES_FILE, tokens=search.aggregate_tokens.name, samples=search.aggregate_samples.name)


def given_checkpoint(folder: Path, name: str) -> dict:
    """Facts of a stage that is handed its model: the checkpoint's headers are held against its config. Raises ValueError."""
    from minitron.checkpoints.files import Checkpoint
    from minitron.families.known import family_of
    from minitron.pruning.cut import check_tensors

    config = read_config(folder)
    family, architecture = family_of(config), architecture_from_config(config)
    checkpoint = Checkpoint(folder)
    check_tensors(family, architecture, {family.canonical_name(tensor): entry.shape for tensor, entry in checkpoint.entries.items()})
    headline = f"{name}: {checkpoint.num_parameters:,} parameters, pattern {architecture.pattern}"
    return {"headline": headline, "path": str(folder), "name": name, "parameters": checkpoint.num_parameters}
