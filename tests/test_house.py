"""The arrows between the packages, and the settings' one place, held by walking the code."""

import ast
import dataclasses
import importlib.util
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from minitron.settings.run import Settings

REPOSITORY = Path(__file__).resolve().parent.parent
_SPEC = importlib.util.spec_from_file_location("house", REPOSITORY / "docs" / "house.py")
house = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(house)
PACKAGES = ("memory_budget", "nas", "distill", "minitron")
# What each package may import of the house, and of the world (None: anything).
ALLOWED = {
    "memory_budget": ({"memory_budget"}, {"matplotlib"}),  # imported when a plot is asked for, in one file
    "nas": ({"nas", "memory_budget"}, {"numpy"}),
    "distill": ({"distill"}, None),
    "minitron": (set(PACKAGES), None),
}
ONLY_IN = {"matplotlib": ("minitron/", "memory_budget/command/plot.py"),
           "hydra": "minitron/door/", "omegaconf": "minitron/door/", "wandb": "minitron/walk/tracking.py"}  # fmt: skip
MOST_LINES, MOST_MODULES = 400, 16


def modules(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((root / package).rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    """Top-level names of every import in a file, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module)
    return {name.split(".")[0] or "." for name in names}


def forbidden_imports(root: Path) -> list[str]:
    """Every import that the house's rules forbid, as `file imports name`."""
    found = []
    for path in modules(root):
        file = path.relative_to(root).as_posix()
        house, world = ALLOWED[file.split("/")[0]]
        for name in sorted(imported_packages(path)):
            in_house = name in PACKAGES
            bad_house = in_house and name not in house
            bad_world = not in_house and world is not None and name not in world and name not in sys.stdlib_module_names
            if bad_house or bad_world or name == "." or not file.startswith(ONLY_IN.get(name, file)):
                found.append(f"{file} imports {name}")
    return found


def test_no_module_imports_what_the_house_forbids():
    assert forbidden_imports(REPOSITORY) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("memory_budget/planted.py", "import numpy"),
        ("memory_budget/planted.py", "from nas.space import Floors"),
        ("nas/planted.py", "import torch"),
        ("nas/planted.py", "from minitron.settings.run import Settings"), 
        ("distill/planted.py", "from memory_budget.units import GIB"),
        ("distill/planted.py", "def inside():\n    import nas.space"),
        ("distill/planted.py", "from minitron import store"),
        ("minitron/stages/planted.py", "from omegaconf import DictConfig"),
        ("minitron/planted.py", "import hydra.utils"),
        ("distill/planted.py", "import wandb"),
        ("nas/planted.py", "from . import space"),
    ],
)
def test_a_planted_import_is_caught(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert len(forbidden_imports(tmp_path)) == 1


def test_the_walk_of_imports_reads_every_package():
    assert {path.relative_to(REPOSITORY).parts[0] for path in modules(REPOSITORY)} == set(PACKAGES)


def planted(root: Path, files: dict[str, str]) -> Path:
    """A house of these files alone."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_no_files_import_each_other_in_a_circle():
    graph = house.imports(REPOSITORY)
    assert len(graph) > 150 and house.circle(graph) == []


INSIDE = "def inside():\n    from minitron.text.rows import cut"


@pytest.mark.parametrize("line", ["from minitron.text import rows", "import minitron.text.rows as rows", INSIDE])
def test_a_planted_circle_of_files_is_caught(tmp_path, line):
    graph = house.imports(planted(tmp_path, {"minitron/text/rows.py": "import minitron.text.blends", "minitron/text/blends.py": line}))
    assert set(house.circle(graph)) == {"minitron.text.rows", "minitron.text.blends"}


def test_no_rooms_import_each_other_in_a_circle():
    assert house.circle(house.rooms(house.imports(REPOSITORY))) == []


def test_a_planted_circle_of_rooms_is_caught_where_no_files_make_one(tmp_path):
    files = {"minitron/text/a.py": "import minitron.walk.b", "minitron/walk/b.py": "", "minitron/walk/c.py": "import minitron.text.a"}
    graph = house.imports(planted(tmp_path, files))
    assert house.circle(graph) == [] and set(house.circle(house.rooms(graph))) == {"text", "walk"}


def test_the_walk_imports_no_stage():
    graph = house.imports(REPOSITORY)
    assert [name for name, targets in graph.items() if house.room_of(name) != "stages" and "stages" in map(house.room_of, targets)] == []


def test_the_page_draws_the_rooms_and_arrows_that_the_code_has():
    page = house.PAGE.read_text(encoding="utf-8")
    assert house.page_with(page, house.picture(house.rooms(house.imports(REPOSITORY)))) == page, "make house draws it anew"


def test_a_new_arrow_between_rooms_changes_the_page():
    graph = house.rooms(house.imports(REPOSITORY))
    assert house.picture({**graph, "report": graph["report"] | {"machine"}}) != house.picture(graph)


def test_what_is_installed_has_every_folder_of_the_code():
    listed = set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"])
    there = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in modules(REPOSITORY) if path.name == "__init__.py"}
    assert there - listed == set() and listed - there == {"minitron.conf", "minitron.tiny_teacher"}  # which hold no code


def full_folders(root: Path) -> list[str]:
    """Folders of the packages, beside stages/, with more than 16 modules."""
    folders = {path.parent for path in modules(root)} - {root / "minitron" / "stages"}
    return [folder.relative_to(root).as_posix() for folder in sorted(folders) if len([*folder.glob("*.py")]) - 1 > MOST_MODULES]


def test_no_folder_is_fuller_than_16_modules():
    assert full_folders(REPOSITORY) == []


def test_a_seventeenth_module_is_caught(tmp_path):
    names = [f"module_{number}" for number in range(17)] + ["__init__"]
    root = planted(tmp_path, {f"minitron/{folder}/{name}.py": "" for name in names for folder in ("stages", "text")})
    assert full_folders(root) == ["minitron/text"]


def rooms_without_a_word(root: Path) -> list[str]:
    """Folders whose __init__.py is anything but a paragraph that says what belongs in them."""
    files = [folder / "__init__.py" for folder in sorted({path.parent for path in modules(root)})]
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    return [file.relative_to(root).as_posix() for file, tree in trees.items() if len(tree.body) != 1 or len(ast.get_docstring(tree) or "") < 80]


def test_every_room_says_what_belongs_in_it_and_nothing_else():
    assert rooms_without_a_word(REPOSITORY) == []


@pytest.mark.parametrize("text", ["", '"""Rows."""', f'"""{"What belongs here. " * 6}"""\n\nfrom minitron.text.rows import SplitRows'])
def test_a_room_without_a_word_or_that_hands_names_on_is_caught(tmp_path, text):
    assert rooms_without_a_word(planted(tmp_path, {"minitron/text/__init__.py": text})) == ["minitron/text/__init__.py"]


def only_hand_on(root: Path) -> list[str]:
    """Modules that do nothing but import names for others."""
    handing = (ast.Import, ast.ImportFrom, ast.Expr)
    bodies = {path: ast.parse(path.read_text(encoding="utf-8")).body for path in modules(root) if path.name != "__init__.py"}
    passes = {path for path, body in bodies.items() if all(isinstance(node, handing) or "__all__" in ast.dump(node) for node in body)}
    return [path.relative_to(root).as_posix() for path in sorted(passes)]


def test_no_module_only_hands_names_on():
    assert only_hand_on(REPOSITORY) == []


def test_a_module_that_only_hands_names_on_is_caught(tmp_path):
    text = '"""Rows."""\nfrom minitron.text.rows import SplitRows\n__all__ = ["SplitRows"]'
    assert only_hand_on(planted(tmp_path, {"minitron/rows.py": text, "minitron/text/rows.py": "SplitRows = 1"})) == ["minitron/rows.py"]


@pytest.mark.parametrize(("packages", "loads"), [(("memory_budget", "nas"), False), (("distill",), True)])
def test_only_the_packages_that_compute_with_tensors_load_torch(packages, loads, environment):
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in modules(REPOSITORY) if path.parts[-2] in packages]
    names = [name for name in names if not name.endswith("__main__")]
    assert len(names) > 4
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(loads)


def leaves(dataclass: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """(dotted name, field) of every setting that holds a value."""
    types = typing.get_type_hints(dataclass)
    for field in dataclasses.fields(dataclass):
        if dataclasses.is_dataclass(types[field.name]):
            yield from leaves(types[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def commented_keys(path: Path) -> dict[str, str]:
    """Dotted key → the comment after it, for every leaf of a YAML file; "" where there is none."""
    text = path.read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}

    def visit(node: yaml.Node, prefix: str, end: yaml.Mark | None) -> None:
        for key, value in node.value:
            name, mark = f"{prefix}{key.value}", end or value.end_mark
            if isinstance(value, yaml.MappingNode) and value.value:
                visit(value, f"{name}.", (end or value.end_mark) if value.flow_style else None)
            else:
                mark = mark if mark.column else value.start_mark
                found[name] = lines[mark.line][mark.column :].partition("#")[2].strip()

    visit(yaml.compose(text), "", None)
    return {key: comment for key, comment in found.items() if key.split(".")[0] not in ("defaults", "hydra")}


SETTINGS = dict(leaves(Settings))
FREE_KEYS = ("search.floors.", "scoring.ceilings.", "search.weights.", "search.protect_experts.")  # mappings with keys of their own


def test_every_setting_stands_in_run_yaml_with_a_comment():
    comments = commented_keys(REPOSITORY / "conf" / "run.yaml")
    said = {name: [comment for key, comment in comments.items() if key == name or key.startswith(f"{name}.")] for name in SETTINGS}
    assert [name for name in SETTINGS if not said[name] or min(map(len, said[name])) < 3] == []


def test_a_setting_without_a_comment_is_caught(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: 1  # one\nb:\n  c: 2\n  d: {e: 1, f: '#'}\n  g: {h: 3}  # three\n")
    assert commented_keys(path) == {"a": "one", "b.c": "", "b.d.e": "", "b.d.f": "", "b.g.h": "three"}


CONF_FILES = sorted(path for path in (REPOSITORY / "conf").rglob("*.yaml") if path.parent.name != "accelerate")  # it has keys of its own


@pytest.mark.parametrize("path", CONF_FILES, ids=lambda path: path.stem)
def test_every_key_of_a_conf_file_is_a_setting(path):
    unknown = [key for key in commented_keys(path) if key not in SETTINGS and not key.startswith(FREE_KEYS)]
    assert unknown == [] and commented_keys(path)


def test_what_conf_calls_how_is_what_the_keys_leave_out():
    comments = commented_keys(REPOSITORY / "conf" / "run.yaml")
    said = {name for name, comment in comments.items() if "(how)" in comment}
    assert said == {name for name, field in SETTINGS.items() if field.metadata.get("how")} != set()


def long_files(root: Path, most: int) -> list[str]:
    paths = [path for folder in (*PACKAGES, "conf", "benchmarks") for path in (root / folder).rglob("*") if path.suffix in (".py", ".yaml")]
    assert len(paths) > 40
    return [f"{path}: {lines}" for path in paths if (lines := len(path.read_text(encoding="utf-8").splitlines())) > most]


def test_no_file_is_longer_than_400_lines():
    assert long_files(REPOSITORY, MOST_LINES) == []


def test_a_long_file_is_caught():
    assert long_files(REPOSITORY, 200)


@pytest.mark.parametrize("name", ["utils", "common", "helpers"])
def test_no_module_is_named_for_nothing(name):
    assert not [path for path in modules(REPOSITORY) if path.stem == name]
