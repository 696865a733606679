"""Whether a model's text begins with a token of its own, by its tokenizer: models of Llama's kind give that token a meaning that nothing else has.

A row of calibration, training or evaluation without it would be of a kind that the model has never seen.
"""

from transformers import PreTrainedTokenizerBase


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a text begins with, one or none."""
    start = tokenizer("")["input_ids"][:1]
    return start if start and start == [tokenizer.bos_token_id] and start != [tokenizer.eos_token_id] else []


def begun(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text with what it must begin with; a chat template may have written that already."""
    start = tokenizer.decode(beginning(tokenizer)) if beginning(tokenizer) else ""
    return text if text.startswith(start) else start + text
