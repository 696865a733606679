"""Where finished stages keep their models, and what is said of a checkpoint that was given."""

from pathlib import Path

from memory_budget.hf_config import architecture_from_config, read_config
from minitron.pipeline import StageContext, base_stage
from minitron.store import Result


def result_model_folder(result: Result) -> Path:
    """The checkpoint folder of a teacher, base, prune or distill result; a path in its facts is relative to the result's folder."""
    return result.folder / result.facts["path"]


def base_folder(context: StageContext) -> Path:
    """The checkpoint that is cut: the teacher's, or the one of base.path."""
    return result_model_folder(context.inputs[base_stage(context.settings)])


def given_checkpoint(folder: Path, name: str) -> dict:
    """Facts of a stage that is handed its model: the checkpoint's headers are held against its config. Raises ValueError."""
    from minitron.checkpoints import Checkpoint
    from minitron.families import family_of
    from minitron.pruning.cut import check_tensors

    config = read_config(folder)
    family, architecture = family_of(config), architecture_from_config(config)
    checkpoint = Checkpoint(folder)
    check_tensors(family, architecture, {family.canonical_name(tensor): entry.shape for tensor, entry in checkpoint.entries.items()})
    headline = f"{name}: {checkpoint.num_parameters:,} parameters, pattern {architecture.pattern}"
    return {"headline": headline, "path": str(folder), "name": name, "parameters": checkpoint.num_parameters}
