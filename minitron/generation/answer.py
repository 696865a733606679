"""Text from a finished checkpoint, printed as it comes; it runs no other stage and keeps nothing."""

import time
from collections.abc import Sequence
from pathlib import Path

from transformers import TextStreamer

from memory_budget.hf_config import read_config
from minitron.checkpoints.files import Checkpoint
from minitron.families.known import family_of
from minitron.generation.ends import end_ids
from minitron.generation.generate import generate
from minitron.generation.prompts import Tags, make_prompt
from minitron.generation.thinking import count_reasoning
from minitron.generation.tokenizers import begun, load_tokenizer
from minitron.machine.device import pick_device
from minitron.settings.run import Settings, Thinking
from minitron.walk.console import Console
from minitron.walk.stage import Lap

STAGE_OF = {"teacher": "teacher", "pruned": "prune", "student": "distill"}


def print_answer(settings: Settings, laps: Sequence[Lap], console: Console) -> None:
    """Prints what `settings.checkpoint` goes on with after `settings.prompt`."""
    wanted, folder = settings.generate, checkpoint_folder(settings, laps)
    tokenizer = load_tokenizer(folder)
    tags = Tags(*wanted.thinking_tags)
    prompt = make_prompt(tokenizer, settings.prompt, None if settings.thinking is None else settings.thinking is Thinking.on, tags)
    text = begun(tokenizer, prompt.text)
    Checkpoint(folder)  # raises ValueError for weights that are missing or cut short
    model = family_of(read_config(folder)).load(folder, device=str(pick_device(settings)))
    started = time.monotonic()
    (ids,) = generate(model, tokenizer, [text], new_tokens=wanted.new_tokens, thinking_budget=settings.thinking_budget, tags=tags, opened=[prompt.is_open],
                      temperature=wanted.temperature, top_p=wanted.top_p, streamer=TextStreamer(tokenizer, skip_prompt=True))  # fmt: skip
    seconds = time.monotonic() - started
    before, (open_ids, close_ids) = tokenizer(text, add_special_tokens=False)["input_ids"], tags.ids(tokenizer)
    reasoning = count_reasoning([*open_ids, *ids] if prompt.is_open else ids, open_ids, close_ids)
    ended = "ended" if ids[-1] in end_ids(model, tokenizer) else "cut off by generate.new_tokens"
    speed = f"{len(ids) / seconds:,.0f} tokens/s, reading the prompt's {len(before):,} included"
    console.headline("generate", f"{len(ids):,} tokens, {reasoning:,} of them reasoning, {ended}; {speed}")


def checkpoint_folder(settings: Settings, laps: Sequence[Lap]) -> Path:
    """The folder of a finished stage's checkpoint, the last lap's, or the one given. Raises ValueError where there is none."""
    name = settings.checkpoint
    if name in STAGE_OF:
        result = laps[-1].results.get(STAGE_OF[name])
        if result is None or (name == "student" and len(laps) == 1 and settings.depth_lap.enabled):
            raise ValueError(f"checkpoint is {name!r}, which is not there yet under these settings; run stage={STAGE_OF[name]} first, or give a folder")
        return result.model_folder
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"checkpoint is {name!r}; it must be {', '.join(STAGE_OF)}, or the folder of a checkpoint")
    return Path(name)
