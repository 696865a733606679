"""A tokenizer of one's own text: what a teacher that is trained here reads with."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"
THINKING_TAGS = ["<think>", "</think>"]
SPECIAL_TOKENS = [END_OF_TEXT, "<|pad|>", *THINKING_TAGS]
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{%- if add_generation_prompt %}assistant: "
    "{%- if enable_thinking is defined %}{{ ' <think>' if enable_thinking else ' <think></think>' }}{% else %}{{ ' ' }}{% endif %}{% endif %}"
)


def chat_tokenizer() -> Any:
    """A tokenizer that knows no word but has the chat template of train_tokenizer, to write conversations out before there is one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=CHAT_TEMPLATE)


def train_tokenizer(texts: Iterator[str], vocab: int, folder: Path, *, chat_template: str = CHAT_TEMPLATE) -> None:
    """Train a byte-level BPE of `vocab` tokens and write the files a Hugging Face tokenizer folder has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Tokens like any other from here on: servers leave special ones out of their text, and a client must see where reasoning ends.
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in THINKING_TAGS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written by hand: transformers 5 would name a class that older versions and other runtimes do not have.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "bos_token": END_OF_TEXT,
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {name: config[name] for name in ("eos_token", "bos_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(chat_template)
