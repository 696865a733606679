"""Documents as rows of tokens, with the teacher's tokenizer or one trained on them.

Everything keeps the order of the source, and the split goes by the documents' names: there is no seed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from distill.batches import count_tokens
from minitron.families.text import beginning, load_tokenizer
from minitron.generation.conversations import ConversationWriter
from minitron.settings.run import DataSettings
from minitron.settings.teachers import is_trained, teacher_architecture
from minitron.text import arithmetic
from minitron.text import embedded as text
from minitron.text.documents import read_documents, source_title
from minitron.text.key_values import check_hiding, hide_lines, vocabulary_of
from minitron.text.rows import SplitRows
from minitron.walk.stage import StageContext
from minitron.walk.store import write_json

DOCUMENTS_AT_ONCE = 32


def make_rows(context: StageContext) -> dict:
    """Writes train.npy, heldout.npy, int32 [rows, T] with -1 as padding, heldout_sources.json (SplitRows.sources), and for a trained teacher tokenizer/."""
    settings, data = context.settings, context.settings.data
    folder, total = tokenizer_folder(context), data.max_documents
    if data.dataset:
        context.console.say(f"     data  reading {source_title(data)} from the Hub")
    if is_trained(settings):
        total = _train_tokenizer(data, folder)
    tokenizer = load_tokenizer(folder)
    vocabulary = teacher_architecture(settings).vocab
    if len(tokenizer) > vocabulary:
        raise ValueError(f"tokenizer of {folder} has {len(tokenizer)} tokens; the teacher's vocabulary holds {vocabulary}")
    train, held_out = (SplitRows(name, data, beginning(tokenizer)) for name in ("train", "heldout"))
    with context.console.track("tokenising", total, "documents") as advance:
        left_out = tokenise(data, tokenizer, train, held_out, advance)
    _check_split(train, held_out, left_out.documents, source_title(data))
    facts = {"vocab": vocabulary, "source": source_title(data), "empty_documents": left_out.documents, **left_out.facts}
    for split in (train, held_out):
        rows = split.rows()
        np.save(context.folder / f"{split.name}.npy", rows)
        facts |= {f"{split.name}_tokens": count_tokens(rows), f"{split.name}_rows": len(rows), f"{split.name}_documents": split.num_documents}
    write_json(context.folder / "heldout_sources.json", held_out.sources(facts["heldout_rows"]))
    source = f" from {facts['source']}" if data.files or data.dataset else ""
    counts = f"{facts['train_tokens']:,} train and {facts['heldout_tokens']:,} held-out tokens{source}"
    return {"headline": f"{counts} in rows of {data.sequence_length}, vocabulary {vocabulary:,}{left_out}", **facts}


def tokenizer_folder(context: StageContext) -> Path:
    """Where the teacher's tokenizer is: in its checkpoint, or, for a teacher that is trained on the data, where stage data leaves it."""
    if not is_trained(context.settings):
        return context.inputs["teacher"].model_folder
    return (context.inputs["data"].folder if "data" in context.inputs else context.folder) / "tokenizer"


def _train_tokenizer(data: DataSettings, folder: Path) -> int:
    """The tokenizer of the train documents, written to `folder`; returns how many documents the source has, held-out ones included."""
    total = 0

    def train_texts() -> Iterator[str]:
        nonlocal total
        for document in read_documents(data, ConversationWriter(text.chat_tokenizer())):
            total += 1
            if not document.is_held_out:
                yield document.text

    template = arithmetic.CHAT_TEMPLATE if data.arithmetic.problems else text.CHAT_TEMPLATE
    text.train_tokenizer(train_texts(), data.vocab, folder, chat_template=template)
    return total


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What of a source is in no row: documents without text; of others the reasoning, which the chat template leaves out and could not be put back."""

    documents: int
    reasoning_of: int

    @property
    def facts(self) -> dict[str, int]:
        return {"documents_without_reasoning": self.reasoning_of} if self.reasoning_of else {}

    def __str__(self) -> str:
        empty = f"; left out for want of text: {self.documents:,}" if self.documents else ""
        return empty + (f"; documents that lost their reasoning to the chat template: {self.reasoning_of:,}" if self.reasoning_of else "")


def tokenise(data: DataSettings, tokenizer, train: SplitRows, held_out: SplitRows, advance) -> LeftOut:
    """Every document, with an end-of-text id after it, to its split, until both are full."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    hide = _hiding(data, tokenizer)
    write_chat, start = ConversationWriter(tokenizer), tokenizer.decode(beginning(tokenizer))  # rows begin with it whatever a template writes
    documents, num_empty = read_documents(data, lambda messages: write_chat(messages).removeprefix(start)), 0
    while not (train.is_full and held_out.is_full) and (part := list(islice(documents, DOCUMENTS_AT_ONCE))):
        written = [document for document in part if document.text.strip()]
        num_empty += len(part) - len(written)
        if written:
            encoded = tokenizer([document.text for document in written], add_special_tokens=False, verbose=False)["input_ids"]
            for (is_held_out, source), some in groupby(zip(written, encoded, strict=True), key=lambda pair: (pair[0].is_held_out, pair[0].source)):
                if is_held_out:
                    held_out.add([_ended(ids, end) for _, ids in some], source)
                else:
                    train.add([_ended(hide(ids, document.name), end) for document, ids in some], source)
        advance(len(part))
    return LeftOut(num_empty, write_chat.without_reasoning)


def _ended(ids: list[int], end: list[int]) -> list[int]:
    """Ids with the end of text after them, which a chat template may have written already."""
    return ids if end and ids[-1:] == end else ids + end


def _hiding(data: DataSettings, tokenizer) -> Callable[[list[int], str], list[int]]:
    """Of a train document's ids and name: with key-value lines where the settings want them."""
    if not data.key_value_share:
        return lambda ids, _name: ids
    vocabulary = vocabulary_of(tokenizer)
    check_hiding(vocabulary, stretch=data.sequence_length)
    return partial(hide_lines, vocabulary=vocabulary, share=data.key_value_share, stretch=data.sequence_length)


def _check_split(train: SplitRows, held_out: SplitRows, num_empty: int, source: str) -> None:
    """Raises ValueError where a split got no document."""
    number = train.num_documents + held_out.num_documents
    if number == 0:
        raise ValueError(f"data: {source} has no document with text ({num_empty:,} without); at least one for training and one held out are needed")
    for split, what in ((train, "for training: all are held out"), (held_out, "to hold out")):
        if split.num_documents == 0:
            raise ValueError(
                f"data: {source} has {number:,} document{'s' if number > 1 else ''} ({train.num_tokens + held_out.num_tokens:,} tokens) and none "
                f"{what}; about 1 in {text.HELD_OUT_SHARE} is held out, by a hash of its name: {5 * text.HELD_OUT_SHARE} documents are nearly always enough"
            )
