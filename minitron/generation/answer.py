"""Text from a finished checkpoint, printed as it comes or given back; it runs no other stage and keeps nothing."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
from minitron.settings.run import GenerateSettings, Settings, Thinking
from minitron.walk.console import Console
from minitron.walk.stage import Lap

STAGE_OF = {"teacher": "teacher", "pruned": "prune", "student": "distill"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a prompt. `text` is all of it, without the token that ended it; reasoning and answer are its parts, without tags.

    `tokens` counts what was generated, the ending token included, `reasoning_tokens` what of it is reasoning, tags not included, `prompt_tokens` what was
    read before. `ended`: the model came to its end by itself; False where the limit of new tokens cut it off.
    """

    text: str
    reasoning: str
    answer: str
    tokens: int
    reasoning_tokens: int
    prompt_tokens: int
    ended: bool
    seconds: float


def print_answer(settings: Settings, laps: Sequence[Lap], console: Console) -> None:
    """Prints what `settings.checkpoint` goes on with after `settings.prompt`."""
    thinking = None if settings.thinking is None else settings.thinking is Thinking.on
    made = answer(checkpoint_folder(settings, laps), settings.prompt, settings.generate, thinking=thinking, thinking_budget=settings.thinking_budget,
                  device=pick_device(settings), prints=True)  # fmt: skip
    ended = "ended" if made.ended else "cut off by generate.new_tokens"
    speed = f"{made.tokens / made.seconds:,.0f} tokens/s, reading the prompt's {made.prompt_tokens:,} included"
    console.headline("generate", f"{made.tokens:,} tokens, {made.reasoning_tokens:,} of them reasoning, {ended}; {speed}")


def answer(folder: Path, prompt: str | Sequence[Mapping[str, Any]], wanted: GenerateSettings, *, thinking: bool | None = None,
           thinking_budget: int | None = None, device: torch.device, prints: bool = False) -> Answer:  # fmt: skip
    """What the checkpoint in a folder goes on with after a user's message or a conversation, printed as it comes if `prints`.

    Raises ValueError for weights that are missing or cut short, and as make_prompt and generate do.
    """
    tokenizer = load_tokenizer(folder)
    tags = Tags(*wanted.thinking_tags)
    written = make_prompt(tokenizer, prompt, thinking, tags)
    text = begun(tokenizer, written.text)
    Checkpoint(folder)  # raises ValueError for weights that are missing or cut short
    model = family_of(read_config(folder)).load(folder, device=str(device))
    started = time.monotonic()
    (ids,) = generate(model, tokenizer, [text], new_tokens=wanted.new_tokens, thinking_budget=thinking_budget, tags=tags, opened=[written.is_open],
                      temperature=wanted.temperature, top_p=wanted.top_p, streamer=TextStreamer(tokenizer, skip_prompt=True) if prints else None)  # fmt: skip
    seconds = time.monotonic() - started
    before, (open_ids, close_ids) = tokenizer(text, add_special_tokens=False)["input_ids"], tags.ids(tokenizer)
    ended = ids[-1] in end_ids(model, tokenizer)
    made = tokenizer.decode(ids[:-1] if ended else ids)
    return Answer(made, *_parts(made, tags, is_open=written.is_open), tokens=len(ids), prompt_tokens=len(before), ended=ended, seconds=seconds,
                  reasoning_tokens=count_reasoning([*open_ids, *ids] if written.is_open else ids, open_ids, close_ids))  # fmt: skip


def _parts(text: str, tags: Tags, *, is_open: bool) -> tuple[str, str]:
    """Reasoning and answer of a text whose prompt leaves reasoning open, or which may open it itself."""
    before, opened, after = ("", tags.opening, text) if is_open else text.partition(tags.opening)
    if not opened:
        return "", text
    reasoning, _, rest = after.partition(tags.closing)
    return reasoning, before + rest


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
