"""Reasoning cut short: what teaches a student to answer when its thinking budget runs out.

About 5 % of the aligned teacher's fine-tuning data has truncated traces (arXiv 2508.14444, §4); without them a model whose
reasoning is closed early goes on reasoning in its answer.
"""

import hashlib
import re

TRACE = re.compile(r"(<think>)(.+?)(</think>)", re.DOTALL)
Ranges = tuple[tuple[int, int], ...]  # half-open, of characters


def truncated(text: str, ranges: Ranges, name: str, share: float) -> tuple[str, Ranges]:
    """A document's text with its reasoning cut at a random word and closed, if it is one of the share, else as it is; and ranges of it where they are then.

    Which documents and where follows from the document's name alone.
    """
    if not share:
        return text, ranges
    digest = hashlib.sha256(f"reasoning {name}".encode()).digest()
    chosen, cut = (int.from_bytes(digest[start : start + 8]) / 2**64 for start in (0, 8))
    if chosen >= share:
        return text, ranges
    gone = [_gone(trace, cut) for trace in TRACE.finditer(text)]
    kept, place = [], 0
    for start, end in gone:
        kept.append(text[place:start])
        place = end
    return "".join([*kept, text[place:]]), tuple((_moved(start, gone), _moved(end, gone)) for start, end in ranges)


def _gone(trace: re.Match, cut: float) -> tuple[int, int]:
    """The characters of a trace that are cut off."""
    whole = trace[2]
    kept = whole[: int(len(whole) * cut)]
    return trace.start(2) + len(kept[: kept.rfind(" ") + 1].rstrip()), trace.end(2)


def _moved(place: int, gone: list[tuple[int, int]]) -> int:
    """Where a place of the text is once those characters are gone."""
    return place - sum(min(place, end) - start for start, end in gone if start < place)
