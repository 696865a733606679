"""The house as the code has it: rooms, who imports whom, and the picture of it in docs/architecture.md.

`make house` draws the picture anew; tests/test_house.py holds picture and rules to the code. A room is a folder of minitron/, or another package;
an import counts wherever it stands in a file, inside functions too.
"""

import ast
import re
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("memory_budget", "nas", "distill", "minitron")
PAGE = REPOSITORY / "docs" / "architecture.md"
BEGIN, END = "<!-- made by `make house` -->\n", "<!-- end of what `make house` makes -->\n"
Graph = Mapping[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """The files of the four packages by their dotted names; a folder's __init__.py by the folder's."""
    paths = [path.relative_to(root) for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): root / path for path in paths}


def imports(root: Path) -> dict[str, set[str]]:
    """Which files of the house each file imports, by dotted names."""
    files = modules(root)
    return {name: {target for target in map(_within(files), _imported(path)) if target not in (None, name)} for name, path in files.items()}


def _within(files: Mapping[str, Path]):
    """Gives the file of the house that a dotted name lies in: the longest beginning of the name that is one."""

    def file_of(name: str) -> str | None:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name or None

    return file_of


def _imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, those of `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def circle(graph: Graph) -> list[str]:
    """One circle of arrows, its first name last again; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def room_of(module: str) -> str:
    """`minitron.walk.store` → `walk`; `distill.engines.zero` → `distill`; the door, `minitron.run`, is a room of its own: `run`."""
    package, _, rest = module.partition(".")
    return package if package != "minitron" or not rest else rest.split(".")[0]


def rooms(graph: Graph) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    found: dict[str, set[str]] = {}
    for module, targets in graph.items():
        if module != "minitron":  # its __init__.py, which says what the rooms are
            found.setdefault(room_of(module), set()).update(room_of(target) for target in targets)
    return {room: targets - {room} for room, targets in found.items()}


def floors(graph: Graph) -> dict[str, int]:
    """How high each room lies: one above the highest that it imports."""
    heights: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        heights[room] = 1 + max((heights[target] for target in graph[room]), default=0)
    return heights


def longest_ways(graph: Graph) -> dict[str, set[str]]:
    """The same graph without arrows that a longer way makes superfluous."""

    def below(room: str) -> set[str]:
        return graph[room].union(*map(below, graph[room]))

    return {room: {target for target in targets if not any(target in below(other) for other in targets)} for room, targets in graph.items()}


def picture(graph: Graph) -> str:
    """The rooms in Mermaid, an arrow from who imports to what is imported; and a table with every arrow and what belongs in each room."""
    heights = floors(graph)
    order = sorted(graph, key=lambda room: (-heights[room], room))
    drawn = longest_ways(graph)
    arrows = [f"    {room} --> {' & '.join(sorted(drawn[room]))}" for room in order if drawn[room]]
    chart = "\n".join(["```mermaid", "flowchart TD", *arrows, "```"])
    rows = [f"| {_title(room)} | {_purpose(room)} | {', '.join(sorted(graph[room], key=order.index)) or '–'} |" for room in order]
    table = "\n".join(["| room | what belongs in it | imports |", "|---|---|---|", *rows])
    return f"{chart}\n\nNot drawn: an arrow that a longer way already says. The table, from the top floor down, has them all.\n\n{table}\n"


def _folder(room: str) -> Path:
    return REPOSITORY / room if room in PACKAGES else REPOSITORY / "minitron" / room


def _title(room: str) -> str:
    return f"`minitron/{room}.py`" if not _folder(room).is_dir() else f"`{_folder(room).relative_to(REPOSITORY)}/`"


def _purpose(room: str) -> str:
    """The first sentence of what the room says of itself."""
    file = _folder(room) / "__init__.py" if _folder(room).is_dir() else _folder(room).with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", " ".join(text.split()))[0]


def page_with(page: str, drawn: str) -> str:
    """The page with the picture between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{drawn}{END}{after}"


def main() -> int:
    graph = imports(REPOSITORY)
    for what, arrows in (("files", graph), ("rooms", rooms(graph))):
        if found := circle(arrows):
            print(f"error: a circle of {what}: {' → '.join(found)}", file=sys.stderr)
            return 2
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), picture(rooms(graph))), encoding="utf-8")
    found = rooms(graph)
    print(f"{len(found)} rooms on {max(floors(found).values())} floors, {sum(map(len, found.values()))} arrows: {PAGE.relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
