"""How the report writes numbers, names, tables and images, in Markdown."""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minitron.walk.shown import escaped, sign_of

Summary = Mapping[str, Any]

JOINERS = "\u200c\u200d"  # within words of some scripts, and within emoji
TWO_SIDED = 1.96  # standard errors to either side that hold 95 % of a normal distribution
LONG = 1000  # characters of a sentence from elsewhere
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # Unicode's categories of characters that show nothing, or change how others show


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [head, ("---", *("---:" for _ in head[1:])), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def image(plots: Sequence[str], name: str, caption: str) -> str:
    """The plot and, under it, what it shows; nothing where it was not drawn."""
    return f"![{caption}]({name})\n*{caption}.*" if name in plots else ""


def nats(value: float) -> str:
    """A loss or KL with three decimals, four or an exponent where it is small."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.3f}"
    return f"{value:.4f}" if abs(value) >= 0.0001 else f"{value:.0e}"


def signed(value: float) -> str:
    return ("+" if value >= 0 else "−") + nats(abs(value))


def error_text(difference: Mapping[str, Any] | None) -> str:
    """ ± 0.012 behind a difference in loss, 95 % of it to either side; nothing where no error is known."""
    error = (difference or {}).get("standard_error")
    return "" if error is None else f" ± {nats(TWO_SIDED * error)}"


def is_noise(nats_per_token: float, difference: Mapping[str, Any] | None) -> bool:
    """Whether rows drawn anew could as well show no difference, or the opposite one; where no error is known only what is exactly nothing."""
    error = (difference or {}).get("standard_error")
    return nats_per_token == 0 if error is None else abs(nats_per_token) <= TWO_SIDED * error


def change_of_perplexity(nats_per_token: float) -> str:
    """What a difference in loss makes of perplexity, exp(loss), in per cent."""
    share = 100 * math.expm1(nats_per_token)
    return f"{'+' if share >= 0 else '−'}{abs(share):,.3g} %"


def change(before: int, after: int) -> str:
    """The change in per cent of what was before, or "same"."""
    return "same" if before == after else f"{'+' if after > before else '−'}{100 * abs(after - before) / before:.1f} %"


def speed(tokens_per_second: float) -> str:
    """Tokens per second, with a decimal below 1,000."""
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 1000 else f"{tokens_per_second:.1f}"


def duration(seconds: float) -> str:
    """27 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def seen(text: str) -> str:
    """Text with its control characters, and others that nobody would see, as signs: ␛, <U+202E>. Newlines and tabs stay."""
    return "".join(map(_seen, text))


def _seen(character: str) -> str:
    return character if character in "\n\t" or character in JOINERS or unicodedata.category(character) not in UNSEEN else sign_of(character)


def quoted(text: str, most: int = 160) -> str:
    """Text from elsewhere within a line of the page or a cell of a table, whatever Markdown, HTML or formula it would be; shortened to `most` characters."""
    shown = " ".join(seen(text.replace("\n", " ⏎ ")).split())
    shown = shown if len(shown) <= most else shown[: most - 1].rstrip() + "…"
    return re.sub(r"([&$@])", r"\\\1", escaped(shown))


def sentence(text: str) -> str:
    """Plain text as a sentence: a capital first, a full stop last."""
    return quoted(text[:1].upper() + text[1:], LONG) + "."


def code(text: str) -> str:
    """Text from elsewhere as a code span."""
    text = " ".join(seen(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def fenced(lines: Sequence[str], language: str) -> str:
    """Lines as they are: the fence is longer than any run of backticks in them."""
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])
