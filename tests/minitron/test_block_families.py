"""Llama and Qwen3, tied and not, held against transformers' own models: what the families say of tensors, units, files and caches."""

import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from memory_budget.calculator import memory_report
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from memory_budget.workload import Workload
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.given import given_checkpoint
from minitron.checkpoints.shards import write_weights
from minitron.families.base import ATTENTION_HEAD, FFN, HIDDEN, KEY_VALUE_HEAD
from minitron.families.blocks import TABLE, transformers_config
from minitron.families.known import family_of
from minitron.families.state import model_tensors
from minitron.families.table import check_tensors, expected_shape, names_by_canonical, required_names, row_of
from minitron.pruning.cut import build_pruned, cut_state
from minitron.pruning.disk_to_disk import planned_tensors
from minitron.pruning.plan import PruningPlan

# The sizes of published config.json files, and the parameters that their safetensors hold.
LLAMA3 = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
PUBLISHED = {
    "Llama-3.2-1B": (1_235_814_400, LLAMA3 | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
                                              "tie_word_embeddings": True}),
    "Llama-3.1-8B": (8_030_261_248, LLAMA3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False}),
    "Qwen3-0.6B": (596_049_920, "qwen3-0.6b"),
    "Qwen3-8B": (8_190_735_360, "qwen3-8b"),
}  # fmt: skip


def shapes_of(family, model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model_tensors(family, model).items()}


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).abs().max() / right.abs().max()).item()


# The table of tensors.


def test_every_tensor_is_in_the_table_with_its_shape_and_counted(blocks):
    shapes = shapes_of(blocks.family, blocks.model)
    check_tensors(blocks.family, blocks.architecture, shapes)
    assert sum(map(math.prod, shapes.values())) == count_total_parameters(blocks.architecture) == blocks.model.num_parameters()
    assert shapes.keys() == set(required_names(blocks.family, blocks.architecture))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_tensors_of_the_table_and_their_published_number_of_parameters(name, repository):
    parameters, config = PUBLISHED[name]
    config = config if isinstance(config, dict) else read_config(repository / f"tests/memory_budget/configs/{config}.json")
    family, architecture = family_of(config), architecture_from_config(config)
    with torch.device("meta"):
        shapes = shapes_of(family, family.build(config))
    check_tensors(family, architecture, shapes)
    assert sum(map(math.prod, shapes.values())) == count_total_parameters(architecture) == parameters


def test_the_table_is_used_up_by_what_configs_can_ask_for(build_blocks):
    both = [build_blocks(name, num_hidden_layers=1) for name in ("llama untied", "qwen3 tied")]
    names = {re.sub(r"^layers\.\d+\.", "", name) for one in both for name in model_tensors(one.family, one.model)}
    assert names == {row.suffix for row in TABLE}


@pytest.mark.parametrize("sizes", [{"hidden": 40}, {"ffn": 57}, {"num_attention_heads": 12}, {"num_key_value_heads": 1}, {"attention_head_dim": 12}])
def test_a_model_of_another_size_is_refused(sizes, blocks):
    with pytest.raises(ValueError, match=r"tensor .* has shape"):
        check_tensors(blocks.family, replace(blocks.architecture, **sizes), shapes_of(blocks.family, blocks.model))


@pytest.mark.parametrize("flag", ["attention_input_bias", "attention_output_bias", "ffn_bias", "attention_qk_norm", "tied_embeddings"])
def test_a_tensor_that_config_json_denies_or_lacks_is_named(flag, blocks):
    other = replace(blocks.architecture, **{flag: not getattr(blocks.architecture, flag)})
    with pytest.raises(ValueError, match=r"is missing from the checkpoint|is in the checkpoint, but config.json describes a model without it"):
        check_tensors(blocks.family, other, shapes_of(blocks.family, blocks.model))


def test_file_names_are_those_of_the_model_and_come_back(blocks):
    names = [blocks.family.canonical_name(name) for name in blocks.model.state_dict()]
    assert [blocks.family.file_name(name) for name in names] == list(blocks.model.state_dict())


def test_walking_the_sublayers_gives_the_models_own_logits(blocks, token_ids, logits_of):
    parts = blocks.family.parts(blocks.model)
    with torch.no_grad():
        hidden = parts.embed(token_ids())
        for sublayer in parts.layers:
            hidden = sublayer(hidden)
        assert torch.equal(parts.head(parts.norm(hidden)), logits_of(blocks.model))
        assert len(parts.layers) == 8 == blocks.architecture.num_sublayers


# Symmetries: renaming units must not change what the model computes.


def shuffled(size: int, seed: int = 0) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    assert order != sorted(order)
    return tuple(order)


def reordered(blocks, keep_all, **orders):
    """The model with its units in other orders: of hidden one for all, of every other axis one for each sublayer that has it."""
    kinds = {FFN: "-", ATTENTION_HEAD: "*", KEY_VALUE_HEAD: "*"}
    units = {axis: {-1: order} if axis == HIDDEN else {layer: order for layer, kind in enumerate(blocks.architecture.pattern) if kind == kinds[axis]}
             for axis, order in orders.items()}  # fmt: skip
    changed = build_pruned(blocks.family, blocks.model, keep_all(blocks.architecture, **units), blocks.config)
    before, after = blocks.model.state_dict(), changed.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    return changed


def within(groups: list[int], per_group: int) -> tuple[int, ...]:
    """Query heads group by group in the order of the groups, inside each the first one last."""
    return tuple(group * per_group + index for group in groups for index in (*range(1, per_group), 0))


@pytest.mark.parametrize("axis", [HIDDEN, FFN, ATTENTION_HEAD, KEY_VALUE_HEAD])
def test_reordering_units_leaves_the_logits(axis, blocks, keep_all, logits_of):
    architecture, groups = blocks.architecture, blocks.architecture.num_key_value_heads
    per_group, turned = architecture.num_attention_heads // groups, [*range(1, groups), 0]
    orders = {
        HIDDEN: {HIDDEN: shuffled(48)},
        FFN: {FFN: shuffled(56)},
        ATTENTION_HEAD: {ATTENTION_HEAD: within(list(range(groups)), per_group)},
        KEY_VALUE_HEAD: {KEY_VALUE_HEAD: tuple(turned), ATTENTION_HEAD: within(turned, per_group)},
    }[axis]
    assert difference(logits_of(reordered(blocks, keep_all, **orders)), logits_of(blocks.model)) <= 1e-6


def test_query_heads_across_kv_heads_move_the_logits(blocks, keep_all, logits_of):
    assert difference(logits_of(reordered(blocks, keep_all, **{ATTENTION_HEAD: (5, 1, 2, 3, 4, 0)})), logits_of(blocks.model)) > 0.01


def test_kv_heads_without_their_query_heads_move_the_logits(blocks, keep_all, logits_of):
    order = (*range(1, blocks.architecture.num_key_value_heads), 0)
    assert difference(logits_of(reordered(blocks, keep_all, **{KEY_VALUE_HEAD: order})), logits_of(blocks.model)) > 0.01


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_neurons_reordered_in_one_of_their_matrices_alone_move_the_logits(name, blocks, keep_all, logits_of):
    changed = build_pruned(blocks.family, blocks.model, keep_all(blocks.architecture), blocks.config)
    weight = changed.model.layers[1].mlp.get_submodule(name).weight
    with torch.no_grad():
        weight.copy_(weight[:, list(shuffled(56))] if name == "down_proj" else weight[list(shuffled(56))])
    assert difference(logits_of(changed), logits_of(blocks.model)) > 0.01


# Cutting nothing, and files.


def test_a_plan_that_keeps_everything_is_bit_equal(blocks, keep_all, logits_of):
    state, heads = model_tensors(blocks.family, blocks.model), tuple(range(blocks.architecture.num_key_value_heads))
    for plan in (keep_all(blocks.architecture), keep_all(blocks.architecture, **{HIDDEN: {-1: tuple(range(48))}, KEY_VALUE_HEAD: {0: heads}})):
        cut = cut_state(blocks.family, plan, {blocks.family.file_name(name): tensor for name, tensor in state.items()})
        assert cut.keys() == state.keys() and all(torch.equal(cut[name], state[name]) for name in state)
    assert torch.equal(logits_of(build_pruned(blocks.family, blocks.model, keep_all(blocks.architecture), blocks.config)), logits_of(blocks.model))


@pytest.fixture(scope="module")
def student(blocks) -> PruningPlan:
    """One block of four goes, hidden channels, neurons, a KV head with its query heads; hidden stays a multiple of the query heads."""
    teacher = blocks.architecture
    groups, per_group = teacher.num_key_value_heads - 1, teacher.num_attention_heads // teacher.num_key_value_heads
    attention, ffn = ([layer for layer, kind in enumerate(teacher.pattern) if kind == letter] for letter in "*-")
    hidden = 10 * groups * per_group
    units = {HIDDEN: {-1: (*range(hidden - 4), *range(44, 48))}, FFN: dict.fromkeys(ffn, (*range(40), 50, 51)),
             KEY_VALUE_HEAD: dict.fromkeys(attention, tuple(range(1, groups + 1))),
             ATTENTION_HEAD: dict.fromkeys(attention, tuple(range(per_group, (groups + 1) * per_group)))}  # fmt: skip
    smaller = replace(teacher, pattern="*-" * 3, hidden=hidden, ffn=42, num_key_value_heads=groups, num_attention_heads=groups * per_group)
    return PruningPlan(teacher, smaller, (0, 1, 3), units)


@pytest.fixture(scope="module")
def written(blocks, student, tmp_path_factory, write_checkpoint):
    """The student's folder, cut from disk to disk."""
    source = write_checkpoint(tmp_path_factory.mktemp("teacher"), blocks.model, blocks.config)
    folder, config = tmp_path_factory.mktemp("student"), blocks.family.hf_config(read_config(source), student.student)
    write_weights(folder, planned_tensors(blocks.family, student, Checkpoint(source)), max_shard_bytes=20_000)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_written_student_has_the_planned_parameters(written, student):
    assert len(list(written.glob("*.safetensors"))) > 1
    assert Checkpoint(written).num_parameters == count_total_parameters(student.student) == given_checkpoint(written, "it")["parameters"]
    assert count_total_parameters(student.student) < 0.6 * count_total_parameters(student.teacher)


def test_transformers_own_class_loads_it_and_gives_the_logits_of_the_cut_in_memory(written, student, blocks, logits_of):
    loaded = AutoModelForCausalLM.from_pretrained(written, local_files_only=True).eval()
    built = build_pruned(blocks.family, blocks.model, student, blocks.config)
    assert torch.equal(logits_of(loaded), logits_of(built)) and torch.equal(logits_of(blocks.family.load(written)), logits_of(built))
    assert type(loaded).__name__ == blocks.config["model_type"].capitalize() + "ForCausalLM"
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == blocks.architecture.tied_embeddings


def test_its_config_json_says_every_size_and_is_read_back(written, student, blocks):
    config, architecture = read_config(written), student.student
    assert architecture_from_config(config) == architecture
    assert (config["num_hidden_layers"], config["head_dim"], config["hidden_size"]) == (3, blocks.architecture.attention_head_dim, architecture.hidden)
    assert config["tie_word_embeddings"] is blocks.architecture.tied_embeddings
    if blocks.config["model_type"] == "qwen3":
        assert config["layer_types"] == ["full_attention"] * 3 and AutoConfig.from_pretrained(written).layer_types == ["full_attention"] * 3


def test_without_head_dim_it_would_be_another_model(written, blocks):
    """Why it is always written: a loader takes hidden size over heads, or a number of its own."""
    config = {name: value for name, value in read_config(written).items() if name != "head_dim"}
    assert transformers_config(config).head_dim != blocks.architecture.attention_head_dim


def test_expected_shapes_add_up_to_the_counted_parameters(student, blocks):
    names = required_names(blocks.family, student.student)
    total = sum(math.prod(expected_shape(blocks.family, student.student, row_of(blocks.family, student.student, name))) for name in names)
    assert total == count_total_parameters(student.student)


@torch.no_grad()
def test_the_counted_kv_cache_is_that_of_transformers(blocks, student, token_ids):
    for architecture, model in ((blocks.architecture, blocks.model), (student.student, build_pruned(blocks.family, blocks.model, student, blocks.config))):
        layers = model(token_ids(rows=2, tokens=17), use_cache=True).past_key_values.layers
        held = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))
        workload = Workload(context_tokens=17, batch=2, kv_dtype="float32")
        assert memory_report(architecture, workload).kv_cache == held
        assert memory_report(replace(architecture, num_key_value_heads=architecture.num_key_value_heads + 1), workload).kv_cache != held


# What is refused.


@pytest.fixture
def tied(build_blocks, tmp_path, write_checkpoint):
    """A tied checkpoint, and what stores a second tensor in it."""
    blocks = build_blocks("llama tied", num_hidden_layers=1)
    folder = write_checkpoint(tmp_path / "tied", blocks.model, blocks.config)

    def add_head(weight: torch.Tensor):
        state = {blocks.family.file_name(name): tensor for name, tensor in model_tensors(blocks.family, blocks.model).items()}
        save_file(state | {"lm_head.weight": weight}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return folder, blocks.model.model.embed_tokens.weight.detach().clone(), add_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_stored_a_second_time_is_none_of_the_models_parameters(dtype, tied):
    folder, table, add_head = tied
    before = given_checkpoint(folder, "it")
    assert given_checkpoint(add_head(table.to(dtype)), "it") == before
    family, architecture = family_of(read_config(folder)), architecture_from_config(read_config(folder))
    assert "lm_head.weight" not in names_by_canonical(family, architecture, Checkpoint(folder).entries)


OTHER_HEADS = {"one number": lambda table: torch.cat([table[:-1], table[-1:] + (torch.arange(48) == 47)]), "fewer rows": lambda table: table[:90].clone()}


@pytest.mark.parametrize("change", OTHER_HEADS.values(), ids=OTHER_HEADS)
def test_a_head_of_other_values_in_a_tied_checkpoint_is_refused_by_both_names(change, tied):
    _, table, add_head = tied
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true in .*, but lm_head.weight holds other values than model.embed_tokens.weight"):
        given_checkpoint(add_head(change(table)), "it")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mamba2"}, r"'mamba2' cannot be pruned; supported: nemotron_h, llama, qwen3 \(only counted, .*: mamba2, mistral, qwen2\)"),
        ({}, r"None cannot be pruned; supported: nemotron_h, llama, qwen3"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, r"quantization_config is there \(gptq\)"),
        ({"model_type": "llama", "quantization_config": None}, None),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4096}, r"use_sliding_window is true with a window of 4096 tokens"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": None}, None),
        ({"model_type": "qwen3", "use_sliding_window": False, "sliding_window": 4096}, None),
    ],
)
def test_a_config_that_a_cut_could_not_honour_is_refused(config, said):
    if said is None:
        assert family_of(config).model_type == config["model_type"]
        return
    with pytest.raises(ValueError, match=said):
        family_of(config)
