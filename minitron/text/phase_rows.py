"""The rows of distillation's phases that are of another length or from other sources than the data stage's."""

import numpy as np

from minitron.settings.data import DataSettings
from minitron.settings.teachers import teacher_architecture
from minitron.sources.source import source_title
from minitron.text.blends import rows_to_make
from minitron.text.encoding import Encoding
from minitron.text.passes import Split, forget_passes, run_passes
from minitron.text.tokenise import HASHES_FILE, check_vocabulary, place_of, said_of, tokenizer_folder
from minitron.walk.stage import StageContext


def make_phase_rows(context: StageContext) -> dict:
    """Writes <name>.npy for every name of rows_to_make, int32 [rows, T] with -1 as padding. Documents that are held out, or equal one that the data stage
    holds out, are left out."""
    facts = {name: _made(context, name, data) for name, data in rows_to_make(context.settings).items()}
    forget_passes(context.folder)
    return {"headline": "; ".join(map(_described, facts.values())), "rows": facts}


def _made(context: StageContext, name: str, data: DataSettings) -> dict:
    encoding = Encoding(tokenizer_folder(context), data, teacher_architecture(context.settings).vocab, context.inputs["data"].folder / HASHES_FILE)
    check_vocabulary(encoding)
    split = run_passes(place_of(context, f"{name}.source"), data, encoding, {"train": name})["train"]
    if said := said_of({"train": split}):
        context.console.say(f"{source_title(data)}{said}")
    return _facts(data, split)


def _facts(data: DataSettings, split: Split) -> dict:
    rows, tokens = split.num_rows, split.counts.kept_tokens
    return {"source": source_title(data), "sequence_length": data.sequence_length, "rows": rows, "tokens": tokens,
            "filled_share": round(tokens / np.prod([rows, data.sequence_length]), 4), "documents": split.counts.documents,
            "left_out": split.tally.left_out, "refused": split.tally.refused}  # fmt: skip


def _described(fact: dict) -> str:
    return f"{fact['tokens']:,} tokens of {fact['source']} in rows of {fact['sequence_length']:,}, {fact['filled_share']:.0%} full"
