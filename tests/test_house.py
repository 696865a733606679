"""The arrows between the packages, and the settings' one place, held by walking the code."""

import ast
import dataclasses
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from minitron.settings.run import Settings

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("memory_budget", "nas", "distill", "minitron")
# What each package may import of the house, and of the world (None: anything).
ALLOWED = {
    "memory_budget": ({"memory_budget"}, set()),
    "nas": ({"nas", "memory_budget"}, {"numpy"}),
    "distill": ({"distill"}, None),
    "minitron": (set(PACKAGES), None),
}
ONLY_IN = {"hydra": "minitron/run.py", "omegaconf": "minitron/run.py", "wandb": "minitron/walk/tracking.py"}
MOST_LINES = 400


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
            if bad_house or bad_world or name == "." or ONLY_IN.get(name, file) != file:
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
FREE_KEYS = ("search.floors.", "scoring.ceilings.", "search.weights.")  # mappings with keys of their own


def test_every_setting_stands_in_run_yaml_with_a_comment():
    comments = commented_keys(REPOSITORY / "conf" / "run.yaml")
    said = {name: [comment for key, comment in comments.items() if key == name or key.startswith(f"{name}.")] for name in SETTINGS}
    assert [name for name in SETTINGS if not said[name] or min(map(len, said[name])) < 3] == []


def test_a_setting_without_a_comment_is_caught(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: 1  # one\nb:\n  c: 2\n  d: {e: 1, f: '#'}\n  g: {h: 3}  # three\n")
    assert commented_keys(path) == {"a": "one", "b.c": "", "b.d.e": "", "b.d.f": "", "b.g.h": "three"}


CONF_FILES = sorted(path for path in (REPOSITORY / "conf").rglob("*.yaml") if path.parent.name not in ("accelerate", "sweeps"))  # they have keys of their own


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
