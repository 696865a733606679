"""docs/families.md: its example runs, prints what it says and is a family like the others; its tables of families and axes are the code's."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from transformers import AutoModelForCausalLM

from memory_budget import architecture, hf_config
from minitron.families.known import FAMILIES
from nas.axes import AXES, axes_of


@pytest.fixture(scope="module")
def page(repository) -> str:
    return (repository / "docs" / "families.md").read_text()


@pytest.fixture
def run(monkeypatch):
    """Runs code and gives its names and what it printed; the families that it adds are gone when the test is."""

    def ran(code: str) -> tuple[dict, str]:
        monkeypatch.setattr(architecture, "BLOCK_TYPES", architecture.BLOCK_TYPES)
        monkeypatch.setattr(hf_config, "FAMILIES", dict(hf_config.FAMILIES))
        names, printed = {"__name__": "example"}, StringIO()
        with redirect_stdout(printed):
            exec(compile(code, "docs/families.md", "exec"), names)
        return names, printed.getvalue().strip()

    return ran


@pytest.fixture(scope="module")
def example(page) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    return code


def test_the_example_runs_and_prints_what_is_said(page, example, run):
    (said,) = re.findall(r"It prints `([^`]+)`", page)
    assert run(example)[1] == said
    assert run(example.replace("in parts.layers:", "in parts.layers[1:]:"))[1] != said, "the control"


def test_a_flag_that_is_read_wrong_is_noticed(example, run):
    with pytest.raises(ValueError, match=r"q_proj.bias is in the checkpoint, but config.json describes a model without it \(attention_input_bias is false\)"):
        run(example.replace('"attention_bias", True', '"attention_bias", False'))


def test_transformers_loads_its_student_with_the_same_logits(example, run, tmp_path):
    names, _ = run(example)
    cut, ids = names["cut"], names["ids"]
    cut.save_pretrained(tmp_path)
    config = names["FAMILY"].hf_config(names["TINY"], names["student"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, cut(ids).logits)
    assert type(loaded).__name__ == "SeedOssForCausalLM" and hf_config.architecture_from_config(config) == names["student"]


HYBRID = {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}
WITH_ALL_KINDS = {"nemotron_h": [{"hybrid_override_pattern": "ME*-"}], "qwen3_moe": [{"mlp_only_layers": [0]}],
                  "granitemoehybrid": [HYBRID, HYBRID | {"num_local_experts": 0}]}  # fmt: skip


def table(page: str, heading: str) -> tuple[list[set[str]], list[list[str]]]:
    """The first table behind a heading: the names in each cell of its head, and its other rows by cells."""
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in
                      next(part for part in page.split(f"{heading}\n")[1].split("\n\n") if part.strip().startswith("|")).strip().splitlines()]  # fmt: skip
    return [set(re.findall(r"`(\w+)`", cell)) for cell in head], rows


def test_every_family_is_on_the_page(page):
    rows = table(page, "# Families of models")[1]
    assert [row[0].strip("`") for row in rows] == list(FAMILIES) and set(FAMILIES) == set(hf_config.FAMILIES)
    for name, row in zip(FAMILIES, rows, strict=True):
        assert ("block" in row[2]) == (name in architecture.BLOCK_TYPES)
    named = {name for row in table(page, "## What is refused")[1] for name in re.findall(r"`(\w+)`", row[0])}
    assert named and named <= set(FAMILIES)


def test_every_family_has_the_axes_of_its_column(page):
    head, rows = table(page, "## What can be cut")
    assert [row[0].strip("`") for row in rows] == list(AXES) and [row[1] for row in rows] == [axis.letter for axis in AXES.values()]
    assert set().union(*head[2:]) == set(FAMILIES)
    for column, families in enumerate(head[2:], start=2):
        for family in families:
            own = WITH_ALL_KINDS.get(family, [{}])
            cut = {row[0].strip("`") for row in rows if row[column] != "–"}
            assert cut == {axis for one in own for axis in axes_of(hf_config.architecture_from_config({"model_type": family, **one}))}, family
