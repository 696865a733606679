"""The compensated cut of the prune stage: the base walked from disk one layer at a time, the student's layers kept on disk until it is written."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from distill.batches import count_tokens
from memory_budget.architecture import Architecture
from memory_budget.hf_config import read_config
from minitron.checkpoints import DTYPES, PlannedTensor, PlannedWeights
from minitron.evaluation import batches_of, screening_rows, spread_rows
from minitron.families.base import Family
from minitron.importance.placement import StreamedModel
from minitron.pipeline import StageContext
from minitron.pruning.compensate import Recipe, build_compensated, compensated_tensors
from minitron.pruning.damage import walked_loss
from minitron.pruning.plan import PruningPlan
from minitron.pruning.refit import ridge_for
from minitron.pruning.rotation import stream_basis
from minitron.runtime import pick_device
from minitron.settings import PruneSettings
from minitron.stages.models import base_folder

MADE_FOLDER = "made"


def compensated_plan(context: StageContext, family: Family, plan: PruningPlan, sliced: list[PlannedTensor]) -> list[PlannedTensor]:
    """The tensors of the plain slice, in its order, names, shapes and dtypes, with the values of the compensated cut.

    They are made at once and lie in made/ until remove_made. Raises ValueError as compensated_tensors does.
    """
    settings, folder, source = context.settings.prune, context.folder / MADE_FOLDER, base_folder(context)
    for leftover in (folder, context.folder / "checkpoint"):  # of an interrupted run, whose values may differ in rounding
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir()
    base = _streamed(family, source, read_config(source), plan.teacher, pick_device(context.settings))
    rows = calibration_rows(context)
    batches = batches_of(rows, settings.batch, base.device)
    recipe = _recipe(settings)
    if note := few_tokens_note(plan, recipe, rows):
        context.console.say(f"    prune  {note}")
    dtypes = _stored_dtypes(base)
    turns = recipe.rotate and plan.student.hidden < plan.teacher.hidden
    with context.console.track("compensating", plan.teacher.num_layers * (1 + turns), "layers") as advance:
        basis_DK = stream_basis(base, plan, batches, rotate=recipe.rotate, config=base.config, on_layer=lambda: advance(1))
        made = compensated_tensors(base, plan, batches, basis_DK, recipe, config=base.config, dtypes=dtypes, on_layer=lambda: advance(1))
        return made_on_disk(made, folder, family, sliced)


def compensated_model(context: StageContext, family: Family, plan: PruningPlan) -> nn.Module:
    """What the prune stage would write of a plan, as a float32 model in memory. Raises ValueError as compensated_tensors does."""
    settings, source = context.settings.prune, base_folder(context)
    base = _streamed(family, source, read_config(source), plan.teacher, pick_device(context.settings))
    batches = batches_of(calibration_rows(context), settings.batch, base.device)
    return build_compensated(base, plan, batches, _recipe(settings), config=base.config, dtypes=_stored_dtypes(base))


def _recipe(settings: PruneSettings) -> Recipe:
    return Recipe(settings.rotate, settings.refit_reading, settings.refit_writing, settings.ridge)


def calibration_rows(context: StageContext) -> np.ndarray:
    """The rows of the train split, padding -1, that basis and refits are measured on."""
    return spread_rows(np.load(context.inputs["data"].folder / "train.npy", mmap_mode="r"), context.settings.prune.samples)


def made_on_disk(made: Iterable[tuple[str, torch.Tensor]], folder: Path, family: Family, sliced: list[PlannedTensor]) -> list[PlannedTensor]:
    """The tensors of the plain slice with the values of those made, by canonical name, which are kept in `folder` until they are written."""
    for name, tensor in made:
        save_file({name: tensor.cpu()}, folder / f"{name}.safetensors")
    return [replace(tensor, pieces=partial(_made, folder, family.canonical_name(tensor.name))) for tensor in sliced]


def remove_made(context: StageContext) -> None:
    shutil.rmtree(context.folder / MADE_FOLDER)


def damage(context: StageContext, family: Family, plan: PruningPlan, sliced: list[PlannedTensor], folder: Path) -> dict[str, float]:
    """Held-out loss in nats per token of the base, of its plain slice and of the compensated cut in `folder`, on the rows that screen candidates."""
    settings, source = context.settings, base_folder(context)
    device, config = pick_device(settings), read_config(folder)
    rows = np.load(context.inputs["data"].folder / "heldout.npy", mmap_mode="r")
    batches = batches_of(spread_rows(screening_rows(rows), settings.search.screen_samples), settings.prune.batch, device)
    models = {
        "base": _streamed(family, source, read_config(source), plan.teacher, device),
        "slice": _streamed(family, source, config, plan.student, device, weights=PlannedWeights(sliced)),
        "compensated": _streamed(family, folder, config, plan.student, device),
    }
    return {name: walked_loss(model, batches) for name, model in models.items()}


def _streamed(family: Family, folder: Path, config: Mapping, architecture: Architecture, device: torch.device, *,
              weights: PlannedWeights | None = None) -> StreamedModel:  # fmt: skip
    """A model that computes in float32 whatever it is stored in: a refit measures differences."""
    return StreamedModel(family, folder, {**config, "dtype": "float32"}, architecture, device, weights=weights)


def _stored_dtypes(base: StreamedModel) -> dict[str, torch.dtype]:
    """By canonical name."""
    return {name: DTYPES[base.checkpoint.entries[file_name].dtype] for name, file_name in base.names.items()}


def _made(folder: Path, name: str) -> list[torch.Tensor]:
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        return [file.get_tensor(name)]


def few_tokens_note(plan: PruningPlan, recipe: Recipe, rows: np.ndarray) -> str | None:
    """What to say where the calibration tokens are fewer than the inputs of a matrix that is solved for; None where they are not."""
    student, tokens = plan.student, count_tokens(rows)
    inner = {"M": student.mamba_inner, "-": student.ffn, "*": student.num_attention_heads * student.attention_head_dim}
    widths = [student.hidden] * recipe.refit_reading + [inner[kind] for kind in student.pattern] * recipe.refit_writing
    widest = max(widths, default=0)
    if tokens >= widest:
        return None
    ridge, needed = ridge_for(recipe.ridge, widest, tokens), -(-widest * len(rows) // tokens)
    return (f"{tokens:,} calibration tokens are fewer than the {widest:,} inputs solved for: prune.ridge goes from {recipe.ridge:g} up to {ridge:.2g}; "
            f"prune.samples={needed} would do")  # fmt: skip
