"""distill: train the pruned student to the teacher's distribution, in one process or in several."""

import numpy as np
import torch

from distill.batches import RowBatches
from distill.launch import read_launch
from distill.plan import Phase, StepRecord
from distill.states import load_weights, newest_state, remove_states
from distill.trainer import distillation_loss, train_phases
from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.units import GIB
from minitron.checkpoints import DTYPES, Checkpoint
from minitron.families import family_of
from minitron.families.base import Family
from minitron.pipeline import StageContext
from minitron.publish import check_reload, model_card, write_model
from minitron.runtime import pick_device
from minitron.stages.models import result_model_folder
from minitron.stages.training import tracked_steps, train_plan


def run(context: StageContext) -> dict:
    """Writes checkpoint/ (the student, in the pruned checkpoint's dtypes) and metrics.jsonl; read back before done."""
    settings, launch = context.settings, read_launch()
    torch.manual_seed(settings.seed)
    teacher_folder, pruned_folder = (result_model_folder(context.inputs[name]) for name in ("teacher", "prune"))
    config = read_config(pruned_folder)
    family, device = family_of(config), str(pick_device(settings))
    rows = np.load(context.inputs["data"].folder / "train.npy", mmap_mode="r")
    plan = train_plan(settings.distill.train)
    # Another order than the teacher's own training, where that was here.
    phases = [Phase(RowBatches(rows, settings.distill.train.batch, settings.seed + 1), plan)]
    if launch.world_size > 1:
        context.console.say(f"  distill  {launch.engine}, {launch.world_size} processes")
    loss = distillation_loss(family.load(teacher_folder, device=device), temperature=settings.distill.temperature, launch=launch)
    student = family.load(pruned_folder, dtype=torch.float32, device=device)
    with tracked_steps(context, "distilling", plan, loss_name="KL") as on_step:
        last = train_phases(student, phases, loss, folder=context.folder, on_step=on_step, launch=launch)
    if launch.rank > 0:
        return {}
    _write_student(context, family, config, last)
    remove_states(context.folder)
    headline = f"{last.tokens:,} tokens, {last.step + 1:,} steps, KL {last.recent_loss:.3f} nats/token at the end"
    facts = {"tokens": last.tokens, "steps": last.step + 1, "seconds": round(last.seconds, 3), "final_kl_nats_per_token": last.recent_loss}
    return {"headline": headline, "path": "checkpoint", **facts}


def _write_student(context: StageContext, family: Family, config: dict, last: StepRecord) -> None:
    """checkpoint/ from the newest state, which holds whole tensors whatever the engine."""
    pruned_folder = result_model_folder(context.inputs["prune"])
    stored = Checkpoint(pruned_folder)
    dtypes = {family.canonical_name(name): DTYPES[entry.dtype] for name, entry in stored.entries.items()}
    student = family.build(config)
    load_weights(newest_state(context.folder), student)
    folder = context.folder / "checkpoint"
    write_model(folder, family, student, config=config, dtypes=dtypes, companions=pruned_folder, card=_card(context, config, last),
                max_shard_bytes=int(context.settings.prune.max_shard_gib * GIB))  # fmt: skip
    for name, tensor in student.state_dict().items():  # what is on disk is rounded to these dtypes
        tensor.copy_(tensor.to(dtypes[family.canonical_name(name)]))
    check_reload(folder, family, student)


def _card(context: StageContext, config: dict, last: StepRecord) -> str:
    name = context.inputs["teacher"].facts["name"]
    student: Architecture = architecture_from_config(config)
    trained = f"Distilled from the same teacher by forward KL on logits for {last.tokens:,} tokens; KL at the end {last.recent_loss:.3f} nats per token."
    return model_card(f"{name}, pruned and distilled", lines=[context.inputs["prune"].facts["description"], "", trained], architecture=student, base=name)
