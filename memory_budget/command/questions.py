"""Questions about one answer: which cards it fits, what every number format takes, how memory grows with context."""

import math
from typing import Any

from memory_budget.budget import PRESETS, Budget
from memory_budget.command.answer import Answer, with_weights
from memory_budget.units import GIB

GGUF_FORMATS = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M")
FORMATS = ("bf16", "fp8", "int8", "int4", "mxfp4", "nvfp4")
SHORTEST_CONTEXT, LONGEST_CONTEXT = 1024, 2**40


def smallest_card(answer: Answer) -> Budget | None:
    """The preset with the fewest bytes left for a model that the workload fits; None where none has enough, or the cache is not known."""
    if not answer.model.cache_known:
        return None
    fitting = [card for card in PRESETS.values() if answer.report.total <= card.bytes]
    return min(fitting, key=lambda card: card.bytes, default=None)


def cards(answer: Answer) -> dict[str, dict[str, Any]]:
    """Every preset, the smallest first: bytes left for a model, whether the workload fits, what is to spare."""
    known = answer.model.cache_known
    return {
        card.name: {
            "budget_bytes": card.bytes,
            "fits": answer.report.total <= card.bytes if known else None,
            "headroom_bytes": card.bytes - answer.report.total if known else None,
            "max_context_tokens": answer.context_within(card.bytes) if known else None,
        }
        for card in sorted(PRESETS.values(), key=lambda card: card.bytes)
    }


def at_every_format(answer: Answer) -> dict[str, Answer]:
    """The answer with weights in each format, and in the one asked for where it is another."""
    asked, names = (answer.workload.weights_dtype, FORMATS) if answer.gguf is None else (answer.gguf.quant.upper(), GGUF_FORMATS)
    names = names if asked in names else (*names, asked)
    return {name: with_weights(answer, name) for name in names}


def curve(answer: Answer) -> list[tuple[int, dict[str, int]]]:
    """Context and bytes by part at doubling contexts, from 1,024 tokens to past the workload's, the positions and the budget's longest;
    and at each of these. Raises ValueError where the cache is not known."""
    if not answer.model.cache_known:
        raise ValueError("--plot: the cache of this model is not known, and so no curve against context")
    marks = {answer.workload.context_tokens, *(mark for mark in (answer.model.positions, answer.max_context) if mark)}
    last = min(max(marks), LONGEST_CONTEXT)
    doublings = {SHORTEST_CONTEXT << step for step in range(math.ceil(math.log2(max(last / SHORTEST_CONTEXT, 1))) + 1)}
    contexts = sorted({context for context in doublings | marks if 1 <= context <= 2**40})
    return [(context, answer.report_with(context_tokens=context).as_dict()) for context in contexts]


def as_text(answer: Answer, *, width: int = 60) -> str:
    """The curve in letters: a line a context, a bar as long as its total, a mark at the budget."""
    points = curve(answer)
    most = max(*(parts["total"] for _, parts in points), answer.budget.bytes)
    mark = min(width - 1, answer.budget.bytes * width // most)
    lines = []
    for context, parts in points:
        fixed, total = (parts["total"] - parts["kv_cache"]) * width // most, parts["total"] * width // most
        bar = list(("#" * fixed + "=" * (total - fixed)).ljust(width))
        bar[mark] = "|"
        lines.append(f"{context:>16,} tokens  {''.join(bar)}  {parts['total'] / GIB:,.2f} GiB")
    beside = " and what is beside the model" if answer.beside.is_there else ""
    return "\n".join([*lines, f"{'':>16}         # weights and states{beside}, = KV cache, | the budget ({answer.budget.bytes / GIB:,.2f} GiB)"])
