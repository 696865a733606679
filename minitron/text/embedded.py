"""The embedded text: the Python standard library's sources and pydoc's topics, present wherever Python is.

Documents are split into train and held-out by a hash of their name, so that no file is ever in both and
the split does not depend on the order in which a disk lists its files.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"
THINKING_TAGS = ["<think>", "</think>"]
SPECIAL_TOKENS = [END_OF_TEXT, "<|pad|>", *THINKING_TAGS]
HELD_OUT_SHARE = 20  # one document in so many is held out
TOP_LEVEL = "(top level)"  # source of documents that lie in no folder
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{%- if add_generation_prompt %}assistant: "
    "{%- if enable_thinking is defined %}{{ ' <think>' if enable_thinking else ' <think></think>' }}{% else %}{{ ' ' }}{% endif %}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0

    @property
    def source(self) -> str:
        """What the document is one of: its name without the last part, so a file, a dataset or a folder of the embedded text."""
        return self.name.rpartition("/")[0] or TOP_LEVEL


@cache  # looked for several times in a run
def source_files() -> list[tuple[str, Path]]:
    """(name, path) of every standard library source file outside the test folders, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]  # keeps the walk out of installed packages
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def embedded_documents() -> Iterator[Document]:
    """Every document of the embedded text, sorted by name: source files, then topics."""
    for name, path in source_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document(name=name, text=text)
    yield from topic_documents()


def topic_documents() -> Iterator[Document]:
    """pydoc's topics, a chapter of the language reference each, sorted by name."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(name=f"topics/{name}", text=topics[name])


def text_fingerprint() -> str:
    """Changes with the Python release: names and sizes of the source files."""
    rows = [(name, path.stat().st_size) for name, path in source_files()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


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
