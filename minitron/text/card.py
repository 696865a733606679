"""The data card: what went into the rows and what did not, as plain values for the report."""

from pathlib import Path
from typing import Any

import numpy as np

from distill.batches import PADDING, count_counted, count_tokens, counted_positions, plain_ids
from minitron.generation.tokenizers import load_tokenizer
from minitron.text.encoding import Encoding
from minitron.text.passes import Split

EXAMPLES, EXAMPLE_TOKENS = 3, 320  # rows that are shown, and how much of each
MOST_SOURCES = 12  # the rest of them are one
SAMPLED_TOKENS = 2**22  # of rows that may be a file larger than the memory


def data_card(folder: Path, encoding: Encoding, splits: dict[str, Split]) -> dict:
    """Of train.npy in `folder` and what the passes counted: documents, lengths (how many have up to so many tokens, powers of two), sources, what was left
    out and why, and rows as text in parts (text, whether it counts for the loss). With answers only, also the share of train tokens that count."""
    data, rows_RT = encoding.data, np.load(folder / "train.npy", mmap_mode="r")
    counted = {"counted_share": _counted_share(rows_RT)} if data.answers_only else {}
    return {
        "sequence_length": data.sequence_length,
        "rows": data.rows.name,
        "splits": {name: _counts(split, getattr(data, f"max_{name}_tokens")) for name, split in splits.items()},
        "refused": [one for split in splits.values() for one in split.tally.refused],
        "forms": sorted({(file, words) for split in splits.values() for words, file in split.tally.forms.items()}),
        "answers_only": data.answers_only,
        **counted,
        "examples": _examples(rows_RT, encoding),
    }  # fmt: skip


def _counts(split: Split, limit: int | None) -> dict[str, Any]:
    """Of one split; `limit_tokens` where reading stopped because it had that many."""
    counts, tally = split.counts, split.tally
    lengths = {str(2 ** int(power)): number for power, number in sorted(counts.lengths.items(), key=lambda item: int(item[0]))}
    stopped = {"limit_tokens": limit} if limit is not None and counts.row_tokens >= limit else {}
    return {"documents": counts.documents, "tokens": counts.tokens, "longest_tokens": counts.longest, "rows": split.num_rows, "row_tokens": counts.kept_tokens,
            "lengths": lengths, "sources": _sources(counts.by_source), "left_out": tally.left_out, "without_reasoning": tally.without_reasoning,
            **stopped}  # fmt: skip


def _sources(by_source: dict[str, list[int]]) -> list[dict]:
    """Most tokens first."""
    largest = sorted(by_source.items(), key=lambda item: (-item[1][1], item[0]))
    kept, rest = largest[:MOST_SOURCES], largest[MOST_SOURCES:]
    found = [{"source": name, "documents": documents, "tokens": tokens} for name, (documents, tokens) in kept]
    if rest:
        found.append({"source": f"{len(rest):,} others", "documents": sum(one[0] for _, one in rest), "tokens": sum(one[1] for _, one in rest)})
    return found


def _counted_share(rows_RT: np.ndarray) -> float:
    """Positions at which something is learned, of all real tokens; where they are many, of SAMPLED_TOKENS in rows spread evenly."""
    number = min(len(rows_RT), max(1, SAMPLED_TOKENS // rows_RT.shape[1]))
    places = np.linspace(0, len(rows_RT) - 1, number).astype(np.int64)
    sampled_RT = rows_RT[places]
    return round(count_counted(sampled_RT) / count_tokens(sampled_RT), 4)


def _examples(rows_RT: np.ndarray, encoding: Encoding) -> list[dict]:
    """Rows from the beginning, the middle and the end."""
    tokenizer = load_tokenizer(encoding.tokenizer)
    places = sorted({0, len(rows_RT) // 2, len(rows_RT) - 1})[:EXAMPLES]
    return [{"row": place, **_example(np.array(rows_RT[place]), tokenizer)} for place in places]


def _example(row_T: np.ndarray, tokenizer) -> dict[str, Any]:
    """A row's text in parts (text, whether it is learned), EXAMPLE_TOKENS of its `tokens` from `first_token` on: among them something that is learned."""
    row_T = row_T[row_T != PADDING]
    ids_T = plain_ids(row_T)
    learned_T = np.append(False, counted_positions(row_T)[:-1])  # a token is learned where the one before it counts
    learned_T[:1] = learned_T[1:2]  # before the first there is none: it goes with the second
    first_learned = int(np.argmax(learned_T))
    start = 0 if first_learned < EXAMPLE_TOKENS * 3 // 4 else first_learned - EXAMPLE_TOKENS // 4
    ids_T, learned_T = ids_T[start : start + EXAMPLE_TOKENS], learned_T[start : start + EXAMPLE_TOKENS]
    starts = [0, *(np.flatnonzero(learned_T[1:] != learned_T[:-1]) + 1).tolist()]
    texts = _texts(ids_T, [*starts[1:], len(ids_T)], tokenizer)
    parts = [[text, bool(learned_T[first])] for first, text in zip(starts, texts, strict=True) if text]
    return {"tokens": len(row_T), "first_token": start, "shown_tokens": len(ids_T), "parts": parts}


def _texts(ids_T: np.ndarray, ends: list[int], tokenizer) -> list[str]:
    """The text of the tokens up to each end. Each part is what it adds to the text before: by itself it may lose a space at its beginning."""
    wholes = ["", *(tokenizer.decode(ids_T[:end].tolist(), clean_up_tokenization_spaces=False) for end in ends)]
    return [whole[len(before) :] for before, whole in zip(wholes, wholes[1:], strict=False)]
