"""The report's section on the data: its splits and sources, what was left out and why, how long documents are, and rows as text."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from minitron.report.text import Summary, fenced, quoted, seen, table

SPLITS = {"train": "train", "heldout": "held-out"}  # of the card, by how the page calls them
ROWS = {
    "windows": "Rows are {length} tokens of one document each; what is left at a document's end, or of one shorter than that, is in no row.",
    "documents": "A row is the first {length} tokens of one document; shorter ones are padded.",
    "packed": "A row holds documents one after another, up to {length} tokens; longer documents are cut.",
}
MOST_REFUSED = 5  # that are named
WIDTH = 110  # characters of a line of a row
FIRST_LINES, LAST_LINES, MOST_LINES = 12, 3, 48  # of a part of a row, and of all of it
LEARNED, GIVEN = "+ ", "  "  # how lines begin


def data_blocks(summary: Summary, image: Callable[[str, str], str]) -> list[str]:
    """What the section shows under its headline; `image(name, caption)` shows a plot. Nothing of rows that an earlier version made, without a card."""
    card = summary["data"]
    if "splits" not in card:
        return []
    return [
        splits_table(card),
        ROWS[card["rows"]].format(length=f"{card['sequence_length']:,}"),
        forms_text(card),
        sources_table(card),
        left_out_text(card),
        image("lengths.png", "how long documents are, in tokens, and how long a row is"),
        rows_text(card),
    ]


def splits_table(card: Mapping[str, Any]) -> str:
    """Documents and rows of both splits."""
    head = ("split", "documents", "tokens", "longest document (tokens)", "rows", "tokens in rows", "rows filled")
    rows = []
    for name, split in _splits(card):
        numbers = (split[what] for what in ("documents", "tokens", "longest_tokens", "rows", "row_tokens"))
        rows.append((name, *(f"{number:,}" for number in numbers), _percent(split["row_tokens"], split["rows"] * card["sequence_length"])))
    return table(head, rows)


def forms_text(card: Mapping[str, Any]) -> str:
    """What the records were taken for, each with the first file of its kind."""
    named = [f"- {quoted(words)} ({quoted(file)})" for file, words in card.get("forms", ())]
    return "\n".join(["What records were read as, with the first file of each kind:", "", *named]) if named else ""


def sources_table(card: Mapping[str, Any]) -> str:
    """Where train documents come from, most tokens first; nothing where all are of one source."""
    sources = card["splits"]["train"]["sources"]
    if len(sources) < 2:
        return ""
    total = sum(one["tokens"] for one in sources)
    rows = [(quoted(one["source"]), f"{one['documents']:,}", f"{one['tokens']:,}", _percent(one["tokens"], total)) for one in sources]
    return table(("source of train documents", "documents", "tokens", "share of tokens"), rows)


def left_out_text(card: Mapping[str, Any]) -> str:
    """Sentences on what of the source is in no row, with the first documents that were refused."""
    said = []
    for name, split in _splits(card):
        said += [_left_out(name, split["documents"], split["left_out"])] if split["left_out"] else []
        said += [_without_row(name, number)] if (number := _num_without_row(card, split)) else []
        said += [f"{_number(lost, f'{name} conversation')} lost reasoning to the chat template."] if (lost := split.get("without_reasoning")) else []
        said += [f"Reading {name} documents stopped at {limit:,} tokens, as the settings say."] if (limit := split.get("limit_tokens")) else []
    if not any(split["left_out"] for _, split in _splits(card)):
        said.insert(0, "No document was left out.")
    return "\n\n".join(filter(None, [" ".join(said), _refused(card["refused"])]))


def _left_out(name: str, documents: int, left_out: Mapping[str, int]) -> str:
    number = sum(left_out.values())
    reasons = ", ".join(f"{count:,} {quoted(why)}" for why, count in left_out.items())
    return f"Of {_number(number + documents, f'{name} document')} {number:,} ({_percent(number, number + documents)}) were left out: {reasons}."


def _num_without_row(card: Mapping[str, Any], split: Mapping[str, Any]) -> int:
    """Documents that could have had a row of their own and have none; not known where reading stopped at a limit."""
    return split["documents"] - split["rows"] if card["rows"] == "documents" and "limit_tokens" not in split else 0


def _without_row(name: str, number: int) -> str:
    return f"{_number(number, f'{name} document')} {'has' if number == 1 else 'have'} nothing to learn from, so no row either."


def _refused(refused: Sequence[Sequence[str]]) -> str:
    named = [f"- {quoted(document)}: {quoted(why, 300)}" for document, why in refused[:MOST_REFUSED]]
    return "\n".join(["The first that were refused:", "", *named]) if named else ""


def rows_text(card: Mapping[str, Any]) -> str:
    """Some rows as text, with what counts for the loss marked where not all of it does."""
    if not card["examples"]:
        return ""
    ends = "⏎ is the end of a line of the text; a line without it goes on in the next."
    if card["answers_only"]:
        share = f", {_percent(card['counted_share'], 1)} of all tokens" if "counted_share" in card else ""
        intro = f"Train rows as the models get them. Only answers count for the loss{share}: the lines that begin with `+`. {ends}"
    else:
        intro = f"Train rows as the models get them. Every token counts for the loss. {ends}"
    blocks = [block for one in card["examples"] for block in (_row_title(one), fenced(row_lines(one), "diff" if card["answers_only"] else "text"))]
    return "\n\n".join([intro, *blocks])


def _row_title(one: Mapping[str, Any]) -> str:
    first, shown = one["first_token"], one["shown_tokens"]
    part = "" if shown == one["tokens"] else f", from token {first:,} on" if first else f", the first {shown:,}"
    return f"`train.npy[{one['row']}]`, {_number(one['tokens'], 'token')}{part}:"


def row_lines(one: Mapping[str, Any]) -> list[str]:
    """The lines that show a row: what is learned begins with "+ ", all else with two spaces, what is said of the row with "…"."""
    several = len(one["parts"]) > 1
    lines = ["…"] if one["first_token"] else []
    for text, is_learned in one["parts"]:
        lines += _shortened([(LEARNED if is_learned and several else GIVEN) + line for line in _broken(text)])
    lines = lines if len(lines) <= MOST_LINES else lines[:MOST_LINES] + ["…"]
    is_cut = one["first_token"] + one["shown_tokens"] < one["tokens"]
    return lines + (["…"] if is_cut and lines[-1] != "…" else [])


def _broken(text: str) -> Iterator[str]:
    """Lines of at most WIDTH characters, ⏎ where the text has a newline."""
    *whole, rest = seen(text).split("\n")
    for line in [f"{one}⏎" for one in whole] + [rest] * bool(rest):
        yield from textwrap.wrap(line, WIDTH, expand_tabs=False, replace_whitespace=False, drop_whitespace=False, break_on_hyphens=False)


def _shortened(lines: list[str]) -> list[str]:
    number = len(lines) - FIRST_LINES - LAST_LINES
    return lines if number < 2 else [*lines[:FIRST_LINES], f"… {number:,} lines", *lines[-LAST_LINES:]]


def more_rows_blocks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows that were made for distillation beside the data stage's: a table of them, and what was left out of each; rows that an earlier version made do
    not say the latter."""
    lines = [(quoted(one["source"]), f"{one['sequence_length']:,}", f"{one['rows']:,}", f"{one['tokens']:,}", _percent(one["filled_share"], 1)) for one in rows]
    blocks = [table(("rows of", "length (tokens)", "rows", "tokens", "filled"), lines)] if rows else []
    for one in rows:
        if one.get("left_out"):
            blocks += [f"{quoted(one['source'])}: {_left_out('train', one['documents'], one['left_out'])}", _refused(one["refused"])]
    return blocks


def _splits(card: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Train first."""
    return [(shown, card["splits"][name]) for name, shown in SPLITS.items()]


def _number(number: int, of: str) -> str:
    return f"{number:,} {of}{'' if number == 1 else 's'}"


def _percent(part: float, whole: float) -> str:
    share = 100 * part / whole if whole else 0.0
    return "< 0.1 %" if 0 < share < 0.05 else f"{share:.1f} %"
