"""A model's tokenizer, and whether its text begins with a token of its own: models of Llama's kind give that token a meaning that nothing else has.

A row of calibration, training or evaluation without it would be of a kind that the model has never seen.
"""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minitron.machine.panics import panics_caught

LARGEST_FILE = 2**28  # bytes; of 256,000 tokens and their merges it is 35 MB


def load_tokenizer(place: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub id. Code beside it is neither run nor asked about: tokenizer.json is taken in its stead.

    Raises ValueError where there is none that can be loaded, and for a file of one that is larger than any tokenizer's.
    """
    for path in Path(place).glob("*token*.json") if Path(place).is_dir() else ():
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"tokenizer is {str(place)!r}, whose {path.name} has {path.stat().st_size:,} bytes; at most {LARGEST_FILE:,} are read")
    try:
        with panics_caught():
            try:
                return _tried(AutoTokenizer.from_pretrained(place, trust_remote_code=False))
            except ValueError as error:
                if "trust_remote_code" not in str(error):
                    raise
            if (Path(place) / "tokenizer.json").is_file():
                return _tried(PreTrainedTokenizerFast.from_pretrained(place))
    except Exception as error:  # the tokenizers library raises a bare one
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ValueError(f"tokenizer is {str(place)!r}, which cannot be loaded: {said}") from None
    raise ValueError(f"the tokenizer of {place} is made by code of its own (auto_map in tokenizer_config.json), which is not run; a tokenizer.json is needed")


def _tried(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, once it has written and read a text: some are loaded whose parts do not fit together. Raises what it does otherwise."""
    tokenizer.decode(tokenizer("a text, or 2")["input_ids"])
    return tokenizer


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a text begins with, one or none."""
    start = tokenizer("")["input_ids"][:1]
    return start if start and start == [tokenizer.bos_token_id] and start != [tokenizer.eos_token_id] else []


def begun(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text with what it must begin with; a chat template may have written that already."""
    start = tokenizer.decode(beginning(tokenizer)) if beginning(tokenizer) else ""
    return text if text.startswith(start) else start + text
