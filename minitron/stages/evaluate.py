"""evaluate: teacher, pruned and student on the same held-out rows."""

import json
from dataclasses import asdict

import numpy as np

from distill.batches import count_tokens
from memory_budget.hf_config import architecture_from_config, read_config
from minitron.evaluation import batches_of, decode_tokens_per_second, evaluate, evaluation_rows, longest_prompt, spread_rows
from minitron.families import family_of
from minitron.pipeline import StageContext
from minitron.runtime import pick_device
from minitron.stages.models import result_model_folder
from minitron.store import write_json

SMALLEST_LOSS_NATS = 0.01
MODELS = {"teacher": "teacher", "pruned": "prune", "student": "distill"}


def run(context: StageContext) -> dict:
    """Writes <model>.json per model, each kept if the stage is interrupted."""
    settings = context.settings
    device = str(pick_device(settings))
    folders = {name: result_model_folder(context.inputs[stage]) for name, stage in MODELS.items()}
    family = family_of(read_config(folders["teacher"]))
    teacher = family.load(folders["teacher"], device=device)
    held_out = np.load(context.inputs["data"].folder / "heldout.npy", mmap_mode="r")
    rows = spread_rows(evaluation_rows(held_out), settings.evaluate.samples)
    batches = batches_of(rows, settings.evaluate.batch, device)
    prompt = longest_prompt(rows, settings.evaluate.prompt_tokens).to(device)
    tokens = count_tokens(rows)
    measured = {}
    with context.console.track("evaluating", len(MODELS) * tokens, "tokens") as advance:
        for name, folder in folders.items():
            path = context.folder / f"{name}.json"
            if path.exists():
                measured[name] = json.loads(path.read_text())
                advance(tokens)
                continue
            model = teacher if name == "teacher" else family.load(folder, device=device)
            facts = asdict(evaluate(model, teacher, batches, advance))
            # transformers' cache asks an attention layer how long it is, so a model without one cannot decode there.
            can_decode = "*" in architecture_from_config(read_config(folder)).pattern
            facts["decode_tokens_per_second"] = decode_tokens_per_second(model, prompt, settings.evaluate.new_tokens) if can_decode else None
            write_json(path, facts)
            measured[name] = facts
    loss = {name: facts["loss_nats_per_token"] for name, facts in measured.items()}
    lost = loss["pruned"] - loss["teacher"]
    # Of a loss within the noise of these rows, a share would say nothing.
    recovered = (loss["pruned"] - loss["student"]) / lost if lost > SMALLEST_LOSS_NATS else None
    share = f", {100 * recovered:.0f} % of the loss won back" if recovered is not None else ""
    headline = f"held-out nats/token: teacher {loss['teacher']:.3f}, pruned {loss['pruned']:.3f}, student {loss['student']:.3f}{share}"
    return {"headline": headline, "models": measured, "lost_nats_per_token": lost, "recovered_share": recovered}
