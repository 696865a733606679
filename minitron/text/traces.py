"""Reasoning cut short: what teaches a student to answer when its thinking budget runs out.

About 5 % of the aligned teacher's fine-tuning data has truncated traces (arXiv 2508.14444, §4); without them a model whose
reasoning is closed early goes on reasoning in its answer.
"""

import hashlib
import re

from minitron.text.embedded import Document

TRACE = re.compile(r"(<think>)(.+?)(</think>)", re.DOTALL)


def truncate_reasoning(document: Document, share: float) -> Document:
    """The document with its reasoning cut at a random word and closed, if it is one of the share; others as they are.

    Which documents and where follows from the document's name alone.
    """
    digest = hashlib.sha256(f"reasoning {document.name}".encode()).digest()
    chosen, cut = (int.from_bytes(digest[start : start + 8]) / 2**64 for start in (0, 8))
    if chosen >= share:
        return document

    def shorten(trace: re.Match) -> str:
        kept = trace[2][: int(len(trace[2]) * cut)]
        return trace[1] + kept[: kept.rfind(" ") + 1].rstrip() + trace[3]

    return Document(name=document.name, text=TRACE.sub(shorten, document.text))
