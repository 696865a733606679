"""report.html: the page of report.md with what a stage did folded under its one line, and nothing that a browser would fetch but the plots beside it."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from minitron.report.evaluation import WRITTEN

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

UNFOLDED = (WRITTEN,)  # sections of the second level that a reader of five minutes sees whole
FOLDED = ("h2", "h3")
UNIT = re.compile(r"(?<=\d) (?=[%±]|(?:GiB|nats|tokens|s|min|h)\b)|(?<=±) (?=\d)")  # a number, its error and its unit stay on one line
STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 70rem; margin: 2rem auto; padding: 0 1.2rem; }
h1, h2, h3 { line-height: 1.25; margin-bottom: .6rem; } h2 { margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { border: 1px solid #d5d5d5; padding: .3rem .45rem; } td { white-space: nowrap; } td:last-child { white-space: normal; }
td code { white-space: nowrap; } th { background: #f4f4f4; text-align: left; vertical-align: bottom; }
img { max-width: 100%; display: block; } p > em { color: #555; font-size: .92rem; }
code, pre { font: .88em/1.45 ui-monospace, Menlo, Consolas, monospace; background: #f6f6f6; }
code { padding: .1em .25em; overflow-wrap: anywhere; } pre { padding: .8rem; overflow-x: auto; } pre code { padding: 0; font-size: 1em; overflow-wrap: normal; }
h1 + p { font-size: 1.15rem; background: #eef6f4; border-left: .3rem solid #009e73; padding: .8rem 1rem; }
details { border-top: 1px solid #ddd; padding: .5rem 0; } details[open] { padding-bottom: 1.2rem; }
summary { cursor: pointer; } summary:hover { background: #f6f6f6; }
summary h2, summary h3 { display: inline; font-size: 1.05rem; margin: 0 .6rem 0 .2rem; } summary h2 { font-size: 1.2rem; } summary span { color: #444; }
"""


def page_html(markdown: str, title: str) -> str:
    """report.html: the same page, with images by their relative paths."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for word in (child for token in tokens for child in token.children or () if child.type == "text"):
        word.content = UNIT.sub("\u00a0", word.content)
    body = "".join(_sections(parser, tokens, FOLDED))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_html_text(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'


def _sections(parser: "MarkdownIt", tokens: Sequence["Token"], levels: Sequence[str]) -> Iterator[str]:
    """What stands before the first heading of the first of these levels, then a section for each, folded; within it those of the next level."""
    if not levels:
        yield _rendered(parser, tokens)
        return
    starts = [place for place, token in enumerate(tokens) if token.type == "heading_open" and token.tag == levels[0] and token.level == 0]
    ends = [*starts, len(tokens)]
    yield from _sections(parser, tokens[: ends[0]], levels[1:])
    for start, end in pairwise(ends):
        yield _section(parser, tokens[start:end], levels)


def _section(parser: "MarkdownIt", tokens: Sequence["Token"], levels: Sequence[str]) -> str:
    """A heading with what follows it; folded, its first paragraph stands beside the heading where it is one line of words."""
    heading, rest = tokens[:3], tokens[3:]
    if heading[1].content in UNFOLDED:
        return _rendered(parser, tokens)
    beside = ""
    if [token.type for token in rest[:3]] == ["paragraph_open", "inline", "paragraph_close"] and not any(one.type == "image" for one in rest[1].children or ()):
        beside, rest = f"<span>{parser.renderer.renderInline(rest[1].children, parser.options, {})}</span>", rest[3:]
    within = "".join(_sections(parser, rest, levels[1:]))
    return f"<details><summary>{_rendered(parser, heading).strip()}{beside}</summary>\n{within}</details>\n"


def _rendered(parser: "MarkdownIt", tokens: Sequence["Token"]) -> str:
    return parser.renderer.render(tokens, parser.options, {})


def _html_text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
