"""distill: train the pruned student to the teacher's distribution."""

import numpy as np
import torch

from distill.batches import RowBatches
from distill.trainer import STATE_FILE, StepRecord, distill
from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.units import GIB
from minitron.checkpoints import DTYPES, Checkpoint
from minitron.families import family_of
from minitron.pipeline import StageContext
from minitron.publish import check_reload, model_card, write_model
from minitron.runtime import pick_device
from minitron.stages.models import result_model_folder
from minitron.stages.training import tracked_steps, train_plan


def run(context: StageContext) -> dict:
    """Writes checkpoint/ (the student, in the pruned checkpoint's dtypes) and metrics.jsonl; read back before done."""
    settings = context.settings
    torch.manual_seed(settings.seed)
    teacher_folder, pruned_folder = (result_model_folder(context.inputs[name]) for name in ("teacher", "prune"))
    config = read_config(pruned_folder)
    family, device = family_of(config), str(pick_device(settings))
    teacher = family.load(teacher_folder, device=device)
    student = family.load(pruned_folder, dtype=torch.float32, device=device)
    rows = np.load(context.inputs["data"].folder / "train.npy", mmap_mode="r")
    plan = train_plan(settings.distill.train)
    with tracked_steps(context, "distilling", plan, loss_name="KL") as on_step:
        # Another order than the teacher's own training, where that was here.
        batches = RowBatches(rows, settings.distill.train.batch, settings.seed + 1)
        last = distill(teacher, student, batches, plan, temperature=settings.distill.temperature, folder=context.folder, on_step=on_step)

    stored = Checkpoint(pruned_folder)
    dtypes = {family.canonical_name(name): DTYPES[entry.dtype] for name, entry in stored.entries.items()}
    folder = context.folder / "checkpoint"
    write_model(folder, family, student, config=config, dtypes=dtypes, companions=pruned_folder, card=_card(context, config, last),
                max_shard_bytes=int(settings.prune.max_shard_gib * GIB))  # fmt: skip
    for name, tensor in student.state_dict().items():  # what is on disk is rounded to these dtypes
        tensor.copy_(tensor.to(dtypes[family.canonical_name(name)]))
    check_reload(folder, family, student)
    (context.folder / STATE_FILE).unlink(missing_ok=True)
    headline = f"{last.tokens:,} tokens, {last.step + 1:,} steps, KL {last.recent_loss:.3f} nats/token at the end"
    facts = {"tokens": last.tokens, "steps": last.step + 1, "seconds": round(last.seconds, 3), "final_kl_nats_per_token": last.recent_loss}
    return {"headline": headline, "path": "checkpoint", "name": _name(context), **facts}


def _name(context: StageContext) -> str:
    return f"{context.inputs['teacher'].facts['name']}, pruned and distilled"


def _card(context: StageContext, config: dict, last: StepRecord) -> str:
    name = context.inputs["teacher"].facts["name"]
    student: Architecture = architecture_from_config(config)
    trained = f"Distilled from the same teacher by forward KL on logits for {last.tokens:,} tokens; KL at the end {last.recent_loss:.3f} nats per token."
    return model_card(_name(context), lines=[context.inputs["prune"].facts["description"], "", trained], architecture=student, base=name)
