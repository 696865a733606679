"""The pictures of docs/concepts.md, in plain SVG: `python docs/pictures/draw.py` writes them beside this file.

Each has a pale ground of its own, so that it reads in a light page and in a dark one, and asks for no font and no other file. Sizes are in pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
WIDTH, MARGIN = 900, 20
INK, PALE, LINE = "#1c1c1c", "#fbfcfc", "#78909c"
BLUE, ORANGE, GREEN, GREY = "#d6e8f5", "#fdeccc", "#d3efe4", "#eceff1"
DARK = {BLUE: "#0072b2", ORANGE: "#b26a00", GREEN: "#00795a", GREY: "#607d8b"}
SIZE, SMALL = 15, 13
STYLE = "text{font-family:system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:" + INK + "}.m{font-family:ui-monospace,Menlo,'DejaVu Sans Mono',monospace}"


def text(x: float, y: float, words: str, *, size: int = SIZE, bold: bool = False, middle: bool = True, mono: bool = False, ink: str = "") -> str:
    """Words on one line, centred at x or beginning there; y is the line's foot."""
    looks = ' text-anchor="middle"' * middle + ' font-weight="600"' * bold + ' class="m"' * mono + (f' style="fill:{ink}"' if ink else "")
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{looks}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, lines: Sequence[str] = (), *, fill: str = GREY, dashed: bool = False) -> str:
    """A rectangle with lines of words in its middle, the first of them bold."""
    edge = f'stroke="{DARK[fill]}"' + ' stroke-dasharray="5 4"' * dashed
    drawn = [f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{PALE if dashed else fill}" {edge}/>']
    first = y + height / 2 + 5 - 9 * (len(lines) - 1)
    for number, words in enumerate(lines):
        drawn.append(text(x + width / 2, first + 18 * number, words, size=SMALL if number else SIZE, bold=not number))
    return "".join(drawn)


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    """A line through points with a head at its end."""
    way = " ".join(f"{x:g},{y:g}" for x, y in points)
    looks = f'fill="none" stroke="{LINE}" stroke-width="1.6"' + ' stroke-dasharray="4 4"' * dashed
    return f'<polyline points="{way}" {looks} marker-end="url(#head)"/>'


def svg(height: float, title: str, parts: Iterator[str]) -> str:
    head = '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    head += f'<path d="M0 0L10 5L0 10z" fill="{LINE}"/></marker>'
    ground = f'<rect width="{WIDTH}" height="{height:g}" rx="10" fill="{PALE}" stroke="#cfd8dc"/>'
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}"'
    first = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>"]
    return "\n".join([*first, f"<defs>{head}</defs>", ground, *parts, "</svg>"]) + "\n"


STAGES = (("teacher", "your model, checked", BLUE), ("data", "rows of tokens", BLUE), ("score", "what counts most", ORANGE),
          ("shortlist", "what fits, ranked", ORANGE), ("screen", "finalists, distilled", ORANGE), ("search", "the choice", ORANGE),
          ("prune", "the cut checkpoint", GREEN), ("distill", "the student", GREEN), ("evaluate", "what it is worth", GREEN),
          ("report", "the page to read", GREEN))  # fmt: skip


def walk() -> Iterator[str]:
    wide, high, gap = 160, 62, 15
    places = [(MARGIN + column * (wide + gap), 44 + row * 96) for row in range(2) for column in range(5)]
    yield text(MARGIN, 28, "Stages, one after another. Each leaves what it made in a folder of the store.", middle=False)
    for (name, leaves, fill), (x, y) in zip(STAGES, places, strict=True):
        yield box(x, y, wide, high, (name, leaves), fill=fill)
    for number, ((x, y), (to_x, to_y)) in enumerate(zip(places, places[1:], strict=False)):
        if number != 4:
            yield arrow((x + wide, y + high / 2), (to_x - 1, to_y + high / 2))
    (x, y), (to_x, to_y) = places[4], places[5]
    yield arrow((x + wide / 2, y + high), (x + wide / 2, y + high + 17), (to_x + wide / 2, y + high + 17), (to_x + wide / 2, to_y - 1))
    yield box(MARGIN, 252, 500, 66, fill=GREY)
    yield text(MARGIN + 250, 278, "runs/store/<stage>/<key>/", mono=True)
    yield text(MARGIN + 250, 302, "shared by all runs: found there, it is not made again", size=SMALL)
    yield box(560, 252, 320, 66, fill=GREY)
    yield text(720, 278, "runs/<run name>/", mono=True)
    yield text(720, 302, "report.html, and a link to the student", size=SMALL)
    yield arrow((100, 202), (100, 251), dashed=True)
    yield arrow((275, 202), (275, 251), dashed=True)
    yield arrow((450, 202), (450, 251), dashed=True)
    yield arrow((800, 202), (800, 251), dashed=True)


def _stack(x: float, layers: Sequence[bool], width: float, fill: str) -> Iterator[str]:
    """Layers from the bottom up; those that are gone as dashed outlines of the first width."""
    for number, stays in enumerate(layers):
        y = 226 - 18 * number
        yield box(x - width / 2, y, width, 14, fill=fill, dashed=not stays)


def laps() -> Iterator[str]:
    whole, gone = (True,) * 9, tuple(layer not in (2, 5, 6) for layer in range(9))
    kept = tuple(stays for stays in gone if stays)
    for x, title in ((120, "teacher"), (335, "first lap"), (590, "second lap"), (800, "student")):
        yield text(x, 32, title, bold=True)
    yield from _stack(120, whole, 150, BLUE)
    yield from _stack(335, gone, 150, ORANGE)
    yield from _stack(590, kept, 150, GREY)
    yield from _stack(590, kept, 96, ORANGE)
    yield from _stack(800, kept, 96, GREEN)
    yield arrow((200, 160), (254, 160))
    yield arrow((414, 160), (511, 160))
    yield arrow((669, 160), (748, 160))
    for x, words in ((120, "all layers, full width"), (335, "depth is cut"), (590, "then widths are cut"), (800, "fits")):
        yield text(x, 266, words, size=SMALL)
    yield text(462, 150, "distil", size=SMALL)
    yield text(709, 150, "distil", size=SMALL)
    yield arrow((120, 282), (120, 306), (462, 306), (462, 172), dashed=True)
    yield arrow((462, 306), (709, 306), (709, 172), dashed=True)
    yield text(292, 325, "the teacher teaches in both laps", size=SMALL)


SHADES = ("#0b5394", "#2f75b0", "#5b97c8", "#8bb8dc", "#b5d2ea", "#d9e8f5")


def _columns(x: float, y: float, order: Sequence[int], height: float = 132) -> Iterator[str]:
    for place, rank in enumerate(order):
        yield f'<rect x="{x + 26 * place:g}" y="{y:g}" width="24" height="{height:g}" fill="{SHADES[rank]}"/>'


def views() -> Iterator[str]:
    yield text(110, 32, "as it was stored", bold=True)
    yield from _columns(32, 52, (3, 0, 5, 2, 1, 4))
    yield text(110, 206, "dark: counts much", size=SMALL)
    yield arrow((200, 118), (258, 118))
    yield text(229, 108, "sort", size=SMALL)
    yield text(346, 32, "sorted once, in place", bold=True)
    yield from _columns(268, 52, range(6))
    yield text(346, 206, "the same model", size=SMALL)
    yield arrow((436, 118), (494, 118))
    yield text(465, 108, "look", size=SMALL)
    yield text(690, 32, "every candidate is a beginning of it", bold=True)
    yield from _columns(505, 52, range(6))
    for number, (columns, ink) in enumerate(((6, "#b26a00"), (5, "#00795a"), (4, "#9c27b0"))):
        size = f'width="{26 * columns + 6:g}" height="{142 - 16 * number}"'
        yield f'<rect x="501" y="{47 + 8 * number}" {size} fill="none" stroke="{ink}" stroke-width="3"/>'
        yield text(684, 78 + 34 * number, f"candidate {'ABC'[number]}: the first {columns} units", size=SMALL, middle=False, ink=ink)
    yield text(684, 188, "nothing is copied", size=SMALL, middle=False)


def compensated() -> Iterator[str]:
    columns, wide, gap = (200, 370, 540, 710), 128, 42
    yield text(MARGIN, 92, "base", bold=True, middle=False)
    yield text(MARGIN, 110, "(not cut)", size=SMALL, middle=False)
    yield text(MARGIN, 262, "student", bold=True, middle=False)
    yield text(MARGIN, 280, "(cut)", size=SMALL, middle=False)
    yield text(118, 32, "the same text", size=SMALL)
    yield arrow((118, 40), (118, 90), (columns[0] - 1, 90))
    yield arrow((118, 90), (118, 262), (columns[0] - 1, 262))
    for number, x in enumerate(columns):
        yield box(x, 60, wide, 60, (f"layer {number}", "as it is"), fill=BLUE)
        gone = number == 2
        yield box(x, 232, wide, 60, ("removed",) if gone else (f"layer {number}", "fewer units"), fill=GREY if gone else ORANGE, dashed=gone)
        if number < 3:
            yield arrow((x + wide, 90), (x + wide + gap - 1, 90))
    yield arrow((columns[0] + wide, 262), (columns[1] - 1, 262))
    left, right = columns[1] + wide + gap / 2, columns[3] - gap / 2  # around the removed layer
    yield arrow((columns[1] + wide, 262), (left, 262), (left, 306), (right, 306), (right, 262), (columns[3] - 1, 262))
    for x, behind in ((columns[0], 0), (columns[1], 2), (columns[3], 3)):
        end = columns[behind] + wide / 2
        yield arrow((end, 120), (end, 151), dashed=True)
        yield arrow((x + wide / 2, 201), (x + wide / 2, 231))
    yield box(columns[0], 152, wide, 48, ("compare", "refit layer 0"), fill=GREEN)
    both = columns[2] + wide - columns[1]
    yield box(columns[1], 152, both, 48, ("compare behind layer 2", "layer 1 is refitted to do its part too"), fill=GREEN)
    yield box(columns[3], 152, wide, 48, ("compare", "refit layer 3"), fill=GREEN)
    yield text(WIDTH / 2, 336, "Layer by layer, in lock-step: each student's layer is fitted to what the base has there, before any training.", size=SMALL)


def keys() -> Iterator[str]:
    goes_in = ("the settings the result follows from", "the keys of the stages before it", "the stage's version")
    yield box(MARGIN, 46, 250, 92, ("what goes into a key", *goes_in), fill=BLUE)
    yield arrow((270, 92), (322, 92))
    yield box(323, 68, 140, 48, ("key", "7404bffe52a7"), fill=GREEN)
    yield arrow((463, 92), (515, 92))
    yield box(516, 46, 364, 92, ("is it in the store?", "yes: done, in no time", "no: made, and kept under this key"), fill=GREY)
    yield text(MARGIN, 30, "A result is found by what it follows from, not by a name or a date.", middle=False)
    yield text(MARGIN, 186, "So distill.train.tokens=200_000, given to the finished demo, makes anew what follows from it and nothing else:", middle=False)
    names = (("data", 0), ("teacher", 0), ("score", 0), ("search", 0), ("prune", 0), ("distill", 1), ("evaluate", 1))
    wide, gap = 104, 22
    for number, (name, anew) in enumerate(names):
        x = MARGIN + number * (wide + gap)
        yield box(x, 204, wide, 54, (name, "made anew" if anew else "found"), fill=ORANGE if anew else GREEN)
        if number < len(names) - 1:
            yield arrow((x + wide, 231), (x + wide + gap - 1, 231))
    yield text(MARGIN, 292, "Settings marked (how), such as device or rows at once, change no result, so they are in no key.", size=SMALL, middle=False)


PICTURES: dict[str, tuple[float, str, Callable[[], Iterator[str]]]] = {
    "walk": (338, "The walk: stages, and where they keep what they made", walk),
    "laps": (342, "Two laps: depth first, then widths", laps),
    "views": (226, "Views: one sorted teacher read at many widths", views),
    "compensated": (356, "The compensated cut: base and student in lock-step", compensated),
    "keys": (312, "Keys: what a result follows from", keys),
}


def drawn(name: str) -> str:
    height, title, parts = PICTURES[name]
    return svg(height, title, parts())


if __name__ == "__main__":
    for name in PICTURES:
        (FOLDER / f"{name}.svg").write_text(drawn(name), encoding="utf-8")
