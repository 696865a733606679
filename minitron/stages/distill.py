"""distill: train the pruned student to the teacher's distribution, in one process or in several."""

import numpy as np
import torch

from distill.batches import BlendBatches, RowBatches
from distill.chunked_loss import LossRecipe
from distill.launch import Launch, read_launch
from distill.objectives import distillation_loss
from distill.plan import Phase, StepRecord
from distill.states import load_weights, newest_state, remove_states
from distill.trainer import HeldOut, train_phases
from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.units import GIB
from minitron.blends import DATA_ROWS, phase_parts
from minitron.checkpoints import DTYPES, Checkpoint
from minitron.evaluation import batches_of, screening_rows, spread_rows
from minitron.families import family_of
from minitron.families.base import Family
from minitron.pipeline import StageContext
from minitron.publish import check_reload, model_card, write_model
from minitron.runtime import pick_device, process_memory_bytes
from minitron.settings import DistillSettings
from minitron.stages.models import result_model_folder
from minitron.stages.training import tracked_steps, train_plan
from minitron.teachers import teacher_architecture
from minitron.training_memory import check_fits, training_memory


def run(context: StageContext) -> dict:
    """Writes checkpoint/ (the student, in the pruned checkpoint's dtypes) and metrics.jsonl; read back before done."""
    settings, launch = context.settings, read_launch()
    torch.manual_seed(settings.seed)
    teacher_folder, pruned_folder = (result_model_folder(context.inputs[name]) for name in ("teacher", "prune"))
    config = read_config(pruned_folder)
    family, device = family_of(config), str(pick_device(settings))
    phases = _phases(context)
    _check_memory(context, config, launch)
    recipe = loss_recipe(settings.distill)
    loss = distillation_loss(family.load(teacher_folder, device=device), recipe, launch=launch)
    student = family.load(pruned_folder, dtype=torch.float32, device=device)
    tokens = sum(phase.num_steps * phase.batches.tokens_per_step for phase in phases)
    with tracked_steps(context, "distilling", tokens, loss_name=_loss_name(recipe)) as on_step:
        last = train_phases(student, phases, loss, folder=context.folder, on_step=on_step, launch=launch, held_out=_held_out(context))
    if launch.rank > 0:
        return {}
    _write_student(context, family, config, last)
    remove_states(context.folder)
    headline = f"{last.tokens:,} tokens, {last.step + 1:,} steps, {_loss_name(recipe)} {last.recent_loss:.3f} nats/token at the end"
    kl = last.recent_loss if _loss_name(recipe) == "KL" else None
    facts = {"tokens": last.tokens, "steps": last.step + 1, "seconds": round(last.seconds, 3), "final_kl_nats_per_token": kl}
    return {"headline": headline, "path": "checkpoint", "name": _name(context), **facts}


def _name(context: StageContext) -> str:
    return f"{context.inputs['teacher'].facts['name']}, pruned and distilled"


def loss_recipe(settings: DistillSettings) -> LossRecipe:
    """The settings as distill knows them."""
    loss = settings.loss
    return LossRecipe(loss.divergence.value, loss.beta, settings.temperature, loss.cross_entropy_weight)


def _loss_name(recipe: LossRecipe) -> str:
    """KL where the loss is that and nothing else; what is mixed or scaled is no measure of the student."""
    return "KL" if recipe == LossRecipe(beta=recipe.beta) else "loss"


def _check_memory(context: StageContext, config: dict, launch: Launch) -> None:
    """Print and check the plan of the phase that needs most."""
    settings, teacher = context.settings, teacher_architecture(context.settings)
    stored = Checkpoint(result_model_folder(context.inputs["teacher"])).entries.values()
    width = max(DTYPES[entry.dtype].itemsize for entry in stored)
    lengths = [parts[0].data.sequence_length for parts in phase_parts(settings)]
    on_gpu = pick_device(settings).type == "cuda"
    plans = [training_memory(architecture_from_config(config), teacher, train, launch, sequence_length=length, teacher_bytes_per_number=width, on_gpu=on_gpu)
             for train, length in zip(settings.distill.trains(), lengths, strict=True)]  # fmt: skip
    largest = max(plans, key=lambda plan: plan.total)
    engine = f"{launch.engine}, {launch.world_size} processes: " if launch.world_size > 1 else ""
    context.console.say(f"{engine:>11}{largest.describe()}")
    check_fits(largest, *process_memory_bytes(pick_device(settings)))


def _phases(context: StageContext) -> list[Phase]:
    settings, phases = context.settings, []
    for number, (train, parts) in enumerate(zip(settings.distill.trains(), phase_parts(settings), strict=True)):
        rows = [np.load(context.inputs["data" if part.name == DATA_ROWS else "phase_rows"].folder / f"{part.name}.npy", mmap_mode="r") for part in parts]
        seed = settings.seed + 1 + number  # another order than the teacher's own training, where that was here
        if len(parts) == 1:
            batches = RowBatches(rows[0], train.batch, seed)
        else:
            batches = BlendBatches(rows, [part.weight for part in parts], tokens=train.tokens, batch=train.batch, seed=seed)
        phases.append(Phase(batches, train_plan(train)))
    return phases


def _held_out(context: StageContext) -> HeldOut | None:
    """The rows that also screen candidates, none of which grades the student."""
    distill = context.settings.distill
    if distill.held_out_every is None:
        return None
    rows = np.load(context.inputs["data"].folder / "heldout.npy", mmap_mode="r")
    rows = spread_rows(screening_rows(rows), distill.held_out_samples)
    return HeldOut(batches=batches_of(rows, context.settings.evaluate.batch, "cpu"), every_steps=distill.held_out_every)


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
    recipe = loss_recipe(context.settings.distill)
    trained = f"Distilled from the same teacher by {_recipe_words(recipe)} for {last.tokens:,} tokens; "
    trained += f"{_loss_name(recipe)} at the end {last.recent_loss:.3f} nats per token."
    return model_card(_name(context), lines=[context.inputs["prune"].facts["description"], "", trained], architecture=student, base=name)


def _recipe_words(recipe: LossRecipe) -> str:
    name = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": f"JSD({recipe.beta:g})"}[recipe.divergence]
    at = f" at temperature {recipe.temperature:g}" if recipe.temperature != 1 else ""
    mixed = f", mixed with {recipe.cross_entropy_weight:.0%} cross-entropy," if recipe.cross_entropy_weight else ""
    return f"{name} on logits{at}{mixed}"
