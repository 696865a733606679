"""The data card: what went into the rows and what did not, as plain values for the report."""

from pathlib import Path

import numpy as np

from distill.batches import counted_positions, plain_ids
from minitron.families.text import load_tokenizer
from minitron.text.encoding import Encoding
from minitron.text.passes import Split

EXAMPLES, EXAMPLE_TOKENS = 3, 320  # rows that are shown, and how much of each
MOST_SOURCES = 12  # the rest of them are one


def data_card(folder: Path, encoding: Encoding, splits: dict[str, Split]) -> dict:
    """Of train.npy in `folder` and what the passes counted: documents, lengths (how many have up to so many tokens, powers of two), sources, what was left
    out and why, and rows as text in parts (text, whether it counts for the loss)."""
    return {
        "splits": {name: _counts(split) for name, split in splits.items()},
        "refused": [one for split in splits.values() for one in split.tally.refused],
        "forms": sorted({(file, words) for split in splits.values() for words, file in split.tally.forms.items()}),
        "answers_only": encoding.data.answers_only,
        "examples": _examples(folder / "train.npy", encoding),
    }  # fmt: skip


def _counts(split: Split) -> dict:
    counts = split.counts
    lengths = {2 ** int(power): number for power, number in sorted(counts.lengths.items(), key=lambda item: int(item[0]))}
    return {"documents": counts.documents, "tokens": counts.tokens, "longest_tokens": counts.longest, "rows": split.num_rows, "row_tokens": counts.kept_tokens,
            "lengths": lengths, "sources": _sources(counts.by_source), "left_out": split.tally.left_out}  # fmt: skip


def _sources(by_source: dict[str, list[int]]) -> list[dict]:
    """Most tokens first."""
    largest = sorted(by_source.items(), key=lambda item: (-item[1][1], item[0]))
    kept, rest = largest[:MOST_SOURCES], largest[MOST_SOURCES:]
    found = [{"source": name, "documents": documents, "tokens": tokens} for name, (documents, tokens) in kept]
    if rest:
        found.append({"source": f"{len(rest):,} others", "documents": sum(one[0] for _, one in rest), "tokens": sum(one[1] for _, one in rest)})
    return found


def _examples(path: Path, encoding: Encoding) -> list[dict]:
    """Rows from the beginning, the middle and the end."""
    rows, tokenizer = np.load(path, mmap_mode="r"), load_tokenizer(encoding.tokenizer)
    places = sorted({0, len(rows) // 2, len(rows) - 1})[:EXAMPLES]
    return [{"row": place, "parts": _parts(np.array(rows[place, :EXAMPLE_TOKENS]), tokenizer)} for place in places]


def _parts(row: np.ndarray, tokenizer) -> list[list]:
    """A row's text in parts: (text, whether it is learned). A token is learned where the one before it counts."""
    ids = plain_ids(row[row != -1])
    counted = counted_positions(row[row != -1])
    learned = np.append(False, counted[:-1])
    edges = [0, *(np.flatnonzero(np.diff(learned[1:].astype(int))) + 2).tolist(), len(ids)]
    return [[tokenizer.decode(ids[start:end].tolist()), bool(learned[min(max(start, 1), len(ids) - 1)])] for start, end in zip(edges, edges[1:], strict=False)
            if end > start]  # fmt: skip
