"""score: width importance by one forward pass, layer importance by iterative removal."""

import numpy as np

from memory_budget.hf_config import read_config
from minitron.evaluation import batches_of, spread_rows
from minitron.families import family_of
from minitron.importance.activations import score_width
from minitron.importance.layers import Removal, rank_by_removal
from minitron.pipeline import StageContext, fewest_layers, floors
from minitron.runtime import pick_device
from minitron.stages.models import result_model_folder
from minitron.store import write_json
from minitron.teachers import teacher_architecture

SCORES_FILE, LAYERS_FILE = "scores.safetensors", "layers.json"


def run(context: StageContext) -> dict:
    """Writes scores.safetensors (per site) and layers.json (order of removal with every round's scores)."""
    settings, console = context.settings, context.console
    folder = result_model_folder(context.inputs["teacher"])
    family, architecture = family_of(read_config(folder)), teacher_architecture(settings)
    model = family.load(folder, device=str(pick_device(settings)))
    device = next(model.parameters()).device
    rows = np.load(context.inputs["data"].folder / "train.npy", mmap_mode="r")
    width_rows = spread_rows(rows, settings.scoring.samples)
    batches = batches_of(width_rows, settings.scoring.batch, device)
    with console.track("width importance", width_rows.size, "tokens") as advance:
        scores = score_width(family, model, architecture, _announced(batches, advance))
    scores.save(context.folder / SCORES_FILE)

    layer_batches = batches_of(spread_rows(rows, settings.scoring.layer_samples), settings.scoring.batch, device)
    to_remove = max(0, architecture.num_layers - fewest_layers(settings))
    with console.track("layer importance", to_remove, "layers") as advance:

        def on_round(removal: Removal) -> None:
            advance(1, f"layer {removal.layer} goes, {removal.score:.3f}")

        removals = rank_by_removal(
            family.parts(model), architecture.pattern, layer_batches, num_layers=fewest_layers(settings), floors=floors(settings),
            normalised=settings.scoring.normalised, on_round=on_round,
        )  # fmt: skip
    order = [removal.layer for removal in removals]
    write_json(context.folder / LAYERS_FILE, {"pattern": architecture.pattern, "removal_order": order, "rounds": [r.to_json() for r in removals]})
    first = f"; layers go in the order {' '.join(map(str, order))}" if order else ""
    headline = f"{len(scores.sites)} sites scored from {width_rows.size:,} tokens{first}"
    return {"headline": headline, "removal_order": order, "removal_scores": [r.score for r in removals], "tokens": int(width_rows.size)}


def _announced(batches, advance):
    for batch in batches:
        yield batch
        advance(batch.numel())
