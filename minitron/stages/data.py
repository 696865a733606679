"""data: the embedded text as rows of tokens, with the teacher's tokenizer or one trained on it."""

import numpy as np

from minitron import text
from minitron.pipeline import StageContext
from minitron.teachers import teacher_architecture, teacher_folder


def run(context: StageContext) -> dict:
    """Writes train.npy and heldout.npy, int32 [rows, T], and for the tiny teacher tokenizer/."""
    from transformers import AutoTokenizer

    settings = context.settings
    documents = list(text.embedded_documents())
    own = settings.teacher.path is None
    folder = context.folder / "tokenizer" if own else teacher_folder(settings)
    if own:
        text.train_tokenizer((document.text for document in documents if not document.is_held_out), settings.data.vocab, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = teacher_architecture(settings).vocab
    if len(tokenizer) > vocabulary:
        raise ValueError(f"tokenizer of {folder} has {len(tokenizer)} tokens; the teacher's vocabulary holds {vocabulary}")
    counts = {}
    with context.console.track("tokenising", len(documents), "documents") as advance:
        for split, held_out, limit in (("train", False, settings.data.max_train_tokens), ("heldout", True, settings.data.max_heldout_tokens)):
            chosen = [document.text for document in documents if document.is_held_out == held_out]
            rows = text.windows(_encode(tokenizer, chosen, advance), settings.data.sequence_length)
            if limit is not None:
                rows = rows[: limit // settings.data.sequence_length]
            if len(rows) == 0:
                raise ValueError(
                    f"data.sequence_length is {settings.data.sequence_length}; no {split} document (or data.max_{split}_tokens) has that many tokens"
                )
            np.save(context.folder / f"{split}.npy", rows)
            counts[split] = int(rows.size)
    headline = f"{counts['train']:,} train and {counts['heldout']:,} held-out tokens in rows of {settings.data.sequence_length}, vocabulary {vocabulary:,}"
    return {"headline": headline, "train_tokens": counts["train"], "heldout_tokens": counts["heldout"], "vocab": vocabulary}


def _encode(tokenizer, texts: list[str], advance) -> list[list[int]]:
    """Ids of every document, with an end-of-text id after it."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = []
    for start in range(0, len(texts), 32):
        part = texts[start : start + 32]
        encoded += [ids + end for ids in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]]
        advance(len(part))
    return encoded
