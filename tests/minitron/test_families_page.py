"""docs/families.md: its example runs and prints what it says; its table of axes is the code's."""

import re

import pytest

from memory_budget.hf_config import FAMILIES as COUNTED
from memory_budget.hf_config import architecture_from_config
from minitron.families.known import FAMILIES
from nas.axes import AXES, axes_of


@pytest.fixture(scope="module")
def page(repository) -> str:
    return (repository / "docs" / "families.md").read_text()


def test_the_example_runs_and_prints_what_is_said(page, snippet, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (said,) = re.findall(r"It prints `([^`]+)`", page)
    finished = snippet(tmp_path, example)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == said
    without_first = snippet(tmp_path, example.replace("in parts.layers:", "in parts.layers[1:]:"))  # the control
    assert without_first.returncode == 0 and without_first.stdout.strip() != said


def test_every_family_and_every_axis_is_on_the_page(page):
    first = page.split("## What can be cut")[0]
    assert all(f"`{name}`" in first for name in COUNTED) and set(FAMILIES) <= set(COUNTED)
    table = page.split("## What can be cut")[1].split("\n\n")[1]
    assert all(f"`{name}`" in table and f"{axis.letter}" in table for name, axis in AXES.items())


def test_a_model_of_blocks_has_the_axes_of_its_column(page):
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    in_column = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1]) if row.split("|")[4].strip() != "–"}
    assert in_column == set(axes_of(architecture_from_config({"model_type": "llama"}))) != set(AXES)
