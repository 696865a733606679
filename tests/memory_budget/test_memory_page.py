"""docs/memory.md, and docs/serving.md where it has the same command: their examples print what they show."""

import re
import shlex
from pathlib import Path

import pytest

from memory_budget.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("memory.md", "serving.md")}
EXAMPLES = [one for page in PAGES.values() for one in re.findall(r"^```\n\$ python -m memory_budget (.*?)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)]


@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_an_example_prints_what_the_page_shows(command, shown, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(shown) > 100 and [line for line in shown.splitlines() if line != "…" and line not in printed] == []


def test_there_are_examples():
    assert len(EXAMPLES) >= 5 and "$ python -m memory_budget" in PAGES["serving.md"]
