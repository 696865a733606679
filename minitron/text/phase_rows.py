"""The rows of distillation's phases that are of another length or from other sources than the data stage's."""

import numpy as np

from distill.batches import count_tokens
from minitron.families.text import beginning, load_tokenizer
from minitron.text.blends import rows_to_make
from minitron.text.documents import source_title
from minitron.text.rows import SplitRows
from minitron.text.tokenise import tokenise, tokenizer_folder
from minitron.walk.stage import StageContext


def make_phase_rows(context: StageContext) -> dict:
    """Writes <name>.npy for every name of rows_to_make, int32 [rows, T] with -1 as padding. Held-out documents are left out."""
    settings = context.settings
    tokenizer = load_tokenizer(tokenizer_folder(context))
    facts = {}
    if there := [name for name in rows_to_make(settings) if (context.folder / f"{name}.npy").exists()]:
        context.goes_on(f"the rows of {', '.join(there)}, which are there")
    for name, data in rows_to_make(settings).items():
        path = context.folder / f"{name}.npy"
        if not path.exists():  # else of an interrupted run
            rows = _rows(context, data, tokenizer)
            np.save(path.with_suffix(".partial.npy"), rows)
            path.with_suffix(".partial.npy").rename(path)
        rows = np.load(path, mmap_mode="r")
        facts[name] = {"source": source_title(data), "sequence_length": data.sequence_length, "rows": len(rows), "tokens": count_tokens(rows)}
        facts[name]["filled_share"] = round(facts[name]["tokens"] / rows.size, 4)
    return {"headline": "; ".join(map(_described, facts.values())), "rows": facts}


def _described(fact: dict) -> str:
    return f"{fact['tokens']:,} tokens of {fact['source']} in rows of {fact['sequence_length']:,}, {fact['filled_share']:.0%} full"


def _rows(context: StageContext, data, tokenizer) -> np.ndarray:
    train, held_out = (SplitRows(name, data, beginning(tokenizer)) for name in ("train", "heldout"))
    held_out.limit = 0  # none is wanted
    with context.console.track(f"rows of {data.sequence_length:,}", data.max_documents, "documents") as advance:
        left_out = tokenise(data, tokenizer, train, held_out, advance)
    if left_out.reasoning_of:
        context.console.say(f"{source_title(data)}{left_out}")
    return train.rows()
