"""The tiny teacher that comes with the package, minitron/tiny_teacher/: a checkpoint in bf16 and training.json, which says how it came about.

benchmarks/make_tiny_teacher.py makes it. docs/tiny_teacher.md
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.files import DTYPES, Checkpoint, PlannedTensor
from minitron.checkpoints.publish import model_card, write_planned
from minitron.families.known import family_of
from minitron.settings.teachers import STORED_FOLDER, TRAINING_FILE, stored_digest


def unpack_tiny_teacher(folder: Path) -> dict:
    """Writes folder/checkpoint in float32, which every processor is quick with; gives the stage's facts. Raises ValueError for other files than were packed."""
    training = json.loads((STORED_FOLDER / TRAINING_FILE).read_text())
    if training["digest"] != stored_digest():
        raise ValueError(f"{STORED_FOLDER} holds other files than its {TRAINING_FILE} says (digest {stored_digest()}, not {training['digest']}); "
                         "install minitron again, or set teacher.train_anew=true")  # fmt: skip
    convert_checkpoint(STORED_FOLDER, folder / "checkpoint", dtype="F32", lines=card_lines(training["tokens"]))
    architecture, loss = architecture_from_config(read_config(STORED_FOLDER)), training["held_out"]["loss_nats_per_token"]
    facts = {"parameters": count_total_parameters(architecture), "train_tokens": training["tokens"], "held_out_loss": loss, "digest": training["digest"]}
    what = f"tiny NemotronH that comes with the package, {facts['parameters']:,} parameters, {architecture.num_layers} layers"
    return {"headline": f"{what}, {loss:.2f} nats/token held out", "path": "checkpoint", "name": "tiny teacher", **facts}


def card_lines(tokens: int) -> list[str]:
    """What its card says of its making."""
    return [f"Trained on {tokens:,} tokens of the Python standard library's sources; docs/tiny_teacher.md of minitron says how."]


def convert_checkpoint(source: Path, folder: Path, *, dtype: str, lines: list[str]) -> None:
    """A tiny teacher's checkpoint in another precision (a safetensors code, as BF16), in one file, read back."""
    checkpoint, config, torch_dtype = Checkpoint(source), read_config(source), DTYPES[dtype]

    def pieces(name: str) -> Iterator[torch.Tensor]:
        yield checkpoint.read(name).to(torch_dtype)

    planned = [PlannedTensor(name, dtype, entry.shape, lambda name=name: pieces(name)) for name, entry in checkpoint.entries.items()]
    config = config | {name: str(torch_dtype).removeprefix("torch.") for name in ("dtype", "torch_dtype") if name in config}
    card = model_card("Tiny NemotronH teacher", lines=lines, architecture=architecture_from_config(config), base=None)
    write_planned(folder, family_of(config), planned, config=config, companions=source, card=card, max_shard_bytes=2**32)
