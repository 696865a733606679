"""What a model writes after a prompt, the likeliest token each time: for a person to read beside the figures."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from minitron.generation.ends import end_ids, without_end
from minitron.generation.generate import generate
from minitron.generation.tokenizers import begun
from minitron.settings.evaluate import EvaluateSettings


def check_prompts(tokenizer: PreTrainedTokenizerBase, wanted: EvaluateSettings, positions: int) -> None:
    """Raises ValueError where a prompt and what is to follow are longer than the model's positions, in tokens."""
    for number, prompt in enumerate(wanted.prompts):
        length = len(tokenizer(begun(tokenizer, prompt), add_special_tokens=False)["input_ids"])
        if length + wanted.new_tokens > positions:
            raise ValueError(f"evaluate.prompts[{number}] has {length:,} tokens and evaluate.new_tokens is {wanted.new_tokens:,}; together they must be "
                             f"at most {positions:,}, the teacher's max_position_embeddings")  # fmt: skip


def continuations(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, new_tokens: int) -> list[dict[str, Any]]:
    """Every prompt with the text that follows it, special tokens left out, and whether that ended by itself. One prompt at a time: none is padded."""
    ends = end_ids(model, tokenizer)
    written = [generate(model, tokenizer, [begun(tokenizer, prompt)], new_tokens=new_tokens)[0] for prompt in prompts]
    return [{"prompt": prompt, "text": tokenizer.decode(without_end(ids, ends), skip_special_tokens=True), "ended": ids[-1] in ends}
            for prompt, ids in zip(prompts, written, strict=True)]  # fmt: skip
