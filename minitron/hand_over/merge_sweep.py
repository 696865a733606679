"""Which weights a merge is made with: every candidate's loss on held-out rows that `evaluate` does not report; the lowest wins."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from minitron.checkpoints.files import PlannedTensor, PlannedWeights
from minitron.families.base import Family
from minitron.families.state import model_tensors
from minitron.machine.device import pick_device
from minitron.measures.held_out import held_out_loss
from minitron.report.text import nats
from minitron.text.samples import batches_of, screening_rows, spread_rows
from minitron.walk.stage import StageContext
from minitron.walk.store import write_json

FILE = "sweep.json"
Tried = dict[str, Any]  # {"weights": one per checkpoint, "loss_nats_per_token"}


def try_weights(context: StageContext, family: Family, config: dict, plan: Callable[[list[float]], Sequence[PlannedTensor]]) -> list[Tried]:
    """The held-out loss of every candidate of merge.sweep or merge.steps, in their order; those that an interrupted stage measured are kept.

    `plan` gives a candidate's tensors. One model is in memory, nothing is written but sweep.json. Raises ValueError where the held-out rows
    are of another tokenizer than the checkpoints.
    """
    settings, path = context.settings.merge, context.folder / FILE
    device = str(pick_device(context.settings))
    rows = spread_rows(screening_rows(np.load(context.inputs["data"].folder / "heldout.npy", mmap_mode="r")), settings.samples)
    if rows.max() >= config["vocab_size"]:
        raise ValueError(f"merge.checkpoints have a vocabulary of {config['vocab_size']:,}, the held-out rows hold token {rows.max():,}; "
                         "teacher.path must be of the checkpoints' tokenizer, which the rows are made with")  # fmt: skip
    tried: list[Tried] = json.loads(path.read_text()) if path.exists() else []
    candidates, batches = settings.candidates(), batches_of(rows, settings.batch, device)
    model = family.build(config).to(device).eval()
    if tried:
        context.goes_on(f"merge {len(tried)} of {len(candidates)}")
    with context.console.track("trying merges", len(candidates), "merges", done=len(tried)) as advance:
        for shares in candidates[len(tried) :]:
            weights = PlannedWeights(plan(shares))
            with torch.no_grad():
                for name, tensor in model_tensors(family, model).items():
                    tensor.copy_(weights.read(family.file_name(name)))
            tried.append({"weights": shares, "loss_nats_per_token": held_out_loss(model, batches)})
            write_json(path, tried)
            advance(1)
    return tried


def best_of(tried: Sequence[Tried]) -> Tried:
    """The lowest loss; of equal ones the first. Raises ValueError where a loss is not a number."""
    for one in tried:
        if not np.isfinite(one["loss_nats_per_token"]):
            raise ValueError(f"merge.sweep: weights {one['weights']} give a loss of {one['loss_nats_per_token']}; leave them out")
    return min(tried, key=lambda one: one["loss_nats_per_token"])


def said_of(tried: Sequence[Tried]) -> str:
    """For the headline: what the choice was made from."""
    if not tried:
        return ""
    losses = ", ".join(f"{_weights(one)} {nats(one['loss_nats_per_token'])}" for one in tried)
    return f" (lowest of {len(tried)} held-out losses, nats/token: {losses})"


def sweep_lines(tried: Sequence[Tried]) -> list[str]:
    """For the model card: a table of all candidates."""
    if not tried:
        return []
    rows = [f"| {_weights(one)} | {nats(one['loss_nats_per_token'])} |" for one in tried]
    return ["", "Chosen by loss on held-out rows that evaluation does not report:", "", "| weights | nats/token |", "|---|---|", *rows]


def _weights(one: Tried) -> str:
    return " + ".join(f"{share:g}" for share in one["weights"])
