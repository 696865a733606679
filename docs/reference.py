"""The reference pages as conf/, the dataclasses and the docstrings have them: docs/settings.md and docs/reference.md.

`make house` writes them anew; tests/test_site.py holds them to the code.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from memory_budget.command.options import build_parser  # noqa: E402
from minitron.settings.run import Settings, Stage  # noqa: E402

CONF = REPOSITORY / "conf"
# The settings by what one wants to do: title, what stands above the table, and the settings, alone or by their groups.
TASKS = (
    ("What to run", "", ("stage", "candidate", "run_name", "runs_folder", "seed", "device", "check_inputs", "tracking", "followed", "plan")),
    ("Which model", "[own_model.md](own_model.md), [families.md](families.md)", ("teacher", "base")),
    ("What it must fit", "[own_model.md](own_model.md#the-budget), [memory.md](memory.md)", ("budget", "workload", "throughput")),
    ("Which text", "[text.md](text.md)", ("data",)),
    ("Scoring", "[internals.md](internals.md)", ("scoring",)),
    ("Searching", "[search.md](search.md)", ("search", "screen", "depth_lap")),
    ("Cutting", "[compensated.md](compensated.md)", ("prune",)),
    ("Distilling", "[distillation.md](distillation.md)", ("distill",)),
    ("Measuring", "[evaluation.md](evaluation.md), [reasoning.md](reasoning.md)", ("evaluate", "reasoning")),
    ("Generating text", "[serving.md](serving.md)", ("prompt", "checkpoint", "thinking", "thinking_budget", "generate")),
    ("Handing out, tidying up", "[serving.md](serving.md)", ("export", "card", "merge", "tidy")),
)
MADE = "<!-- made by `make house` -->\n"


def setting_fields(kind: type = Settings, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is a how) of every setting that holds a value."""
    types = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(types[field.name]):
            yield from setting_fields(types[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", bool(field.metadata.get("how"))


def comments(path: Path) -> dict[str, str]:
    """Dotted key → the comment after it, of groups too; lines that hold nothing but a comment further in than the line above has begun go on from it."""
    lines, found = path.read_text(encoding="utf-8").splitlines(), {}

    def after(mark: yaml.Mark) -> str:
        before, _, said = lines[mark.line][mark.column :].partition("#")
        column, texts, line = mark.column + len(before), [said.strip()], mark.line + 1
        while said and line < len(lines) and (more := re.fullmatch(r"( {12,})# ?(.*)", lines[line])) and abs(len(more[1]) - column) <= 2:
            texts.append(more[2].strip())
            line += 1
        return " ".join(texts)

    def above(mark: yaml.Mark) -> str:
        """A paragraph before a key; one line there is a heading."""
        first = mark.line
        while lines[first - 1].startswith(f"{' ' * mark.column}# "):
            first -= 1
        return " ".join(line.strip(" #") for line in lines[first : mark.line]) + " " if mark.line - first > 1 else ""

    def visit(node: yaml.Node, prefix: str, end: yaml.Mark | None) -> None:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            is_block = isinstance(value, yaml.MappingNode | yaml.SequenceNode) and not value.flow_style
            found[name] = above(key.start_mark) * (end is None) + after(end or (key.end_mark if is_block else value.end_mark))
            if isinstance(value, yaml.MappingNode):
                visit(value, f"{name}.", (end or value.end_mark) if value.flow_style else None)

    visit(yaml.compose("\n".join(lines)), "", None)
    return found


def flat(values: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted key and value of every leaf, and of every mapping."""
    for key, value in values.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")


def settings_page() -> str:
    """Every setting by task: its default, what it is for a model of one's own, whether it is a how, and what it means."""
    said, defaults = comments(CONF / "run.yaml"), dict(flat(yaml.safe_load((CONF / "run.yaml").read_text(encoding="utf-8"))))
    own, all_settings = dict(flat(yaml.safe_load((CONF / "experiment" / "own.yaml").read_text(encoding="utf-8")))), dict(setting_fields())
    parts = [MADE, "# Settings\n", SETTINGS_INTRODUCTION]
    for title, more, members in TASKS:
        names = [name for member in members for name in all_settings if name == member or name.startswith(f"{member}.")]
        above = f"## {title}\n\n" + (f"More: {more}.\n\n" if more else "") + _groups(members, said)
        rows = [f"| `{name}` | {_value(defaults[name])}{_own(own, name)} | {'how' if all_settings[name] else ''} | {_cell(said[name])} |" for name in names]
        parts.append(above + "\n".join(["| setting | default | | what it is |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


REFERENCE_INTRODUCTION = """\
Settings have a page of their own: [settings.md](settings.md). Whole commands by task: [recipes.md](recipes.md).

```
python -m minitron.run --help
```
"""
SETTINGS_INTRODUCTION = """\
Every setting, by what one wants to do. Give one as `name=value` behind `python -m minitron.run`, keep several in a file
([own_model.md](own_model.md#keeping-your-settings)), or give them [from Python](python.md).

```
python -m minitron.run teacher.path=MODEL budget=l4 --cfg job     # every setting with the value that it would have
```

**Default** is what holds with no experiment; behind *own*, what it is with `teacher.path=…` ([own_model.md](own_model.md)), where *follows* means
that it is worked out from the model and the budget.
**how** marks what changes no result and is in no stage's key: a finished stage stays finished when it changes.
"""


def _groups(members: tuple[str, ...], said: Mapping[str, str]) -> str:
    """What run.yaml says of whole groups."""
    groups = {name.split(".")[0] for name, _ in setting_fields() if "." in name}
    return "".join(f"{_cell(f'`{member}`: {said[member]}')}.\n\n" for member in members if member in groups and said[member])


def _value(value: object) -> str:
    """As YAML writes it."""
    if isinstance(value, int) and value >= 10_000:
        return f"`{value:_}`"
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return f"`{text.removesuffix(chr(10)).removesuffix('...').strip()}`"


def _own(own: Mapping[str, object], name: str) -> str:
    if name not in own:
        return ""
    return " · own: *follows*" if str(own[name]).startswith("${follows:") else f" · own: {_value(own[name])}"


def _cell(text: str) -> str:
    text = re.sub(r"\s+", " ", text.removeprefix("(how)")).strip().replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"(?<![\w/])docs/(\w+\.md)", r"[\1](\1)", text)


def _docstring(path: Path) -> str:
    return " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())


def reference_page() -> str:
    """Stages, experiments, make's targets, the options of python -m memory_budget, and what minitron.api has."""
    names = [stage.value for stage in Stage if stage is not Stage.all]
    stages = [f"| `{name}` | {_cell(_docstring(REPOSITORY / 'minitron' / 'stages' / f'{name}.py'))} |" for name in names]
    experiments = [f"| `{path.stem}` | {_cell(_first_comment(path))} |" for path in sorted((CONF / "experiment").glob("*.yaml"))]
    targets = [f"| `make {name}` | {_cell(text)} |" for name, text in make_targets().items() if text]
    options = [f"| `{' '.join(action.option_strings) or action.metavar}` | {_cell(action.help % vars(action))} |" for action in build_parser()._actions]
    tables = (
        ("Stages", "`python -m minitron.run stage=NAME`; stage=all, the default, walks those that make the student, and the report.", "stage", stages),
        ("Experiments", "`python -m minitron.run experiment=NAME`: settings kept together, in conf/experiment/. For yours see "
         "[own_model.md](own_model.md#keeping-your-settings).", "experiment", experiments),
        ("make", "Each target first sets up an environment of its own where it needs one.", "target", targets),
        ("python -m memory_budget", "What a model takes, without loading it: [memory.md](memory.md).", "option", options),
    )  # fmt: skip
    parts = [MADE, "# Commands and functions\n", REFERENCE_INTRODUCTION]
    for title, above, what, rows in tables:
        parts.append(f"## {title}\n\n{above}\n\n| {what} | what it does |\n|---|---|\n" + "\n".join(rows) + "\n")
    parts.append("## minitron.api\n\nShown at work in [python.md](python.md). `**asked` is an `Asked`, by name.\n\n" + "\n".join(api_entries()))
    parts.append("## Exit codes\n\n0 done · 2 your mistake, one line on stderr · 1 anything else that failed · 130 interrupted (the same command goes on).\n")
    return "\n".join(parts)


def _first_comment(path: Path) -> str:
    """The comment at a file's top, without what concerns Hydra alone, up to its first full stop or colon at a line's end."""
    lines = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines()[:12] if line.startswith("#") and "@package" not in line]
    return re.split(r"(?<=[.])\s|:$", " ".join(lines))[0]


def make_targets() -> dict[str, str]:
    """Every target that is a command, with the first sentence of the comment above it; "" for what is a part of another."""
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    names = [name for line in re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE) for name in line.split()]
    found = {}
    for name in names:
        above = re.search(rf"((?:^#.*\n)*)(?:^[A-Z_]+ [?:]?=.*\n)*^{re.escape(name)}:(?!=)", text, re.MULTILINE)
        comment = " ".join(line.lstrip("# ") for line in above[1].splitlines()) if above else ""
        found[name] = re.split(r"(?<=[.])\s", comment)[0]
    return found


def api_entries() -> Iterator[str]:
    """Name, call and docstring of whatever minitron.api hands out."""
    tree = ast.parse((REPOSITORY / "minitron" / "api.py").read_text(encoding="utf-8"))
    public = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")}
    for name in sorted(public, key=lambda name: (isinstance(public[name], ast.ClassDef), list(public).index(name))):
        node = public[name]
        if isinstance(node, ast.FunctionDef):
            call = f"({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
            call = re.sub(r"(: |-> )'(\w+)'", r"\1\2", call).replace("**asked: Unpack[Asked]", "**asked")
        else:
            call = f"({', '.join(ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign))})"
        yield f"### api.{name}\n\n```\n{name}{call}\n```\n\n{ast.get_docstring(node).replace('<', '&lt;')}\n"


PAGES = {"settings.md": settings_page, "reference.md": reference_page}


def main() -> int:
    for name, made in PAGES.items():
        (REPOSITORY / "docs" / name).write_text(made(), encoding="utf-8")
    print(f"{', '.join(f'docs/{name}' for name in PAGES)}: {len(dict(setting_fields()))} settings, {len(Stage) - 1} stages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
