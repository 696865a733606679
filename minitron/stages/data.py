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
            rows = _rows(tokenizer, chosen, settings.data.sequence_length, limit, advance)
            if len(rows) == 0:
                raise ValueError(
                    f"data.sequence_length is {settings.data.sequence_length}; no {split} document (or data.max_{split}_tokens) has that many tokens"
                )
            np.save(context.folder / f"{split}.npy", rows)
            counts[split] = int(rows.size)
    headline = f"{counts['train']:,} train and {counts['heldout']:,} held-out tokens in rows of {settings.data.sequence_length}, vocabulary {vocabulary:,}"
    return {"headline": headline, "train_tokens": counts["train"], "heldout_tokens": counts["heldout"], "vocab": vocabulary}


def _rows(tokenizer, texts: list[str], sequence_length: int, limit: int | None, advance) -> np.ndarray:
    """Rows of the documents in their order, each document ended by an end-of-text id; at most `limit` tokens, and no document beyond is read."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    most = None if limit is None else limit // sequence_length
    parts, number = [text.windows([], sequence_length)], 0
    for start in range(0, len(texts), 32):
        part = texts[start : start + 32]
        if most is None or number < most:
            ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            parts.append(text.windows([document + end for document in ids], sequence_length))
            number += len(parts[-1])
        advance(len(part))
    return np.concatenate(parts)[:most]
