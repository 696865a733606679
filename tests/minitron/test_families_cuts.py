"""Every family cut: units renamed, nothing cut, and a student with less of everything, in memory, as a folder and as it is served."""

import random
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from memory_budget.calculator import memory_report
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from memory_budget.workload import Workload
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.given import given_checkpoint
from minitron.checkpoints.placement import StreamedModel
from minitron.checkpoints.shards import write_weights
from minitron.families.base import ATTENTION_HEAD, EXPERT, EXPERT_FFN, FFN, HIDDEN, KEY_VALUE_HEAD, MAMBA_CHANNEL, MAMBA_HEAD, SHARED_FFN
from minitron.families.state import model_tensors
from minitron.families.table import expert_of, split_layer
from minitron.pruning.cut import build_pruned, cut_state, kept_indices
from minitron.pruning.disk_to_disk import planned_tensors
from minitron.walk.store import write_json
from nas.depth import check_is_cut, spelled


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).abs().max() / right.abs().max()).item()


# Symmetries: renaming units must not change what the model computes.


def shuffled(size: int, seed: int = 0) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    assert order != sorted(order)
    return tuple(order)


def within(groups: list[int], per_group: int) -> tuple[int, ...]:
    """Heads or experts group by group in the order of the groups, inside each the first one last."""
    return tuple(group * per_group + index for group in groups for index in (*range(1, per_group), 0))


def orders_of(architecture) -> dict[str, dict[str, tuple[int, ...]]]:
    """By axis that the model has: other orders of its units, and of those that must move with them."""
    queries, keys, heads, groups = (architecture.num_attention_heads, architecture.num_key_value_heads, architecture.mamba_num_heads,
                                    architecture.mamba_num_groups)  # fmt: skip
    found = {HIDDEN: {HIDDEN: shuffled(architecture.hidden)}}
    if architecture.ffn:
        found[FFN] = {FFN: shuffled(architecture.ffn)}
    if keys:
        turned = [*range(1, keys), 0]
        found[ATTENTION_HEAD] = {ATTENTION_HEAD: within(list(range(keys)), queries // keys)}
        found[KEY_VALUE_HEAD] = {KEY_VALUE_HEAD: tuple(turned), ATTENTION_HEAD: within(turned, queries // keys)}
    if heads:
        found[MAMBA_HEAD] = {MAMBA_HEAD: within(list(range(groups)), heads // groups)}
        found[MAMBA_CHANNEL] = {MAMBA_CHANNEL: shuffled(architecture.mamba_head_dim)}
    if architecture.moe_num_experts:
        groups = architecture.moe_groups
        found[EXPERT] = {EXPERT: within([*range(1, groups), 0], architecture.moe_num_experts // groups)}
        found[EXPERT_FFN] = {EXPERT_FFN: shuffled(architecture.moe_ffn)}
    if architecture.moe_shared_ffn:
        found[SHARED_FFN] = {SHARED_FFN: shuffled(architecture.moe_shared_ffn)}
    return found


def in_every_sublayer(architecture, orders: dict[str, tuple[int, ...]]) -> dict[str, dict[int, tuple[int, ...]]]:
    """As a plan says it: hidden once for all, neurons of experts for every expert, of every other axis every sublayer."""
    places = {HIDDEN: (-1,), EXPERT_FFN: range(architecture.num_sublayers * architecture.moe_num_experts)}
    return {axis: dict.fromkeys(places.get(axis, range(architecture.num_sublayers)), order) for axis, order in orders.items()}


@pytest.fixture
def reordered(one, keep_all):
    """Builds the model with its units in other orders."""

    def build(orders: dict[str, tuple[int, ...]]):
        changed = build_pruned(one.family, one.model, keep_all(one.architecture, **in_every_sublayer(one.architecture, orders)), one.config)
        before = one.model.state_dict()
        assert any(not torch.equal(before[name], tensor) for name, tensor in changed.state_dict().items())
        return changed

    return build


def test_reordering_the_units_of_any_axis_leaves_the_logits(one, reordered, logits_of):
    for axis, orders in orders_of(one.architecture).items():
        assert difference(logits_of(reordered(orders)), logits_of(one.model)) <= 1e-5, axis


def test_units_across_groups_and_kv_heads_without_their_query_heads_move_the_logits(one, reordered, logits_of):
    for axis, orders in orders_of(one.architecture).items():
        groups = {ATTENTION_HEAD: one.architecture.num_key_value_heads, MAMBA_HEAD: one.architecture.mamba_num_groups, EXPERT: one.architecture.moe_groups}
        if groups.get(axis, 1) > 1:
            number = len(orders[axis])
            assert difference(logits_of(reordered({axis: (number - 1, *range(1, number - 1), 0)})), logits_of(one.model)) > 0.01, axis
        if axis == KEY_VALUE_HEAD:
            assert difference(logits_of(reordered({axis: orders[axis]})), logits_of(one.model)) > 0.01, axis


@torch.no_grad()
def test_units_reordered_in_one_tensor_alone_move_the_logits(one, keep_all, token_ids, logits_of):
    """In every tensor of the first layer of each kind, of two of its experts, and outside of the layers, for every axis that it has."""
    model, ids, moved = deepcopy(one.model), token_ids(rows=1), 0
    tensors, wanted = model_tensors(one.family, model), logits_of(one.model, ids)
    firsts = {one.architecture.pattern.index(kind) for kind in one.architecture.pattern}
    for axis, orders in orders_of(one.architecture).items():
        plan = keep_all(one.architecture, **in_every_sublayer(one.architecture, orders))
        for name, tensor in tensors.items():
            if split_layer(name)[0] in (None, *firsts) and expert_of(name) in (None, 0, one.architecture.moe_num_experts - 1):
                before = tensor.clone()
                for dimension, order in enumerate(kept_indices(one.family, plan, name)):
                    tensor.copy_(tensor if order is None else tensor.index_select(dimension, order))
                if not torch.equal(tensor, before):
                    assert difference(logits_of(model, ids), wanted) > 1e-3, f"{name} by {axis}"
                    moved += 1
                tensor.copy_(before)
    assert torch.equal(logits_of(model, ids), wanted) and moved > 10


def test_a_plan_that_keeps_everything_is_bit_equal(one, keep_all, logits_of):
    state = model_tensors(one.family, one.model)
    everything = {axis: tuple(range(len(order))) for orders in orders_of(one.architecture).values() for axis, order in orders.items()}
    for plan in (keep_all(one.architecture), keep_all(one.architecture, **in_every_sublayer(one.architecture, everything))):
        cut = cut_state(one.family, plan, {one.family.file_name(name): tensor for name, tensor in state.items()})
        assert cut.keys() == state.keys() and all(torch.equal(cut[name], state[name]) for name in state)
    assert torch.equal(logits_of(build_pruned(one.family, one.model, plan, one.config)), logits_of(one.model))


# A student with less of everything.


@pytest.fixture(scope="module")
def written(one, hard_plan, teacher_folder, tmp_path_factory):
    """Its folder, cut from disk to disk, with the config.json that is handed over."""
    folder = tmp_path_factory.mktemp("student")
    write_weights(folder, planned_tensors(one.family, hard_plan, Checkpoint(teacher_folder)), max_shard_bytes=20_000)
    write_json(folder / "config.json", one.family.handed_over(one.family.hf_config(read_config(teacher_folder), hard_plan.student)))
    return folder


def test_a_written_student_has_the_planned_parameters(one, hard_plan, written):
    student = hard_plan.student
    assert len(list(written.glob("*.safetensors"))) > 1
    assert Checkpoint(written).num_parameters == count_total_parameters(student) == given_checkpoint(written, "it")["parameters"]
    assert count_total_parameters(student) < 0.7 * count_total_parameters(one.architecture)


def test_transformers_own_class_loads_it_and_gives_the_logits_of_the_cut_in_memory(one, sliced, written, logits_of):
    """The same tensors, so the same logits but for the order of sums in a whole model: up to 1.3e-6 on an AMD EPYC; another model is far off."""
    loaded, wanted = AutoModelForCausalLM.from_pretrained(written, local_files_only=True).eval(), logits_of(sliced)
    assert difference(logits_of(loaded), wanted) <= 1e-5 < 1e-3 < difference(logits_of(one.model), wanted)
    assert (logits_of(loaded) - wanted).norm() <= 1e-6 * wanted.norm()
    assert torch.equal(logits_of(one.family.load(written)), wanted)
    assert [type(loaded).__name__] == read_config(written)["architectures"] and type(loaded) is type(one.model)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == one.architecture.tied_embeddings


@torch.no_grad()
def test_a_walk_over_the_folder_gives_the_same_bits(one, hard_plan, sliced, written, token_ids, logits_of):
    streamed = StreamedModel(one.family, written, read_config(written), hard_plan.student, torch.device("cpu"))
    (hidden_BTD,) = streamed.embed([token_ids()])
    for _, sublayer in streamed.visit(range(hard_plan.student.num_sublayers)):
        hidden_BTD = sublayer(hidden_BTD)
    with streamed.open_head() as head:
        assert torch.equal(head.logits(hidden_BTD), logits_of(sliced))


@pytest.mark.parametrize("one", ["nemotron_h", "gemma3_text"], indirect=True)  # the others' loader is one of theirs
def test_a_family_loads_the_stored_dtype_unless_told_otherwise(one, sliced, hard_plan, tmp_path, write_checkpoint):
    write_checkpoint(tmp_path, sliced, one.family.hf_config(one.config, hard_plan.student), dtype=torch.bfloat16)
    for dtype, asked in ((torch.bfloat16, {}), (torch.float32, {"dtype": torch.float32})):
        assert {parameter.dtype for parameter in one.family.load(tmp_path, **asked).parameters()} == {dtype}


def test_its_config_json_is_read_back_as_the_same_architecture(one, hard_plan, written):
    config, student = read_config(written), hard_plan.student
    assert architecture_from_config(config) == student != one.architecture
    assert config["num_hidden_layers"] == student.num_layers == len(hard_plan.kept_layers) == one.architecture.num_layers - 1
    if "W" in student.pattern and "*" in student.pattern:
        types = one.model.config.layer_types
        kept = [types[layer] for layer in hard_plan.kept_layers]
        assert config["layer_types"] == kept == AutoModelForCausalLM.from_pretrained(written).config.layer_types != types[: len(kept)]


def test_without_head_dim_it_would_be_another_model(one, hard_plan, written):
    """Why it is always written: a loader takes hidden size over heads, or a number of its own; Qwen2 and Granite keep the former, by an equation."""
    config = {name: value for name, value in read_config(written).items() if name != "head_dim"}
    try:
        assert (architecture_from_config(config) == hard_plan.student) == (one.config["model_type"] in ("qwen2", "granitemoehybrid"))
    except ValueError as error:
        assert "head_dim" in str(error) or "attention heads" in str(error)


def test_without_expand_a_mamba2_would_be_refused(build_tiny):
    one = build_tiny("mamba2 untied")
    config = one.family.hf_config(one.config, one.architecture)
    assert architecture_from_config(config) == one.architecture
    with pytest.raises(ValueError, match=r"expand \(2\) times hidden_size \(32\) must equal num_heads times head_dim \(32\)"):
        architecture_from_config({name: value for name, value in config.items() if name != "expand"})


@torch.no_grad()
def test_the_counted_caches_are_those_of_transformers(one, hard_plan, sliced, token_ids):
    """Below the window and above it; of the convolution's columns all but the oldest, which only transformers keeps (test_memory_reality.py)."""
    for architecture, model in ((one.architecture, one.model), (hard_plan.student, sliced)):
        for tokens in (5, 21):
            output = model(token_ids(rows=2, tokens=tokens), use_cache=True)
            layers = (output.cache_params if "cache_params" in output else output.past_key_values).layers
            attention = [layer for layer in layers if getattr(layer, "keys", None) is not None]
            states = {name: [state for layer in layers for state in getattr(layer, name, {}).values()] for name in ("recurrent_states", "conv_states")}
            held = (sum(layer.keys.nbytes + layer.values.nbytes for layer in attention), sum(state.nbytes for state in states["recurrent_states"]),
                    sum(state[..., 1:].contiguous().nbytes for state in states["conv_states"]))  # fmt: skip

            def counted(tokens: int, architecture=architecture) -> tuple[int, int, int]:
                report = memory_report(architecture, Workload(tokens, 2, weights_dtype="float32", kv_dtype="float32"))
                return report.kv_cache, report.ssm_state, report.conv_state

            still_grows = "*" in (architecture.mixers if tokens < architecture.window else architecture.pattern)
            assert counted(tokens) == held and any(held) and (counted(tokens + 1) != held) == still_grows


def test_a_cut_that_leaves_no_layer_of_full_attention_is_refused(one):
    teacher, full = one.architecture, [layer for layer, kinds in enumerate(one.architecture.layer_kinds) if "*" in kinds]
    windowed = tuple(layer for layer in range(teacher.num_layers) if layer not in full)
    if "W" not in teacher.pattern or not full:
        return
    check_is_cut(teacher, replace(teacher, pattern=spelled(teacher, (*windowed, full[-1]))), (*windowed, full[-1]))  # the control
    with pytest.raises(ValueError, match="full attention"):
        check_is_cut(teacher, replace(teacher, pattern=spelled(teacher, windowed)), windowed)
