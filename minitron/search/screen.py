"""One candidate, cut in memory as the prune stage would cut it, distilled briefly from the shared teacher cache and measured.

Every candidate gets the same rows in the same order, so that their losses compare.
"""

import torch
from torch import nn

from distill.batches import RowBatches, RowNumbers, count_tokens
from distill.objectives import cached_loss, distillation_loss
from distill.plan import Phase
from distill.states import remove_states
from distill.trainer import train_phases
from memory_budget.architecture import Architecture
from memory_budget.hf_config import read_config
from minitron.families.known import family_of
from minitron.importance.scores import scores_of
from minitron.machine.device import pick_device
from minitron.measures.held_out import held_out_loss
from minitron.measures.speed import decode_tokens_per_second
from minitron.pruning.compensated_cut import compensated_model
from minitron.pruning.cut import build_pruned
from minitron.pruning.plan import make_plan
from minitron.search.zero_shot import screening_batches
from minitron.settings.run import PruneMethod
from minitron.settings.teachers import base_architecture
from minitron.text.samples import longest_prompt
from minitron.training.steps import tracked_steps, train_plan
from minitron.training.teacher_cache import cached_rows, open_cache
from minitron.walk.stage import StageContext
from minitron.walk.tracking import Tracker, open_candidate


def screen_candidate(context: StageContext) -> dict:
    """The candidate's held-out loss after its short distillation and its decode speed here; metrics.jsonl is beside them."""
    settings, device = context.settings, pick_device(context.settings)
    entry = candidate_entry(context)
    student = _cut(context, entry, device)
    with open_candidate(settings, entry) as tracker:
        tokens = _distil(context, student, device, tracker)
        if tokens is None:
            note = "its short distillation diverged"
            tracker.summarise({**entry, "note": note})
            return {"headline": f"{entry['id']}  {note}; never chosen", "id": entry["id"], "short_distill_loss": None, "tokens_per_second": None, "note": note}
        batches = screening_batches(context, device)
        loss = held_out_loss(student, batches)
        prompt = longest_prompt(torch.cat(batches).cpu().numpy(), settings.screen.prompt_tokens).to(device)
        can_decode = "*" in entry["architecture"]["pattern"]  # transformers' cache asks an attention layer how long it is
        speed = decode_tokens_per_second(student, prompt, settings.screen.new_tokens) if can_decode else None
        facts = {"id": entry["id"], "short_distill_loss": loss, "short_distill_tokens": tokens, "tokens_per_second": speed}
        tracker.summarise({**entry, **facts})
    remove_states(context.folder)
    return {"headline": f"{entry['id']}  {loss:.3f} nats/token after {tokens:,} tokens", **facts}


def candidate_entry(context: StageContext) -> dict:
    """The shortlist's entry of settings.candidate. Raises ValueError where there is none."""
    entries = context.inputs["shortlist"].facts["entries"]
    if context.settings.candidate not in entries:
        raise ValueError(f"candidate is {context.settings.candidate!r}, which is not on the shortlist; there are: {', '.join(entries)}")
    return entries[context.settings.candidate]


def _cut(context: StageContext, entry: dict, device: torch.device) -> nn.Module:
    """The candidate in float32, as prune.method says."""
    settings, folder = context.settings, context.base_folder
    config = read_config(folder)
    family = family_of(config)
    plan = make_plan(base_architecture(settings), Architecture(**entry["architecture"]), tuple(entry["kept_layers"]),
                     scores_of(context.inputs["score"], settings))  # fmt: skip
    if settings.prune.method is PruneMethod.compensated:
        return compensated_model(context, family, plan)
    return build_pruned(family, family.load(folder, dtype=torch.float32, device=str(device)), plan, config)


def _distil(context: StageContext, student: nn.Module, device: torch.device, tracker: Tracker) -> int | None:
    """Trains the student in place; returns the tokens it saw, None where the loss stopped being a number."""
    settings = context.settings
    plan, rows = train_plan(settings.screen.train), cached_rows(context, settings.screen.train.tokens)
    if settings.screen.cached:
        loss = cached_loss(open_cache(context.inputs["teacher_cache"], rows), rows)
        batches = RowNumbers(rows, settings.screen.train.batch, settings.seed)
    else:
        folder = context.inputs["teacher"].model_folder
        loss = distillation_loss(family_of(read_config(folder)).load(folder, device=str(device)))
        batches = RowBatches(rows, settings.screen.train.batch, settings.seed)

    def tokens_of(batch: torch.Tensor) -> int:
        return count_tokens(rows[batch.cpu()] if settings.screen.cached else batch.cpu().numpy())

    with tracked_steps(context, settings.candidate, plan.tokens, loss_name="KL", tracker=tracker) as on_step:
        try:
            return train_phases(student, [Phase(batches, plan)], loss, folder=context.folder, on_step=on_step, tokens_of=tokens_of).tokens
        except FloatingPointError as error:
            context.console.say(f"   screen  {settings.candidate}: {error}")
            return None
