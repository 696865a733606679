"""Text generated from prompts with a thinking budget. B prompts, T tokens."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from minitron.generation.ends import end_ids, until_end
from minitron.generation.prompts import Tags
from minitron.generation.thinking import ThinkingBudget


@torch.inference_mode()
def generate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, new_tokens: int, thinking_budget: int | None = None,
             tags: Tags = Tags(), opened: Sequence[bool] | None = None, temperature: float = 0.0, top_p: float = 1.0,  # noqa: B008
             streamer: BaseStreamer | None = None) -> list[list[int]]:  # fmt: skip
    """The new tokens of every prompt up to the first of end_ids(model, tokenizer), that one included where one came; greedy at temperature 0.

    `opened` says of each prompt whether reasoning is open at its end, where its tags do not: a user may have written of them.
    Raises ValueError for a budget below 0, and where prompt and new tokens are more than the model's positions, where it has a number of them.
    """
    tokenizer.padding_side = "left"
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None)
    batch = tokenizer(list(prompts), add_special_tokens=False, padding=len(prompts) > 1, return_tensors="pt").to(next(model.parameters()).device)
    length, positions = batch["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length + new_tokens > positions:
        raise ValueError(f"the prompt has {length:,} tokens and generate.new_tokens is {new_tokens:,}; together they must be at most {positions:,}")
    processors = LogitsProcessorList()
    if thinking_budget is not None:
        processors.append(ThinkingBudget(thinking_budget, *tags.ids(tokenizer), prompt_tokens=length, opened=opened))
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False, "temperature": None, "top_p": None}
    made = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=new_tokens, pad_token_id=pad, streamer=streamer,
                          eos_token_id=ends or None, logits_processor=processors, **sampling)  # fmt: skip
    return [until_end(row[length:].tolist(), ends) for row in made]
