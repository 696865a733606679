"""What is said of a checkpoint that a stage is handed."""

from pathlib import Path

from memory_budget.architecture import describe_layers
from memory_budget.hf_config import architecture_from_config, read_config
from minitron.checkpoints.files import Checkpoint
from minitron.families.known import family_of
from minitron.families.table import check_tensors


def given_checkpoint(folder: Path, name: str) -> dict:
    """Facts of a stage that is handed its model: the checkpoint's headers are held against its config. Raises ValueError."""
    config = read_config(folder)
    family, architecture = family_of(config), architecture_from_config(config)
    checkpoint = Checkpoint(folder)
    check_tensors(family, architecture, {family.canonical_name(tensor): entry.shape for tensor, entry in checkpoint.entries.items()})
    headline = f"{name}: {checkpoint.num_parameters:,} parameters, {describe_layers(architecture)}"
    return {"headline": headline, "path": str(folder), "name": name, "parameters": checkpoint.num_parameters}
