"""Walks for teachers with experts by the real command, a compensated cut to the end and a plain one from streamed scores; and sizes that no such cut has."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.files import Checkpoint
from minitron.settings.teachers import STORED_FOLDER
from minitron.sources.embedded import topic_documents

SETTINGS = (
    "~experiment", "device=cpu", "run_name=own", "data.sequence_length=32", "data.max_train_tokens=4000", "data.max_heldout_tokens=2000",
    "workload.context_tokens=64", "budget.device_gib=1", "scoring.samples=8", "scoring.layer_samples=4", "search.screen_samples=4", "depth_lap.enabled=false",
    "prune.samples=16", "prune.direction_samples=4", "distill.train.tokens=512", "evaluate.samples=4", "evaluate.prompts=['import os']",
    "evaluate.new_tokens=4", "evaluate.speed=[{input_tokens: 8, output_tokens: 4, batch: 1}]", "evaluate.needle.lengths=[]", "search.finalists=1",
    "screen.train.tokens=256", "screen.prompt_tokens=8", "screen.new_tokens=4", "data.files=['texts/*.txt']",
)  # fmt: skip


@pytest.fixture(scope="module")
def teachers(build_tiny, write_checkpoint, tmp_path_factory) -> Path:
    """A folder with one of each family, and texts."""
    folder = tmp_path_factory.mktemp("experts")
    (folder / "texts").mkdir()
    for document in topic_documents():
        (folder / "texts" / f"{document.name.rpartition('/')[2]}.txt").write_text(document.text[:2000])
    for name, place in (("nemotron_h experts", "hybrid"), ("qwen3_moe", "blocks"), ("granite experts", "stacked")):
        one = build_tiny(name, vocab_size=2048)
        write_checkpoint(folder / place, one.model, one.config)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(STORED_FOLDER / file, folder / place / file)
    return folder


def test_a_walk_ends_in_a_student_with_fewer_and_smaller_experts(teachers, door):
    finished = door(teachers, *SETTINGS, "teacher.path=hybrid", "prune.method=compensated", "search.experts=[4]", "search.expert_ffn=[8,16]",
                    f"runs_folder={teachers / 'runs'}", "search.shared_ffn=[12]", "search.hidden=[24]", "search.layers=[4]",
                    "search.floors={attention: 1, moe: 2, ffn: 1}")  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    summary = json.loads((teachers / "runs" / "own" / "summary.json").read_text())
    models, (chosen,) = summary["models"], [one for one in summary["candidates"] if one["chosen"]]
    assert {one["id"] for one in summary["candidates"]} == {"L4-H24-F48-M8-E4-X8-S12", "L4-H24-F48-M8-E4-S12"} and chosen["short_distill_loss"] > 0
    folder = Path(models["student"]["path"])
    architecture, student = architecture_from_config(read_config(folder)), AutoModelForCausalLM.from_pretrained(folder)
    assert (architecture.moe_num_experts, architecture.moe_shared_ffn, architecture.pattern, architecture.moe_groups) == (4, 12, "*E-E", 2)
    assert student.num_parameters() == Checkpoint(folder).num_parameters == count_total_parameters(architecture) == models["student"]["parameters"]
    kl = {name: model["evaluation"]["kl_to_teacher_nats_per_token"] for name, model in models.items()}
    assert kl["teacher"] == 0 < kl["student"] < kl["pruned"]
    card, report = (Path(models["pruned"]["path"]) / "README.md").read_text(), (teachers / "runs" / "own" / "report.md").read_text()
    assert "routed experts 8 → 4" in card and "neurons of the shared expert 20 → 12" in card and "E experts" in card
    assert "| routed experts | 8 | 4 | −50.0 % |" in report and "E experts" in report


def test_of_experts_those_of_the_highest_scores_stay_and_of_each_its_own_neurons(teachers, door):
    finished = door(teachers, *SETTINGS, "teacher.path=blocks", "runs_folder=sliced", "scoring.placement=stream", "stage=prune",
                    "search.fixed={experts: 3, expert_ffn: 8}", "search.protect_experts={1: [0]}")  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    (plan,), (ranking,) = ((teachers / "sliced" / "store").glob(place) for place in ("prune/*/plan.json", "score/*/ranking.jsonl"))
    units, checkpoint, teacher = json.loads(plan.read_text())["units"], Checkpoint(plan.parent / "checkpoint"), Checkpoint(teachers / "blocks")
    lines = [json.loads(line) for line in ranking.read_text().splitlines()]
    assert [line["layer"] for line in lines] == [1, 3]
    for layer, ranked in ((line["layer"], line["experts"]) for line in lines):
        best = [0] * (layer == 1) + [expert for expert in ranked if (layer, expert) != (1, 0)]
        kept = units["expert"][str(2 * layer + 1)]
        assert kept == sorted(best[:3])
        for place, expert in enumerate(kept):
            neurons = units["expert_ffn"][str((2 * layer + 1) * 5 + expert)]
            down, before = (of.read(f"model.layers.{layer}.mlp.experts.{one}.down_proj.weight") for of, one in ((checkpoint, place), (teacher, expert)))
            assert torch.equal(down, before[:, neurons])
        router, whole = (of.read(f"model.layers.{layer}.mlp.gate.weight") for of in (checkpoint, teacher))
        assert torch.equal(router, whole[kept])


def test_a_granites_sizes_follow_from_its_kv_heads_and_stacks_stay_stacks(teachers, door):
    finished = door(teachers, *SETTINGS, "teacher.path=stacked", "runs_folder=granite", "scoring.placement=stream", "prune.method=compensated",
                    "stage=prune", "search.fixed={layers: 3, key_value_heads: 2, experts: 3, expert_ffn: 8, shared_ffn: 12}")  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    (folder,) = (teachers / "granite" / "store").glob("prune/*/checkpoint")
    config, student = read_config(folder), AutoModelForCausalLM.from_pretrained(folder)
    architecture = architecture_from_config(config)
    sizes = (architecture.hidden, architecture.num_attention_heads, architecture.mamba_num_heads, architecture.moe_num_experts, architecture.moe_shared_ffn)
    assert sizes == (32, 4, 8, 3, 12) and set(config["layer_types"]) <= {"mamba", "attention"}
    assert student.num_parameters() == count_total_parameters(architecture) == Checkpoint(folder).num_parameters
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert list(stored.get_slice("model.layers.0.block_sparse_moe.input_linear.weight").get_shape()) == [3, 16, 32]


@pytest.mark.parametrize(("wrong", "said"), [
    ("search.experts=[7]", "experts to keep (7) must be a multiple of the 2 routing groups; nearest: 6, 8"),
    ("search.floors.moe=3", "search.floors keeps 3 layers of kind 'E'; the teacher has 2"),
    ("search.fixed.shared_ffn=0", "must be at least 1: a nemotron_h has a shared expert"),
])  # fmt: skip
def test_a_wrong_size_ends_the_command_in_one_line(wrong, said, teachers, door):
    finished = door(teachers, *SETTINGS, "teacher.path=hybrid", wrong, "runs_folder=wrong", "stage=search")
    assert finished.returncode == 2 and len(finished.error_lines) == 1 and said in finished.error_lines[0], finished.stderr
    assert not (teachers / "wrong" / "store" / "score").exists()
