"""One candidate, cut as the prune stage would cut it, distilled briefly and measured.

Every candidate gets the same rows in the same order, so that their losses compare. On a CPU, in one process, it is cut in memory; on GPUs, and in
several processes, disk to disk by the first one, since base and student together in float32 are more than a GPU holds.
"""

import shutil
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from distill.batches import RowBatches, RowNumbers, count_counted
from distill.engines.engine import Unread
from distill.engines.launch import Launch, read_launch
from distill.objectives import cached_loss, distillation_loss
from distill.plan import Phase
from distill.states import load_weights, newest_state, remove_states
from distill.trainer import train_phases
from memory_budget.architecture import Architecture
from memory_budget.hf_config import read_config
from memory_budget.parameters import count_total_parameters
from memory_budget.units import format_gib
from minitron.checkpoints.files import stored_bytes
from minitron.families.base import Family
from minitron.families.known import can_decode, family_of
from minitron.importance.scores import scores_of
from minitron.machine.alone import measured_alone
from minitron.machine.device import let_go, pick_device, process_memory_bytes
from minitron.machine.processes import from_first
from minitron.measures.held_out import held_out_loss
from minitron.measures.speed import decode_tokens_per_second
from minitron.pruning.compensated_cut import BASIS_FILE, compensated_model
from minitron.pruning.cut import build_pruned
from minitron.pruning.disk_to_disk import write_cut
from minitron.pruning.plan import PruningPlan, make_plan
from minitron.search.zero_shot import screening_batches
from minitron.settings.derived import candidate_samples
from minitron.settings.run import PruneMethod
from minitron.settings.teachers import base_architecture, teacher_architecture
from minitron.settings.training import TrainSettings
from minitron.text.samples import longest_prompt
from minitron.training.distillation import load_for_training
from minitron.training.memory import PhaseMemory, check_fits, check_host
from minitron.training.steps import tracked_steps, train_plan
from minitron.training.teacher_cache import cached_rows, open_cache
from minitron.walk.stage import StageContext
from minitron.walk.tracking import Tracker, open_candidate

START_FOLDER = "start"


def screen_candidate(context: StageContext) -> dict:
    """The candidate's held-out loss after its short distillation and its decode speed here; metrics.jsonl is beside them."""
    settings, device, launch = context.settings, pick_device(context.settings), read_launch()
    entry = context.inputs["shortlist"].facts["entries"][settings.candidate]
    plan = make_plan(base_architecture(settings), Architecture(**entry["architecture"]), tuple(entry["kept_layers"]),
                     scores_of(context.inputs["score"], settings))  # fmt: skip
    on_disk = device.type == "cuda" or launch.world_size > 1
    train = _planned_train(context, plan, launch, device, on_disk=on_disk)
    with open_candidate(settings, entry) if launch.rank == 0 else nullcontext(Tracker()) as tracker:
        student = _cut_on_disk(context, plan, launch, device) if on_disk else _cut(context, plan, device)
        tokens = _distil(context, train, student, device, launch, tracker)
        if tokens is not None and on_disk:
            del student
            let_go()
            student = _trained(context, device) if launch.rank == 0 else None
        if launch.rank > 0:
            return {}
        if tokens is None:
            note = "its short distillation diverged"
            tracker.summarise({**entry, "note": note})
            return {"headline": f"{entry['id']}  {note}; never chosen", "id": entry["id"], "short_distill_loss": None, "tokens_per_second": None, "note": note}
        facts = {"id": entry["id"], **_measured(context, entry, student, device), "short_distill_tokens": tokens}
        tracker.summarise({**entry, **facts})
    remove_states(context.folder)
    shutil.rmtree(context.folder / START_FOLDER, ignore_errors=True)
    return {"headline": f"{entry['id']}  {facts['short_distill_loss']:.3f} nats/token after {tokens:,} tokens", **facts}


def _measured(context: StageContext, entry: dict, student: nn.Module, device: torch.device) -> dict:
    batches = screening_batches(context, device)
    prompt = longest_prompt(torch.cat(batches).cpu().numpy(), context.settings.screen.prompt_tokens).to(device)
    loss = held_out_loss(student, batches)
    new_tokens, decodes = context.settings.screen.new_tokens, can_decode(Architecture(**entry["architecture"]))
    speed, alone = measured_alone(lambda: decode_tokens_per_second(student, prompt, new_tokens)) if decodes else (None, None)
    return {"short_distill_loss": loss, "tokens_per_second": speed, "speed_alone": alone}


def _planned_train(context: StageContext, plan: PruningPlan, launch: Launch, device: torch.device, *, on_disk: bool) -> TrainSettings:
    """The training settings with their way of checkpointing chosen. Raises ValueError for what the device cannot hold: the training, or the cut in memory."""
    settings = context.settings
    teacher_bytes = 0 if settings.screen.cached else stored_bytes(context.inputs["teacher"].model_folder)
    need = PhaseMemory(plan.student, teacher_architecture(settings), launch, settings.data.sequence_length, teacher_bytes, device.type == "cuda")
    available, place = process_memory_bytes(device)
    train = need.with_checkpointing(settings.screen.train, available)
    check_fits(need.of(train), available, place, "screen")
    check_host(need.host_bytes(train), "screen")
    cutting = 4 * (count_total_parameters(plan.teacher) + count_total_parameters(plan.student))
    if not on_disk and cutting > available:
        raise ValueError(f"screen: cutting {settings.candidate} in memory needs {format_gib(cutting)}; {place} has {format_gib(available)}")
    return train


def _cut(context: StageContext, plan: PruningPlan, device: torch.device) -> nn.Module:
    """The candidate in float32 and in memory, as prune.method says."""
    config = read_config(context.base_folder)
    family = family_of(config)
    if context.settings.prune.method is PruneMethod.compensated:
        return compensated_model(context, family, plan)
    return build_pruned(family, family.load(context.base_folder, dtype=torch.float32, device=str(device)), plan, config)


def _cut_on_disk(context: StageContext, plan: PruningPlan, launch: Launch, device: torch.device) -> nn.Module | Unread:
    """The same by way of a checkpoint, which stays until the screen is done: an interrupted one finds it."""
    family, folder = _family(context), context.folder / START_FOLDER
    if launch.rank == 0 and not (folder / "config.json").exists():
        of_candidates = replace(context.settings.prune, samples=candidate_samples(context.settings))
        write_cut(replace(context, settings=replace(context.settings, prune=of_candidates)), family, plan, folder, card="A candidate on its way.\n")
        (context.folder / BASIS_FILE).unlink(missing_ok=True)
        let_go()
    from_first(None)
    return load_for_training(family, folder, launch=launch, device=device, dtype=torch.float32)


def _trained(context: StageContext, device: torch.device) -> nn.Module:
    """The student of the last saved state, whole."""
    model = _family(context).load(context.folder / START_FOLDER, dtype=torch.float32, device=str(device))
    load_weights(newest_state(context.folder), model)
    return model


def _family(context: StageContext) -> Family:
    return family_of(read_config(context.base_folder))


def _distil(context: StageContext, train: TrainSettings, student: nn.Module | Unread, device: torch.device, launch: Launch, tracker: Tracker) -> int | None:
    """Trains the student in place; returns the tokens it saw, None where the loss stopped being a number."""
    settings = context.settings
    plan, rows = train_plan(train), cached_rows(context, train.tokens)
    if settings.screen.cached:
        loss = cached_loss(open_cache(context.inputs["teacher_cache"], rows), rows)
        batches = RowNumbers(rows, train.batch, settings.seed)
    else:
        folder = context.inputs["teacher"].model_folder
        loss = distillation_loss(load_for_training(family_of(read_config(folder)), folder, launch=launch, device=device), launch=launch)
        batches = RowBatches(rows, train.batch, settings.seed)

    def counted_of(batch: torch.Tensor) -> int:
        return count_counted(rows[batch.cpu().numpy()] if settings.screen.cached else batch)

    with tracked_steps(context, settings.candidate, plan.tokens, loss_name="KL", tracker=tracker) as on_step:
        try:
            return train_phases(student, [Phase(batches, plan)], loss, folder=context.folder, on_step=on_step, launch=launch, counted_of=counted_of).tokens
        except FloatingPointError as error:
            context.console.say(f"   screen  {settings.candidate}: {error}")
            return None
