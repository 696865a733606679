"""Train the pruned student to the teacher's distribution, in one process or in several."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distill.batches import BlendBatches, RowBatches, RowNumbers, count_counted
from distill.chunked_loss import LossRecipe
from distill.engines.engine import Unread
from distill.engines.launch import Launch, read_launch
from distill.engines.sharing import idle_rows
from distill.objectives import HiddenTerm, LossFunction, cached_loss, distillation_loss
from distill.plan import Phase, StepRecord
from distill.states import newest_state, remove_states
from distill.trainer import HeldOut, train_phases
from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.units import GIB
from minitron.checkpoints.files import DTYPES, Checkpoint, stored_bytes
from minitron.checkpoints.publish import state_tensors, student_card, write_planned
from minitron.families.base import HIDDEN, Family
from minitron.families.known import family_of
from minitron.families.state import in_dtype
from minitron.families.table import names_by_canonical
from minitron.machine.device import pick_device, process_memory_bytes
from minitron.machine.pace import Work, pace_here
from minitron.machine.rate import duration
from minitron.settings.teachers import teacher_architecture
from minitron.settings.training import DistillSettings, Rows, TrainSettings
from minitron.text.blends import DATA_ROWS, Part, phase_parts
from minitron.text.samples import batches_of, screening_rows, spread_rows
from minitron.training.expert_load import expert_load
from minitron.training.memory import PhaseMemory, check_fits, check_host, has_flash_attention
from minitron.training.steps import METRICS_FILE, tracked_steps, train_plan
from minitron.training.teacher_cache import cached_rows, open_cache
from minitron.training.time import check_time, training_flops, training_work
from minitron.walk.stage import StageContext


def distill_student(context: StageContext) -> dict:
    """Writes checkpoint/ (the student, in the pruned checkpoint's dtypes) and metrics.jsonl; read back before done."""
    settings, launch = context.settings, read_launch()
    torch.manual_seed(settings.seed)
    pruned_folder = context.inputs["prune"].model_folder
    config = read_config(pruned_folder)
    family = family_of(config)
    trains = planned_trains(context, config, launch)
    phases = _phases(context, trains)
    _check_time(context, config, trains, launch)
    recipe = loss_recipe(settings.distill)
    loss, counted_of = _loss(context, family, recipe, launch)
    student = load_for_training(family, pruned_folder, launch=launch, device=pick_device(settings), dtype=torch.float32, attention=_attention(context))
    tokens = sum(phase.num_steps * phase.batches.tokens_per_step for phase in phases)
    with tracked_steps(context, "distilling", tokens, loss_name=_loss_name(context.settings.distill)) as on_step:
        last = train_phases(student, phases, loss, folder=context.folder, on_step=on_step, launch=launch, counted_of=counted_of,
                            held_out=_held_out(context))  # fmt: skip
    if launch.rank > 0:
        return {}
    _write_student(context, family, config, last)
    remove_states(context.folder)
    headline = f"{last.tokens:,} tokens, {last.step + 1:,} steps, {_loss_name(context.settings.distill)} {last.recent_loss:.3f} nats/token at the end"
    kl = last.recent_loss if _loss_name(context.settings.distill) == "KL" else None
    facts = {"tokens": last.tokens, "steps": last.step + 1, "seconds": round(last.seconds, 3), "final_kl_nats_per_token": kl}
    if load := expert_load(context.folder / METRICS_FILE, architecture_from_config(config), settings.distill.train):
        context.console.say(f"  distill  {load['sentence']}")
        facts["expert_load"] = load
    return {"headline": headline, "path": "checkpoint", "name": _name(context), **facts}


def _loss(context: StageContext, family: Family, recipe: LossRecipe, launch: Launch) -> tuple[LossFunction, Callable[[torch.Tensor], int]]:
    """The loss against the teacher, or against what a cache has of it; and how many positions of a batch count."""
    if context.settings.distill.cached:
        rows = cached_rows(context, context.settings.distill.train.tokens)
        return cached_loss(open_cache(context.inputs["distill_cache"], rows), rows, recipe), lambda numbers_B: count_counted(rows[numbers_B.cpu()])
    folder = context.inputs["teacher"].model_folder
    teacher = load_for_training(family, folder, launch=launch, device=pick_device(context.settings), attention=_attention(context))
    return distillation_loss(teacher, recipe, launch=launch, hidden=_hidden_term(context)), count_counted


def _hidden_term(context: StageContext) -> HiddenTerm | None:
    weight = context.settings.distill.loss.hidden_weight
    if weight == 0:
        return None
    plan = json.loads((context.inputs["prune"].folder / "plan.json").read_text())
    hidden = teacher_architecture(context.settings).hidden
    if (own := plan["teacher"]["hidden"]) != hidden:
        raise ValueError(f"distill.loss.hidden_weight is {weight:g}; it needs a student cut from hidden states like the teacher's, "
                         f"but base.path has {own} channels and the teacher {hidden}")  # fmt: skip
    return HiddenTerm(weight, torch.tensor(plan["units"].get(HIDDEN, {}).get("-1", range(hidden))))


def load_for_training(family: Family, folder: Path, *, launch: Launch, device: torch.device, dtype: torch.dtype | None = None,
                      attention: str | None = None) -> nn.Module | Unread:  # fmt: skip
    """A checkpoint's model for an engine; where that is FSDP2, not read yet. dtype None keeps the stored one, attention None transformers' choice."""
    if launch.engine != "fsdp2":
        model = family.load(folder, dtype=dtype, device=str(device))
        if attention:
            model.set_attn_implementation(attention)
        return model
    checkpoint, config = Checkpoint(folder), read_config(folder)
    names = names_by_canonical(family, architecture_from_config(config), checkpoint.entries)
    dtypes = {DTYPES[entry.dtype] for entry in checkpoint.entries.values()}
    with torch.device("meta"):
        model = family.build(config)
    model, buffers = in_dtype(model, dtype or min(dtypes, key=lambda one: one.itemsize))
    if attention:
        model.set_attn_implementation(attention)
    return Unread(model.eval(), lambda name: buffers[name] if name in buffers else checkpoint.read(names[family.canonical_name(name)]), device)


def _name(context: StageContext) -> str:
    return f"{context.inputs['teacher'].facts['name']}, pruned and distilled"


def loss_recipe(settings: DistillSettings) -> LossRecipe:
    """The settings as distill knows them."""
    loss = settings.loss
    return LossRecipe(loss.divergence.value, loss.beta, settings.temperature, loss.cross_entropy_weight)


def _loss_name(settings: DistillSettings) -> str:
    """KL where the loss is that and nothing else; what is mixed or scaled is no measure of the student."""
    recipe = loss_recipe(settings)
    return "KL" if recipe == LossRecipe(beta=recipe.beta) and not settings.loss.hidden_weight else "loss"


def planned_trains(context: StageContext, config: dict, launch: Launch) -> list[TrainSettings]:
    """The training settings of every phase with its way of checkpointing chosen; prints and checks the plan of the one that needs most. Raises ValueError."""
    settings, width = context.settings, 0 if context.settings.distill.cached else stored_bytes(context.inputs["teacher"].model_folder)
    lengths = [parts[0].data.sequence_length for parts in phase_parts(settings)]
    on_gpu = pick_device(settings).type == "cuda"
    needs = [PhaseMemory(architecture_from_config(config), teacher_architecture(settings), launch, length, width, on_gpu, _is_packed(parts))
             for length, parts in zip(lengths, phase_parts(settings), strict=True)]  # fmt: skip
    available, place = process_memory_bytes(pick_device(settings))
    trains = [need.with_checkpointing(train, available) for need, train in zip(needs, settings.distill.trains(), strict=True)]
    plans = [need.of(train) for need, train in zip(needs, trains, strict=True)]
    largest = max(plans, key=lambda plan: plan.total)
    engine = f"{launch.engine}, {launch.world_size} processes: " if launch.world_size > 1 else ""
    context.console.say(f"{engine:>11}{largest.describe()}")
    for train in trains:
        if idle := idle_rows(train.batch, launch.world_size):
            context.console.say(f"  distill  {train.batch} rows a step on {launch.world_size} processes: in the last round {idle} of them compute padding")
    check_fits(largest, available, place, "distill")
    check_host(max(need.host_bytes(train) for need, train in zip(needs, trains, strict=True)), "distill")
    return trains


def _is_packed(parts: Sequence[Part]) -> bool:
    return any(part.data.rows is Rows.packed for part in parts)


def _attention(context: StageContext) -> str | None:
    """The attention that packed rows want on a GPU: one that goes by documents, where there is one; None leaves the model's own, or none."""
    settings = context.settings
    packed = any(map(_is_packed, phase_parts(settings))) and "*" in teacher_architecture(settings).mixers
    flash = packed and pick_device(settings).type == "cuda" and has_flash_attention(teacher_architecture(settings), settings.distill.train.precision)
    return "flash_attention_2" if flash else None


def _check_time(context: StageContext, config: dict, trains: Sequence[TrainSettings], launch: Launch) -> None:
    """Say about how long the phases take where that is more than a minute, and check that they need not take too long."""
    settings, device = context.settings, pick_device(context.settings)
    student, teacher = architecture_from_config(config), None if settings.distill.cached else teacher_architecture(settings)
    phases = [(train, parts[0].data.sequence_length) for train, parts in zip(trains, phase_parts(settings), strict=True)]
    check_time(training_flops(student, teacher, phases), device, trains[0].precision, processes=launch.world_size, max_hours=settings.distill.max_hours,
               has_mamba="M" in student.pattern)  # fmt: skip
    pace = pace_here(device.type, launch.world_size)
    seconds = pace.seconds(sum((training_work(student, teacher, *phase) for phase in phases), Work()), shared=True) if pace else 0
    if seconds > 60:
        context.console.say(f"  distill  takes about {duration(seconds / 3600)}")


def _phases(context: StageContext, trains: Sequence[TrainSettings]) -> list[Phase]:
    settings, phases = context.settings, []
    if settings.distill.cached:
        (train,) = trains
        return [Phase(RowNumbers(cached_rows(context, train.tokens), train.batch, settings.seed + 1), train_plan(train))]
    for number, (train, parts) in enumerate(zip(trains, phase_parts(settings), strict=True)):
        rows, tokens = zip(*(_rows(context, part) for part in parts), strict=True)
        seed = settings.seed + 1 + number  # another order than the teacher's own training, where that was here
        if len(parts) == 1:
            batches = RowBatches(rows[0], train.batch, seed, num_tokens=tokens[0])
        else:
            batches = BlendBatches(rows, [part.weight for part in parts], tokens=train.tokens, batch=train.batch, seed=seed, num_tokens=tokens)
        phases.append(Phase(batches, train_plan(train)))
    return phases


def _rows(context: StageContext, part: Part) -> tuple[np.ndarray, int]:
    """A part's rows, not yet read, and how many real tokens they hold, as whoever wrote them has counted."""
    result = context.inputs["data" if part.name == DATA_ROWS else "phase_rows"]
    tokens = result.facts["train_tokens"] if part.name == DATA_ROWS else result.facts["rows"][part.name]["tokens"]
    return np.load(result.folder / f"{part.name}.npy", mmap_mode="r"), tokens


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
    pruned_folder = context.inputs["prune"].model_folder
    planned = state_tensors(family, newest_state(context.folder).folder, like=Checkpoint(pruned_folder))
    folder = context.folder / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier sitting, whose state may have been another
    write_planned(folder, family, planned, config=config, companions=pruned_folder, card=_card(context, config, last),
                  max_shard_bytes=int(context.settings.prune.max_shard_gib * GIB))  # fmt: skip


def _card(context: StageContext, config: dict, last: StepRecord) -> str:
    student: Architecture = architecture_from_config(config)
    recipe = loss_recipe(context.settings.distill)
    term = " and a hidden-state term" if context.settings.distill.loss.hidden_weight else ""
    trained = f"Distilled from the same teacher by {_recipe_words(recipe)}{term} for {last.tokens:,} tokens; "
    trained += f"{_loss_name(context.settings.distill)} at the end {last.recent_loss:.3f} nats per token."
    lines = [f"Cut: {context.inputs['prune'].facts['description']}", "", trained]
    return student_card(context, _name(context), lines=lines, architecture=student, source=context.inputs["teacher"])


def _recipe_words(recipe: LossRecipe) -> str:
    name = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": f"JSD({recipe.beta:g})"}[recipe.divergence]
    at = f" at temperature {recipe.temperature:g}" if recipe.temperature != 1 else ""
    mixed = f", mixed with {recipe.cross_entropy_weight:.0%} cross-entropy," if recipe.cross_entropy_weight else ""
    return f"{name} on logits{at}{mixed}"
