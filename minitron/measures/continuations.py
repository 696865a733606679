"""What a model writes after a prompt, the likeliest token each time: for a person to read beside the figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from distill.batches import PADDING, plain_ids
from minitron.generation.ends import end_ids, without_end
from minitron.generation.generate import generate
from minitron.generation.tokenizers import begun
from minitron.settings.evaluate import EvaluateSettings
from minitron.text.samples import spread_rows

BEGINNING_TOKENS = 24


def check_prompts(tokenizer: PreTrainedTokenizerBase, wanted: EvaluateSettings, positions: int) -> None:
    """Raises ValueError where a prompt and what is to follow are longer than the model's positions, in tokens."""
    if wanted.held_out_prompts and BEGINNING_TOKENS + wanted.new_tokens > positions:
        raise ValueError(f"evaluate.new_tokens is {wanted.new_tokens:,}; with the {BEGINNING_TOKENS} of evaluate.held_out_prompts they must be at most "
                         f"{positions:,}, the teacher's max_position_embeddings")  # fmt: skip
    for number, prompt in enumerate(wanted.prompts):
        length = len(tokenizer(begun(tokenizer, prompt), add_special_tokens=False)["input_ids"])
        if length + wanted.new_tokens > positions:
            raise ValueError(f"evaluate.prompts[{number}] has {length:,} tokens and evaluate.new_tokens is {wanted.new_tokens:,}; together they must be "
                             f"at most {positions:,}, the teacher's max_position_embeddings")  # fmt: skip


def row_beginnings(tokenizer: PreTrainedTokenizerBase, rows_RT: np.ndarray, number: int) -> list[str]:
    """The first tokens of some rows as text, rows from all over; a row that begins with blanks alone, or like an earlier one, has none."""
    ids = [row_T[row_T != PADDING][:BEGINNING_TOKENS] for row_T in plain_ids(spread_rows(rows_RT, number))] if number else []
    texts = [tokenizer.decode(ids_T.tolist(), skip_special_tokens=True) for ids_T in ids]
    return list(dict.fromkeys(text for text in texts if text.strip()))


def continuations(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, new_tokens: int) -> list[dict[str, Any]]:
    """Every prompt with the text that follows it, special tokens left out, and whether that ended by itself. One prompt at a time: none is padded."""
    ends = end_ids(model, tokenizer)
    written = [generate(model, tokenizer, [begun(tokenizer, prompt)], new_tokens=new_tokens)[0] for prompt in prompts]
    return [{"prompt": prompt, "text": tokenizer.decode(without_end(ids, ends), skip_special_tokens=True), "ended": ids[-1] in ends}
            for prompt, ids in zip(prompts, written, strict=True)]  # fmt: skip
