"""What is said of a checkpoint that a stage is handed."""

from collections.abc import Callable
from pathlib import Path

import torch

from memory_budget.architecture import Architecture, describe_layers
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from memory_budget.units import GIB
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.folder import content_bytes, content_digest
from minitron.checkpoints.weight_files import check_plain_weights
from minitron.families.base import Family
from minitron.families.config_json import CODE_KEYS, transformers_config
from minitron.families.known import family_of
from minitron.families.table import check_tensors, layer_of, left_out, names_by_canonical
from minitron.walk.console import Console


def given_checkpoint(folder: Path, name: str, setting: str = "the checkpoint", *, say: Callable[[str], None] = lambda _: None) -> dict:
    """Facts of a stage that is handed its model: the checkpoint's headers are held against its config. `say` hears what a person should know of it.

    `setting` is what named the folder. Raises ValueError for what no stage can take: quantised weights, tensors missing, too many or of another shape.
    """
    config = read_config(folder)
    check_plain_weights(folder, config, setting)
    family, architecture = family_of(config), architecture_from_config(config)
    transformers_config(config)
    checkpoint = Checkpoint(folder)
    _check_depth(family, architecture, checkpoint)
    names = names_by_canonical(family, architecture, checkpoint.entries)
    check_tensors(family, architecture, {canonical: checkpoint.entries[tensor].shape for canonical, tensor in names.items()})
    _check_second_head(family, architecture, checkpoint)
    code = [f"{name} in config.json names code beside the weights, which is not run" for name in CODE_KEYS if name in config]
    notes = [*checkpoint.notes, *left_out(family, architecture, checkpoint.entries), *code]
    for note in notes:
        say(f"{setting}: {note}")
    parameters = count_total_parameters(architecture)
    headline = f"{name}: {parameters:,} parameters, {describe_layers(architecture)}"
    return {"headline": headline, "path": str(folder), "name": name, "parameters": parameters, "notes": notes}


def _check_depth(family: Family, architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Fewer layers in the files than config.json says: transformers would make up the others at random."""
    layers = [layer for name in checkpoint.entries if (layer := layer_of(family.canonical_name(name))) >= 0]
    stored = (max(layers, default=-1) + 1) // architecture.sublayers_per_layer
    if 0 < stored < architecture.num_layers:
        raise ValueError(f"config.json in {checkpoint.folder} says {architecture.num_layers:,} layers, but its files hold {stored:,}, and transformers would "
                         f"make up the others at random: give all of its files, or make the config say {stored:,}")  # fmt: skip


def identity_of(folder: Path, console: Console) -> dict[str, str]:
    """The fact by which later stages know the folder: the digest of its contents, with a bar, since of a large model every byte is read."""
    with console.track("reading weights", content_bytes(folder) / GIB, "GiB") as advance:
        return {"identity": content_digest(folder, lambda num_bytes: advance(num_bytes / GIB))}


def _check_second_head(family: Family, architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Where the table of embeddings is the head and a head is stored all the same, it must be that table: transformers loads another one untied."""
    named = {family.canonical_name(name): name for name in checkpoint.entries}
    table, head = (named.get(f"{family.outside_names[part]}weight") for part in ("embed", "head"))
    if architecture.has_own_head or head is None:
        return
    if checkpoint.entries[table].shape != checkpoint.entries[head].shape or not _same_values(checkpoint, table, head):
        raise ValueError(f"tie_word_embeddings is true in {checkpoint.folder / 'config.json'}, but {head} holds other values than {table}: "
                         "if the model has a head of its own, set it to false; else store the table alone")  # fmt: skip


def _same_values(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of a shape are equal, some rows of each at a time."""
    pairs = ((rows, checkpoint.read_some(other, first, len(rows))) for first, rows in checkpoint.read_rows(one))
    return all(torch.equal(rows.float(), others.float()) for rows, others in pairs)
