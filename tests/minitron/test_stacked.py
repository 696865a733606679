"""Experts that a file has stacked: read one by one, written as transformers writes them, and a walk that writes them interrupted and gone on with."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from memory_budget.hf_config import read_config
from minitron.checkpoints.files import Checkpoint, PlannedTensor
from minitron.checkpoints.placement import StreamedModel
from minitron.checkpoints.shards import save_model_weights, write_weights
from minitron.checkpoints.stacked import parts_of, stack_of
from minitron.families.base import EXPERT
from minitron.families.config_json import transformers_config
from minitron.families.state import model_tensors
from minitron.pruning.basis import Basis
from minitron.pruning.compensated_cut import MadeWeights
from minitron.pruning.disk_to_disk import planned_tensors
from minitron.pruning.plan import PruningPlan, Recipe
from minitron.walk.store import write_json

pytestmark = pytest.mark.parametrize("one", ["granite experts"], indirect=True)
MOE = "model.layers.0.block_sparse_moe"


def test_parts_tell_where_they_lie_and_where_they_belong(one):
    parts = parts_of(f"{MOE}.input_linear.weight", (3, 10, 4))
    assert [stack_of(name) for name, _, _ in parts] == [(f"{MOE}.input_linear.weight", expert, place) for expert in range(3) for place in range(2)]
    assert [(shape, first) for _, shape, first in parts] == [((5, 4), 20 * number) for number in range(6)]
    for name, shape in ((f"{MOE}.input_linear.weight", (10, 4)), ("model.layers.0.shared_mlp.input_linear.weight", (10, 4))):
        assert parts_of(name, shape) == []
    assert stack_of("model.layers.0.mlp.experts.3.gate_proj.weight") is None is stack_of("model.layers.0.block_sparse_moe.experts.3.w1.weight")


@torch.no_grad()
def test_a_folder_that_transformers_saved_is_read_expert_by_expert_and_written_again_as_it_was(one, keep_all, tmp_path):
    theirs = type(one.model)._from_config(transformers_config(one.config))
    theirs.save_pretrained(tmp_path / "theirs")
    stored, checkpoint = load_file(tmp_path / "theirs/model.safetensors"), Checkpoint(tmp_path / "theirs")
    gate_up, neurons = stored[f"{MOE}.input_linear.weight"], one.architecture.moe_ffn
    for expert in range(one.architecture.moe_num_experts):
        assert torch.equal(checkpoint.read(f"{MOE}.experts.{expert}.gate_proj.weight"), gate_up[expert, :neurons])
        assert torch.equal(checkpoint.read(f"{MOE}.experts.{expert}.up_proj.weight"), gate_up[expert, neurons:])
        assert torch.equal(checkpoint.read(f"{MOE}.experts.{expert}.down_proj.weight"), stored[f"{MOE}.output_linear.weight"][expert])
    assert not any("input_linear" in name and "block_sparse_moe" in name for name in checkpoint.entries)
    (tmp_path / "ours").mkdir()
    write_weights(tmp_path / "ours", planned_tensors(one.family, keep_all(one.architecture), checkpoint), max_shard_bytes=30_000)
    again = {name: tensor for path in (tmp_path / "ours").glob("model-*.safetensors") for name, tensor in load_file(path).items()}
    assert again.keys() == stored.keys() and all(torch.equal(tensor, stored[name]) for name, tensor in again.items())


def test_nothing_cut_is_the_same_file_byte_for_byte(one, keep_all, write_checkpoint, tmp_path):
    before, after = write_checkpoint(tmp_path / "before", one.model, one.config), tmp_path / "after"
    after.mkdir()
    write_weights(after, planned_tensors(one.family, keep_all(one.architecture), Checkpoint(before)), max_shard_bytes=2**30)
    assert (after / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()


def test_a_stack_that_an_index_lists_and_no_shard_holds_is_named(one, write_checkpoint, tmp_path):
    folder = write_checkpoint(tmp_path, one.model, one.config, max_shard_bytes=30_000)
    Checkpoint(folder)
    index = (folder / "model.safetensors.index.json").read_text()
    assert f"{MOE}.input_linear.weight" in index and "experts.0" not in index
    (folder / "model.safetensors.index.json").write_text(index.replace(f"{MOE}.input_linear.weight", "model.layers.9.block_sparse_moe.input_linear.weight"))
    with pytest.raises(ValueError, match=r"tensor model\.layers\.9\.block_sparse_moe\.input_linear\.weight is listed"):
        Checkpoint(folder)


def test_a_stack_is_not_written_without_one_of_its_parts(one, tmp_path):
    state = {one.family.file_name(name): tensor for name, tensor in model_tensors(one.family, one.model).items()}
    save_model_weights(state, tmp_path, max_shard_bytes=2**30)
    del state[f"{MOE}.experts.1.up_proj.weight"]
    with pytest.raises(AssertionError, match=r"parts of model\.layers\.0\.block_sparse_moe\.input_linear\.weight lack"):
        save_model_weights(state, tmp_path, max_shard_bytes=2**30)
    odd = [PlannedTensor(f"{MOE}.experts.{expert}.down_proj.weight", "F32", (4, 2 + expert), list) for expert in range(2)]
    with pytest.raises(AssertionError, match="lack"):
        write_weights(tmp_path, odd, max_shard_bytes=2**30)


def test_a_compensated_walk_that_was_interrupted_goes_on_to_the_same_bits(one, token_ids, write_checkpoint, tmp_path):
    folder, sublayers = write_checkpoint(tmp_path / "base", one.model, one.config, dtype=torch.bfloat16), range(1, one.architecture.num_sublayers, 2)
    student = replace(one.architecture, moe_num_experts=3)
    plan = PruningPlan(one.architecture, student, tuple(range(student.num_layers)), {EXPERT: dict.fromkeys(sublayers, (0, 2, 3))})
    base = StreamedModel(one.family, folder, read_config(folder) | {"dtype": "float32"}, one.architecture, torch.device("cpu"))
    written, rows = tmp_path / "student", [token_ids(rows=8, tokens=60, seed=seed) for seed in (41, 42)]
    written.mkdir()

    def write() -> MadeWeights:
        made = MadeWeights(base, plan, rows, Basis(torch.eye(student.hidden)), Recipe(None), written)
        made.write(planned_tensors(one.family, plan, Checkpoint(folder)), max_shard_bytes=12_000)
        return made

    write()
    shards = {path: path.read_bytes() for path in sorted(written.glob("*.safetensors"))}
    of_experts = [path for path, stored in shards.items() if any(b"layers.1.block_sparse_moe." + name in stored for name in (b"input", b"output"))]
    assert len(of_experts) == 2, "readers and writers of a layer's experts apart"
    for gone in (of_experts, of_experts[:1], of_experts[1:]):
        for path in gone:
            path.unlink()
        made = write()
        assert {path: path.read_bytes() for path in shards} == shards and 0 < len(made.checksums) < len(made.stored)
    config = one.family.hf_config(read_config(folder), plan.student)
    write_json(written / "config.json", config)
    assert "equal" in made.check(config)
