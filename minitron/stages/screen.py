"""Opens what screening needs from the inputs of a stage."""

import numpy as np

from memory_budget.hf_config import read_config
from minitron.evaluation import batches_of, screening_rows, spread_rows
from minitron.families import family_of
from minitron.pipeline import StageContext, scores_of
from minitron.runtime import pick_device
from minitron.screening import Screen
from minitron.stages.models import result_model_folder
from minitron.teachers import teacher_architecture


def open_screen(context: StageContext) -> Screen:
    """The teacher, its scores and the held-out batches that every candidate is measured on."""
    settings = context.settings
    folder = result_model_folder(context.inputs["teacher"])
    config = read_config(folder)
    family = family_of(config)
    model = family.load(folder, device=str(pick_device(settings)))
    rows = np.load(context.inputs["data"].folder / "heldout.npy", mmap_mode="r")
    batches = batches_of(spread_rows(screening_rows(rows), settings.search.screen_samples), settings.evaluate.batch, next(model.parameters()).device)
    scores = scores_of(context.inputs["score"], settings)
    return Screen(family, model, config, teacher_architecture(settings), scores, batches)
