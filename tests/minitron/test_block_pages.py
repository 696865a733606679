"""A Llama's and a Qwen3's student by the command that users give, and what a person reads of it: page, cards, summary, export."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.families.known import FAMILIES

TIED = {"llama": True, "qwen3": False}


@pytest.fixture(scope="module", params=TIED)
def run(request, write_teacher, small_block_settings, door, tmp_path_factory) -> tuple[str, Path]:
    """(family, run folder) of a finished walk with its export."""
    family, place = request.param, tmp_path_factory.mktemp(request.param)
    teacher = write_teacher(place / "teacher", family, tied=TIED[family])
    for stage in ("all", "export"):
        finished = door(place, f"teacher.path={teacher}", "run_name=blocks", *small_block_settings, f"stage={stage}")
        assert finished.returncode == 0, finished.stderr
    (place / "exported.txt").write_text(finished.stdout)
    return family, place / "runs" / "blocks"


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_layers_of_the_summary_are_blocks(run):
    summary = summary_of(run[1])
    importance, chosen = summary["importance"], summary["candidates"][0]
    assert len(importance["first_round_scores"]) == 4 and None not in importance["first_round_scores"]
    assert sorted([*summary["removed_layers"], *chosen["kept_layers"]]) == [0, 1, 2, 3]
    assert set(importance["width_curves"]["hidden"]) == {str(sublayer) for sublayer in range(9)}  # by sublayer: two a block, and the last norm


def test_the_page_counts_blocks_and_shows_what_was_cut(run):
    page = (run[1] / "report.md").read_text()
    (gone,) = summary_of(run[1])["removed_layers"]
    assert f"1 of 4 layers removed: {gone}. B is a block of attention and FFN." in page
    picture = dict(line.split("  ", 1) for line in re.search(r"^teacher  .*\n.*\n.*", page, re.MULTILINE)[0].splitlines())
    assert picture == {"teacher": "BBBB", "removed": " " * gone + "^", "student": ("B" * gone + " " + "BBB"[gone:]).rstrip()}
    rows = dict(re.findall(r"^\| ([^|]+) \| (\d[\d,]* \| \d[\d,]*) \|", page, re.MULTILINE))
    assert rows["layers (attention + FFN)"] == "4 | 3" and rows["KV heads"] == "2 | 1" and rows["query heads"] == "4 | 2"
    assert rows["FFN neurons"] == "192 | 128"
    assert "SSM" not in page and "Mamba" not in page and "*-*-" not in page.replace("\\", "")


def test_the_page_has_both_plots_of_importance(run):
    page = (run[1] / "report.md").read_text()
    assert (run[1] / "layer_importance.png").exists() and (run[1] / "width_importance.png").exists()
    assert "sorted, one line a layer, of hidden channels two" in page and "Layers without a bar" not in page


def test_every_axis_that_was_cut_is_in_the_cards(run):
    family, folder = run
    cut = "hidden 128 → 96, FFN 192 → 128, query heads 4 → 2, KV heads 2 → 1, layers 4 → 3. Removed layers (from 0): "
    for card in ((folder / "pruned" / "README.md").read_text(), (folder / "export" / "README.md").read_text()):
        assert cut in card
        assert "| layers | 3 blocks of attention and FFN |" in card and "2 query heads, 1 KV heads × 32" in card
        assert "Mamba" not in card and "Pattern letters" not in card and "mamba_ssm" not in card
        assert ("(tied)" in card) == TIED[family]


def test_the_teachers_headline_says_blocks(run):
    headline = summary_of(run[1])["stages"]["teacher"]["headline"]
    assert headline.endswith("parameters, 4 blocks of attention and FFN")


def test_transformers_and_vllm_take_the_export(run):
    record, said = json.loads((run[1] / "export" / "export.json").read_text()), (run[1].parents[1] / "exported.txt").read_text()
    assert "transformers takes all" in said and "vLLM takes all" in said
    expected = {("llama.cpp", "original_max_position_embeddings")} if run[0] == "llama" else set()  # scaled from 256, not from 8,192
    assert {(one["program"], one["field"]) for one in record["refused"]} == expected


def test_plain_transformers_loads_the_export_and_finds_the_student(run):
    family, folder = run
    ids = torch.arange(40).reshape(2, 20) * 7
    with torch.no_grad():
        exported, student, pruned = (
            load(path)(ids, use_cache=False).logits
            for load, path in ((AutoModelForCausalLM.from_pretrained, folder / "export"), (FAMILIES[family].load, folder / "student"),
                               (FAMILIES[family].load, folder / "pruned"))
        )  # fmt: skip
    assert torch.equal(exported, student) and not torch.equal(exported, pruned)
    assert AutoTokenizer.from_pretrained(folder / "export").decode([300]) != ""
