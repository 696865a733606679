"""Text generated from prompts with a thinking budget. B prompts, T tokens."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from minitron.generation.prompts import Tags
from minitron.generation.thinking import ThinkingBudget


@torch.inference_mode()
def generate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, new_tokens: int, thinking_budget: int | None = None,
             tags: Tags = Tags(), temperature: float = 0.0, top_p: float = 1.0, streamer: BaseStreamer | None = None) -> list[list[int]]:  # noqa: B008 # fmt: skip
    """The new tokens of every prompt, an end-of-text token included where one came; greedy at temperature 0.

    Raises ValueError for a budget below 0, and where prompt and new tokens are more than the model's positions.
    """
    tokenizer.padding_side = "left"
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = tokenizer(list(prompts), add_special_tokens=False, padding=len(prompts) > 1, return_tensors="pt").to(next(model.parameters()).device)
    length, positions = batch["input_ids"].shape[1], model.config.max_position_embeddings
    if length + new_tokens > positions:
        raise ValueError(f"the prompt has {length:,} tokens and generate.new_tokens is {new_tokens:,}; together they must be at most {positions:,}")
    processors = LogitsProcessorList()
    if thinking_budget is not None:
        processors.append(ThinkingBudget(thinking_budget, *tags.ids(tokenizer), prompt_tokens=length))
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False, "temperature": None, "top_p": None}
    made = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=new_tokens, pad_token_id=pad, streamer=streamer,
                          eos_token_id=tokenizer.eos_token_id, logits_processor=processors, **sampling)  # fmt: skip
    return [_until_end(row[length:].tolist(), tokenizer.eos_token_id) for row in made]


def _until_end(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
