"""What families with experts are asked beside what every family is asked: a router's rows go with its experts, and experts that no token reaches go without a
trace."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.placement import StreamedModel
from minitron.families.base import EXPERT, EXPERT_FFN, HIDDEN, ROUTER, SHARED_FFN
from minitron.families.experts import experts_of
from minitron.families.state import model_tensors
from minitron.families.table import BUFFER
from minitron.pruning.cut import build_pruned
from minitron.pruning.plan import PruningPlan, expert_place

WITH_EXPERTS = pytest.mark.parametrize("one", ["nemotron_h experts", "qwen3_moe", "granite experts"], indirect=True)
SOME_WITHOUT = pytest.mark.parametrize("one", ["nemotron_h experts", "qwen3_moe"], indirect=True)  # layers


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).abs().max() / right.abs().max()).item()


def layers_of_experts(one) -> list[int]:
    return [layer for layer, kind in enumerate(one.architecture.pattern) if kind == "E"]


def exchanged(tensor: torch.Tensor) -> None:
    tensor[:2] = tensor[:2].flip(0)


@WITH_EXPERTS
@torch.no_grad()
def test_experts_exchanged_without_their_rows_of_the_router_move_the_logits(one, logits_of):
    model, wanted, layer = deepcopy(one.model), logits_of(one.model), layers_of_experts(one)[0]
    experts, tensors = experts_of(one.family.parts(model).layers[layer]), model_tensors(one.family, model)
    experts[0], experts[1] = experts[1], experts[0]
    assert difference(logits_of(model), wanted) > 1e-2
    for name, tensor in tensors.items():
        if name == f"layers.{layer}.{ROUTER}" or BUFFER.search(name) and name.startswith(f"layers.{layer}."):
            exchanged(tensor)
    assert difference(logits_of(model), wanted) <= 1e-6


@WITH_EXPERTS
def test_every_expert_has_its_neurons_in_an_order_of_its_own(one, keep_all, logits_of):
    places = [expert_place(one.architecture, layer, expert) for layer in layers_of_experts(one) for expert in range(one.architecture.moe_num_experts)]
    orders = {place: tuple(torch.randperm(one.architecture.moe_ffn, generator=torch.Generator().manual_seed(place)).tolist()) for place in places}
    changed = build_pruned(one.family, one.model, keep_all(one.architecture, **{EXPERT_FFN: orders}), one.config)
    assert difference(logits_of(changed), logits_of(one.model)) <= 1e-6
    before, after = model_tensors(one.family, one.model), model_tensors(one.family, changed)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".experts." in name}


@torch.no_grad()
def reached(one, ids_BT: torch.Tensor) -> dict[int, set[int]]:
    """Of every layer with experts, those that a token goes to."""
    found: dict[int, set[int]] = {layer: set() for layer in layers_of_experts(one)}
    model = deepcopy(one.model)
    for layer, numbers in found.items():
        experts_of(one.family.parts(model).layers[layer]).watch = lambda routed, numbers=numbers: numbers.add(routed.expert)
    model(ids_BT, use_cache=False)
    return found


def without(one, dropped: dict[int, set[int]]):
    """The model without some experts, as many in every layer."""
    experts = range(one.architecture.moe_num_experts)
    (number,) = {len(numbers) for numbers in dropped.values()}
    kept = {layer: tuple(expert for expert in experts if expert not in numbers) for layer, numbers in dropped.items()}
    student, layers = replace(one.architecture, moe_num_experts=len(experts) - number), tuple(range(one.architecture.num_layers))
    return build_pruned(one.family, one.model, PruningPlan(one.architecture, student, layers, {EXPERT: kept}), one.config)


@WITH_EXPERTS
def test_experts_that_no_token_reaches_go_without_a_trace(one, token_ids, logits_of, build_tiny):
    """As many of every routing group. The control: one that a token reaches; and, where a softmax over all is not made to add up to 1 again, any."""
    ids, groups = token_ids(rows=1, tokens=2, seed=3), one.architecture.moe_groups
    size, found = one.architecture.moe_num_experts // groups, reached(one, ids)

    def of_each_group(numbers: set[int], wanted: bool) -> set[int]:
        return {next(expert for expert in range(group * size, (group + 1) * size) if (expert in numbers) == wanted) for group in range(groups)}

    idle = {layer: of_each_group(numbers, wanted=False) for layer, numbers in found.items()}
    assert difference(logits_of(without(one, idle), ids), logits_of(one.model, ids)) <= 1e-6
    layer = layers_of_experts(one)[0]
    one_less = {expert for expert in idle[layer] if expert // size != min(found[layer]) // size} | {min(found[layer])}
    assert difference(logits_of(without(one, idle | {layer: one_less}), ids), logits_of(one.model, ids)) > 1e-3
    if one.config["model_type"] == "qwen3_moe":
        unscaled = build_tiny("qwen3_moe", norm_topk_prob=False)
        assert reached(unscaled, ids)[layer] == found[layer]
        idle = {layer: of_each_group(numbers, wanted=False) for layer, numbers in reached(unscaled, ids).items()}
        assert difference(logits_of(without(unscaled, idle), ids), logits_of(unscaled.model, ids)) > 1e-3


@SOME_WITHOUT
def test_a_cut_that_leaves_no_layer_of_experts_is_a_dense_model(one, logits_of):
    kept = tuple(layer for layer, kinds in enumerate(one.architecture.layer_kinds) if "E" not in kinds)
    student = replace(one.architecture, pattern="".join(one.architecture.layer_kinds[layer] for layer in kept))
    config = one.family.hf_config(one.config, student)
    assert architecture_from_config(config) == student and student.moe_num_experts == 0
    cut = build_pruned(one.family, one.model, PruningPlan(one.architecture, student, kept, {}), one.config)
    assert cut.num_parameters() == count_total_parameters(student) and logits_of(cut).isfinite().all()


# A latent that experts read and write, and number formats.


def test_a_student_keeps_the_latent_of_its_experts(build_tiny, token_ids, tmp_path, write_checkpoint, logits_of):
    """Hidden size, experts, their neurons and the shared expert's are fewer; transformers' own class gives the same logits, summed in another order."""
    one = build_tiny("nemotron_h latent")
    student = replace(one.architecture, hidden=24, moe_num_experts=6, moe_ffn=12, moe_shared_ffn=15)
    experts = dict.fromkeys(layers_of_experts(one), (0, 2, 3, 4, 5, 7))
    neurons = {expert_place(one.architecture, layer, expert): tuple(range(expert % 4, expert % 4 + 12)) for layer, kept in experts.items() for expert in kept}
    units = {HIDDEN: {-1: tuple(range(8, 32))}, EXPERT: experts, EXPERT_FFN: neurons, SHARED_FFN: dict.fromkeys(experts, tuple(range(5, 20)))}
    cut = build_pruned(one.family, one.model, PruningPlan(one.architecture, student, (0, 1, 2, 3, 4), units), one.config)
    config = one.family.hf_config(one.config, student)
    folder = write_checkpoint(tmp_path, cut, one.family.handed_over(config))
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    assert difference(logits_of(loaded), logits_of(cut)) <= 1e-5 < 1e-3 < difference(logits_of(one.model), logits_of(cut))  # test_families_cuts.py says why
    assert (logits_of(loaded) - logits_of(cut)).norm() <= 1e-6 * logits_of(cut).norm() and loaded.config.moe_latent_size == 16
    assert architecture_from_config(config) == student and cut.num_parameters() == count_total_parameters(student)


@torch.no_grad()
def test_what_corrects_a_routers_choice_is_float32_whatever_the_model_computes_in(build_tiny, token_ids, tmp_path, write_checkpoint, logits_of):
    """And a model in bf16 is the same read whole and layer by layer."""
    one = build_tiny("nemotron_h experts")
    folder = write_checkpoint(tmp_path, one.model, one.config, dtype=torch.bfloat16)
    model, streamed = one.family.load(folder), StreamedModel(one.family, folder, read_config(folder), one.architecture, torch.device("cpu"))
    (hidden_BTD,) = streamed.embed([token_ids()])
    for layer, sublayer in streamed.visit(range(one.architecture.num_sublayers)):
        if layer in layers_of_experts(one):
            assert sublayer.mixer.gate.e_score_correction_bias.dtype == torch.float32
            assert one.family.parts(model).layers[layer].mixer.gate.e_score_correction_bias.dtype == torch.float32
        hidden_BTD = sublayer(hidden_BTD)
    with streamed.open_head() as head:
        assert torch.equal(head.logits(hidden_BTD), logits_of(model).float()) and model.dtype == torch.bfloat16
