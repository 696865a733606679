"""A tiny NemotronH, trained on the run's own text: the teacher where none is given."""

import numpy as np
import torch

from distill.batches import RowBatches
from distill.objectives import next_token_objective
from distill.plan import Phase
from distill.states import remove_states
from distill.trainer import HeldOut, train_phases
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.publish import check_reload, model_card, write_model
from minitron.families.nemotron_h import FAMILY as NEMOTRON_H
from minitron.machine.device import pick_device
from minitron.settings.teachers import TINY_POSITIONS, teacher_architecture
from minitron.text.samples import batches_of, screening_rows, spread_rows
from minitron.training.steps import tracked_steps, train_plan
from minitron.walk.stage import StageContext
from minitron.walk.store import write_json

HELD_OUT_ROWS = 32
END_OF_TEXT_ID, PAD_ID = 0, 1  # the first two special tokens of the tokenizer trained in data
TINY_CONFIG = {
    "model_type": "nemotron_h",
    "dtype": "float32",
    "bos_token_id": END_OF_TEXT_ID,
    "eos_token_id": END_OF_TEXT_ID,
    "pad_token_id": PAD_ID,
    "max_position_embeddings": TINY_POSITIONS,
    "chunk_size": 32,
    "layer_norm_epsilon": 1e-5,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "residual_in_fp32": False,
    "rescale_prenorm_residual": True,
    "initializer_range": 0.02,
    "use_cache": True,
}


def train_tiny_teacher(context: StageContext) -> dict:
    """Writes checkpoint/ and metrics.jsonl; read back before done."""
    settings = context.settings
    architecture = teacher_architecture(settings)
    torch.manual_seed(settings.seed)
    config = NEMOTRON_H.hf_config(TINY_CONFIG, architecture)
    model = NEMOTRON_H.build(config).to(pick_device(settings))
    rows = np.load(context.inputs["data"].folder / "train.npy", mmap_mode="r")
    plan = train_plan(settings.teacher.train)
    with tracked_steps(context, "training teacher", plan.tokens, loss_name="loss", alone=True) as on_step:
        batches = RowBatches(rows, settings.teacher.train.batch, settings.seed, num_tokens=context.inputs["data"].facts["train_tokens"])
        last = train_phases(model, [Phase(batches, plan)], next_token_objective, folder=context.folder, on_step=on_step, held_out=_held_out(context))
    folder = context.folder / "checkpoint"
    tokenizer = context.inputs["data"].folder / "tokenizer"
    card = model_card("Tiny NemotronH teacher", lines=[f"Trained on {last.tokens:,} tokens of {context.inputs['data'].facts['source']}."],
                      architecture=architecture, base=None)  # fmt: skip
    dtypes = {NEMOTRON_H.canonical_name(name): tensor.dtype for name, tensor in model.state_dict().items()}
    write_model(folder, NEMOTRON_H, model, config=config, dtypes=dtypes, companions=tokenizer, card=card, max_shard_bytes=2**32)
    write_json(folder / "generation_config.json", {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID, "pad_token_id": PAD_ID})
    check_reload(folder, NEMOTRON_H, model)
    remove_states(context.folder)
    parameters = count_total_parameters(architecture)
    size = f"{parameters:,} parameters, {architecture.num_layers} layers"
    headline = f"tiny NemotronH, {size}, trained on {last.tokens:,} tokens to {last.recent_loss:.2f} nats/token"
    facts = {"parameters": parameters, "train_tokens": last.tokens, "final_loss": last.recent_loss}
    return {"headline": headline, "path": "checkpoint", "name": "tiny teacher", **facts}


def _held_out(context: StageContext) -> HeldOut | None:
    if context.settings.teacher.held_out_every is None:
        return None
    rows = screening_rows(np.load(context.inputs["data"].folder / "heldout.npy", mmap_mode="r"))
    return HeldOut(batches=batches_of(spread_rows(rows, HELD_OUT_ROWS), 8, "cpu"), every_steps=context.settings.teacher.held_out_every)
