"""The documents held to the code: reference pages, links, the site's pages, and every command as far as its arguments can be read."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from memory_budget.command.options import build_parser
from minitron import api
from minitron.door.python import settings_from
from minitron.settings.run import Stage
from minitron.settings.teachers import STORED_FOLDER
from minitron.settings.words import for_hydra

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
EXPERIMENTS = [path.stem for path in (REPOSITORY / "conf" / "experiment").glob("*.yaml")]


def script(path: Path):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference, pictures = script(DOCS / "reference.py"), script(DOCS / "pictures" / "draw.py")


# ------------------------------------------------------------------------------------------------------ reference pages


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_reference_page_is_what_the_code_says(name):
    assert reference.PAGES[name]() == (DOCS / name).read_text(encoding="utf-8"), "make house makes it anew"


# What others rely on beside settings, stages, experiments and minitron.api.
TARGETS = ("install", "demo", "real", "test", "docs", "docs-check", "vllm-check", "llamacpp-check", "gpu-stand-in", "soak", "fuzz", "gpu-check")
OPTIONS = ("--context", "--batch", "--weights", "--kv", "--ssm", "--budget", "--engine", "--tp", "--json", "--activations", "--pool-gib", "--device-gib",
           "--utilization", "--overhead-gib", "--prefix-caching")  # fmt: skip


def required() -> dict[str, set[str]]:
    """What must stand in each reference page."""
    rows = {stage.value for stage in Stage if stage is not Stage.all} | set(EXPERIMENTS) | set(OPTIONS) | {f"make {name}" for name in TARGETS}
    functions = {f"### api.{name}\n" for name in api.__all__}
    return {"settings.md": {f"| `{name}` |" for name, _ in reference.setting_fields()}, "reference.md": {f"| `{row}` |" for row in rows} | functions}


def missing(page: str, wanted: set[str]) -> list[str]:
    return sorted(one for one in wanted if one not in page)


@pytest.mark.parametrize("name", ["settings.md", "reference.md"])
def test_every_setting_stage_experiment_command_and_function_is_there(name):
    assert len(required()[name]) > 60
    assert missing((DOCS / name).read_text(encoding="utf-8"), required()[name]) == []


def test_one_that_is_not_there_is_caught(monkeypatch):
    """A setting that no task has, and rows taken out of the pages."""
    monkeypatch.setattr(reference, "TASKS", reference.TASKS[1:])
    assert "| `seed` |" in missing(reference.settings_page(), required()["settings.md"])
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    poorer = page.replace("| `verify` |", "|").replace("### api.search\n", "").replace("| `nano2` |", "|").replace("| `--tp` |", "|")
    assert missing(poorer, required()["reference.md"]) == ["### api.search\n", "| `--tp` |", "| `nano2` |", "| `verify` |"]


# --------------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """What a page's headings are linked by."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def dead_links(pages: list[Path]) -> list[str]:
    """`page: link` of every link to a file or a heading that is not there."""
    found = []
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8"))):
            place, _, heading = link.partition("#")
            target = (page.parent / place).resolve() if place else page
            if not re.match(r"[a-z]+:", link) and (not target.exists() or (heading and target.suffix == ".md" and heading not in anchors(target))):
                found.append(f"{page.name}: {link}")
    return found


def in_navigation(entries: list) -> Iterator[str]:
    for entry in entries:
        value = entry if isinstance(entry, str) else next(iter(entry.values()))
        yield from [value] if isinstance(value, str) else in_navigation(value)


def orphans(pages: list[Path], navigation: list) -> list[str]:
    listed = set(in_navigation(navigation))
    return [page.relative_to(DOCS).as_posix() for page in pages if page.is_relative_to(DOCS) and page.relative_to(DOCS).as_posix() not in listed]


@pytest.fixture(scope="module")
def navigation() -> list:
    return yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


def test_no_link_is_dead():
    assert dead_links(PAGES) == []


def test_every_page_is_in_the_sites_navigation(navigation):
    assert orphans(PAGES, navigation) == [] and len(PAGES) > 20


def test_dead_links_and_a_page_that_nothing_leads_to_are_caught(tmp_path, navigation):
    (tmp_path / "a.md").write_text("# One, two\n[a](#one-two) [b](b.md) [c](a.md#three) `[d](d.md)` [e](https://example.org/e)\n")
    assert dead_links([tmp_path / "a.md"]) == ["a.md: b.md", "a.md: a.md#three"]
    assert orphans([DOCS / "own_model.md", DOCS / "notes" / "planted.md"], navigation) == ["notes/planted.md"]


def built(root: Path, site: Path) -> subprocess.CompletedProcess:
    """`make docs` of the documents in a folder, with the Makefile's options, by the mkdocs of this environment."""
    (options,) = re.findall(r"bin/mkdocs build (.*)", (REPOSITORY / "Makefile").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "mkdocs", "build", *options.split(), "--config-file", str(root / "mkdocs.yml"), "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)


def asked_of_others(page: str) -> list[str]:
    """What a browser would fetch from elsewhere when it shows a page."""
    return re.findall(r"""<(?:script|img|link|iframe|source)\b[^>]*(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""", page)


def test_the_site_is_built_and_asks_nothing_of_others_at_reading(tmp_path):
    finished = built(REPOSITORY, tmp_path / "site")
    assert finished.returncode == 0, finished.stderr
    pages = [*(tmp_path / "site").rglob("*.html")]
    assert len(pages) > len(PAGES) and "Concepts with pictures" in (tmp_path / "site" / "index.html").read_text()
    assert {place for page in pages for place in asked_of_others(page.read_text())} == set()
    assert asked_of_others('<script src="https://example.org/a.js"></script><img src="//example.org/b.png"><img src="c.png">') != []


DEAD = ("[a](nowhere.md)", "[a](index.md#nothing)", "![a](never.svg)")


def test_dead_links_end_the_build_by_the_sites_own_rules(tmp_path):
    """Of one page without the theme: the rules are what is tried. A page without them, the control, is built."""
    config = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    rules = {name: config[name] for name in ("site_name", "docs_dir", "strict", "validation", "markdown_extensions")}
    for name, links in (("dead", DEAD), ("alive", ("[a](index.md)",))):
        (tmp_path / name / "docs").mkdir(parents=True)
        (tmp_path / name / "mkdocs.yml").write_text(yaml.safe_dump(rules | {"plugins": []}))
        (tmp_path / name / "docs" / "index.md").write_text("\n\n".join(["# Page", *links]))
    dead, alive = (built(tmp_path / name, tmp_path / "site") for name in ("dead", "alive"))
    assert dead.returncode == 1 and len(_warnings(dead)) == 3 and all(link in dead.stderr for link in ("nowhere.md", "index.md#nothing", "never.svg"))
    assert alive.returncode == 0 and _warnings(alive) == []


def _warnings(finished: subprocess.CompletedProcess) -> list[str]:
    return [line for line in finished.stderr.splitlines() if line.startswith("WARNING")]


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_what_its_script_draws_and_stands_by_itself(name):
    drawn = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == pictures.drawn(name), "docs/pictures/draw.py draws it anew"
    assert re.findall(r"https?://[^\"]*", drawn) == ["http://www.w3.org/2000/svg"] and "href" not in drawn and "@import" not in drawn
    assert f"](pictures/{name}.svg)" in (DOCS / "concepts.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ commands

COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(python|make|accelerate|vllm|pip)\b.*")
PLACEHOLDERS = ("MODEL", "model", "DIR", "DIR_OR_HUB_ID", "downloaded")  # for a model's folder; ID, NAME, OWNER/NAME and … stand for others
VLLM_SERVE = {"--served-model-name", "--mamba_ssm_cache_dtype", "--max-model-len", "--host", "--port"}  # vllm is not in this environment


def commands(page: Path) -> Iterator[str]:
    """Lines of code blocks, fenced or indented, that are commands; those that end in a backslash with what follows, those joined by & one by one."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^ {4}(\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    for line in [*(line for block in fenced for line in block.splitlines()), *indented]:
        typed = (one.strip().removeprefix("$ ") for one in re.split(r" & ", line))
        yield from (one for one in typed if COMMAND.fullmatch(one))


COMMANDS = [(page.relative_to(REPOSITORY).as_posix(), command) for page in PAGES for command in commands(page)]


def check(command: str, *, composes: bool = False) -> None:
    """Raises ValueError, or the exit of a parser, for a command that its program would not read; `composes` has settings of minitron.run composed too."""
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program in ("python", "accelerate"):
        {"python": _python, "accelerate": _accelerate}[program](rest, composes)
    else:
        {"make": _make, "vllm": _vllm, "pip": _pip}[program](rest)


def _python(rest: list[str], composes: bool) -> None:
    if rest[:2] == ["-m", "minitron.run"]:
        _run(rest[2:], composes)
    elif rest[:2] == ["-m", "memory_budget"]:
        build_parser().parse_args([word.strip("[]") for word in rest[2:]])
    elif rest[:2] == ["-m", "minitron.serving"]:
        from minitron.serving.__main__ import _parser

        _parser().parse_args(rest[2:])
    elif rest[0] == "-c":
        compile(rest[1], "-c", "exec")
    elif rest[0] == "-":
        pass  # the program follows, up to EOF
    elif rest[0] == "-m":
        raise ValueError(f"{rest[1]} is no command of the house")
    else:
        file = REPOSITORY / rest[0] / "__main__.py" if (REPOSITORY / rest[0]).is_dir() else REPOSITORY / rest[0]
        text = file.read_text(encoding="utf-8")
        if unknown := [word for word in rest if word.startswith("--") and word.partition("=")[0] not in text]:
            raise ValueError(f"{rest[0]} has no {unknown}")


def _run(rest: list[str], composes: bool) -> None:
    """The settings are composed, a fifth of a second each, with the tiny teacher in place of a model that is not here; or only their names are looked at."""
    words = for_hydra([word for word in rest if word not in ("--cfg", "job", "--help", "key=value")])
    OverridesParser.create().parse_overrides([word for word in words if "=" in word or word.startswith("~")])
    for word in words:
        name, _, value = word.partition("=")
        there = {"stage": list(Stage.__members__), "experiment": EXPERIMENTS}.get(name)
        if there and value not in there and "--config-dir" not in rest:
            raise ValueError(f"{word} is none of {there}")
    if composes and not {"-m", "--config-dir"} & set(rest):
        model = dict.fromkeys([*(f"teacher.path={name}" for name in PLACEHOLDERS), "teacher.gguf=model.gguf"], f"teacher.path={STORED_FOLDER}")
        model |= dict.fromkeys((f"base.path={name}" for name in PLACEHOLDERS), f"base.path={STORED_FOLDER}")
        asked = [model.get(word, word).replace("=benchmarks/", f"={REPOSITORY}/benchmarks/") for word in rest]
        settings_from([word for word in asked if word not in ("--cfg", "job", "--help", "key=value")])


def _make(rest: list[str]) -> None:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for word in rest:
        name, given, _ = word.partition("=")
        if not re.search(rf"^{re.escape(name)} \?=|\$\({name}\)" if given else rf"^{re.escape(name)}:", text, re.MULTILINE):
            raise ValueError(f"the Makefile has no {name}")


def _accelerate(rest: list[str], composes: bool) -> None:
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(rest[1:])
    if rest[0] != "launch" or not (REPOSITORY / options.config_file).exists() or options.training_script != "minitron.run":
        raise ValueError(f"{rest[0]} {options.config_file} {options.training_script}")
    _run(options.training_script_args, composes)


def _vllm(rest: list[str]) -> None:
    if rest[0] != "serve" or not {word for word in rest if word.startswith("--")} <= VLLM_SERVE:
        raise ValueError(f"vllm {rest}")


def _pip(rest: list[str]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for word in rest[1:]:
        own = re.fullmatch(r"(?:\.|minitron)\[(.*)\]", word)
        extras = set(own[1].split(",")) if own else set()
        if rest[0] != "install" or not extras <= set(project["optional-dependencies"]) or ("==" in word and word not in pins):
            raise ValueError(f"pip {rest}")


@pytest.fixture(autouse=True)
def quiet_torch(monkeypatch) -> None:
    """Composing looks at no GPU and no network."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")


def wrong_ones(page: str, *, composes: bool) -> dict[str, str]:
    wrong = {}
    for command in (command for of_page, command in COMMANDS if of_page == page):
        try:
            check(command, composes=composes)
        except (ValueError, SyntaxError, OSError, SystemExit) as error:
            wrong[command] = str(error)
    return wrong


PAGES_WITH_COMMANDS = sorted({page for page, _ in COMMANDS})


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_every_command_of_the_documents_can_be_read(page):
    assert wrong_ones(page, composes=False) == {}


@pytest.mark.slow  # make docs-check
@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_the_settings_of_every_command_go_together(page):
    assert wrong_ones(page, composes=True) == {}


@pytest.mark.slow
@pytest.mark.parametrize("words", ["teacher.path=MODEL", "budget=l4 distill.train.batch=0", "search.fixed.layers=many"])
def test_settings_that_do_not_go_together_are_caught(words):
    check(f"python -m minitron.run {words}")
    with pytest.raises(ValueError):
        check(f"python -m minitron.run {words}", composes=True)


def without_example(pages: list[Path]) -> list[str]:
    """Pages of the site, but for lab notes, without a command or a piece of Python to try."""
    return [page.name for page in pages if page.parent.name != "notes" and not list(commands(page)) and "```python" not in page.read_text(encoding="utf-8")]


def test_every_page_has_an_example():
    assert without_example(PAGES) == []


def test_a_page_without_an_example_is_caught(tmp_path):
    (tmp_path / "a.md").write_text("# A\nTo install, say make install.\n```json\n{}\n```\n")
    assert without_example([tmp_path / "a.md"]) == ["a.md"]


def test_there_are_commands_and_prose_is_none():
    assert len(COMMANDS) > 50 and not COMMAND.fullmatch("pythonic") and COMMAND.fullmatch("OMP_NUM_THREADS=1 python -m minitron.run")


@pytest.mark.parametrize("command", [
    "python -m minitron.run stage=prun", "python -m minitron.run distil.train.tokens=3", "python -m minitron.run -m search.hiden=3,4", "make demos",
    "make demo X=1", "python -m memory_budget DIR --contxt 3", "python -m minitron.serving hi --modell x", "vllm serve x --max-len 3",
    "pip install 'minitron[evals]'", "accelerate launch --config_file conf/accelerate/none.yaml -m minitron.run", "python benchmarks/none.py",
    "python benchmarks/gpu.py --nimutes 3", "python -m minitron.runs", "accelerate launch --config_file conf/accelerate/ddp.yaml -m minitron.run stage=no",
])  # fmt: skip
def test_a_command_that_cannot_be_read_is_caught(command):
    with pytest.raises((ValueError, OSError, SystemExit)):
        check(command)
