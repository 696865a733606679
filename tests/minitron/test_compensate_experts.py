"""The compensated cut of layers with experts: what survivors can do is made good exactly, each part lowers the error, interrupted walks go on to the bit."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from memory_budget.hf_config import read_config
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.placement import StreamedModel, WholeModel
from minitron.families.base import EXPERT
from minitron.families.experts import experts_of
from minitron.families.state import model_tensors
from minitron.pruning.basis import Basis
from minitron.pruning.compensate import build_compensated
from minitron.pruning.compensated_cut import MadeWeights
from minitron.pruning.cut import build_pruned
from minitron.pruning.cut_cost import CutCost
from minitron.pruning.disk_to_disk import planned_tensors
from minitron.pruning.plan import PruningPlan, Recipe
from minitron.pruning.refits.experts import ExpertsFit
from minitron.pruning.refits.local_training import train_locally
from minitron.walk.store import write_json

NOTHING = Recipe(None, refit_reading=False, refit_writing=False, refit_experts=False, refit_shared=False)


@pytest.fixture(scope="module")
def rows(token_ids) -> list[torch.Tensor]:
    """Calibration rows, a few hundred tokens for every expert."""
    return [token_ids(rows=8, tokens=80, seed=seed) for seed in (41, 42)]


def layers_of_experts(one) -> list[int]:
    return [layer for layer, kind in enumerate(one.architecture.mixers) if kind == "E"]


def keeping(one, experts: Sequence[int]) -> PruningPlan:
    """Of every layer the same experts stay."""
    student = replace(one.architecture, moe_num_experts=len(experts))
    return PruningPlan(one.architecture, student, tuple(range(student.num_layers)), {EXPERT: dict.fromkeys(layers_of_experts(one), tuple(experts))})


def compensated(one, plan: PruningPlan, rows, recipe: Recipe):
    return build_compensated(WholeModel(one.family, one.model, one.architecture), plan, rows, recipe, config=one.config)


def error(student, one, rows, logits_of) -> float:
    """Mean square of what logits are off by, of the base's own."""
    wanted = logits_of(one.model, rows[0])
    return ((logits_of(student, rows[0]) - wanted).square().mean() / wanted.square().mean()).item()


@torch.no_grad()
def doubled(one):
    """The same kind of model, where every second expert has the neurons and the router's row of the one before, and is never chosen; one in a layer has a last
    matrix of its own."""
    model = deepcopy(one.model)
    for layer in layers_of_experts(one):
        mixer = one.family.parts(model).layers[layer].mixer
        mixer.gate.weight[1::2] = mixer.gate.weight[::2]
        mixer.gate.e_score_correction_bias[1::2] = mixer.gate.e_score_correction_bias[::2] - 4
        for number, expert in enumerate(experts_of(one.family.parts(model).layers[layer])):
            if number % 2:
                expert.up_proj.weight.copy_(mixer.experts[number - 1].up_proj.weight)
            if number in (3, 5, 7):
                expert.down_proj.weight.copy_(mixer.experts[number - 1].down_proj.weight)
    return replace(one, model=model)


@pytest.mark.parametrize("one", ["nemotron_h experts", "nemotron_h latent"], indirect=True)
def test_experts_that_others_can_stand_in_for_are_dropped_without_loss(one, rows, logits_of):
    twice = doubled(one)
    plan, refitted = keeping(twice, range(1, 8, 2)), replace(NOTHING, refit_experts=True, ridge=1e-9)
    assert error(compensated(twice, plan, rows, refitted), twice, rows, logits_of) < 1e-6
    assert error(compensated(twice, plan, rows, replace(NOTHING, refit_shared=True)), twice, rows, logits_of) > 1e-2
    assert error(build_pruned(twice.family, twice.model, plan, twice.config), twice, rows, logits_of) > 1e-2


@pytest.mark.parametrize("one", ["nemotron_h experts"], indirect=True)
def test_each_part_lowers_the_error_where_experts_are_dropped(one, rows, logits_of):
    plan = keeping(one, range(0, 8, 2))
    parts = [{}, {"refit_shared": True}, {"refit_experts": True}, {"refit_experts": True, "refit_shared": True}]
    students = [compensated(one, plan, rows, replace(NOTHING, **part)) for part in parts]
    none, shared, experts, both = (error(student, one, rows, logits_of) for student in students)
    assert both < min(shared, experts) and max(shared, experts) < none
    sliced, *found = (model_tensors(one.family, student) for student in (build_pruned(one.family, one.model, plan, one.config), *students))
    down = {name: ".experts." in name for name in sliced if name.endswith("down_proj.weight") and "layers.3." not in name}  # an FFN's, which is no part here
    changed = [{of_expert for name, of_expert in down.items() if not torch.equal(tensors[name], sliced[name])} for tensors in found]
    assert changed == [set(), {False}, {True}, {False, True}]


@torch.no_grad()
@pytest.mark.parametrize("one", ["nemotron_h latent", "qwen3_moe", "granite experts"], indirect=True)
def test_experts_trained_on_the_layers_output_come_closer_than_fitted_ones(one):
    layer, generator = layers_of_experts(one)[0], torch.Generator().manual_seed(6)
    own, residuals = one.family.parts(one.model).layers[layer], [torch.randn(8, 100, one.architecture.hidden, generator=generator) for _ in range(4)]
    student = one.family.parts(build_pruned(one.family, one.model, keeping(one, range(0, one.architecture.moe_num_experts, 2)), one.config)).layers[layer]
    added, kept = one.family.added_multiplier(one.config), {}
    wanted = [(own(residual) - residual) / added for residual in residuals]

    def keep(name: str, tensor: torch.Tensor) -> None:
        kept[name] = tensor
        student.get_parameter(name).data = tensor

    fit = ExpertsFit(student, residuals, [None] * 4, wanted, keep, added)
    done = fit.run(replace(NOTHING, refit_experts=True, refit_shared=True, local_steps=40), [], place="here")
    assert done.kept > 0 and done.after < 0.98 * done.before
    others = {"nemotron_h": set(), "qwen3_moe": {"gate_proj"}, "granitemoehybrid": {"gate_proj", "input_linear", "output_linear"}}
    assert {name.split(".")[-2] for name in kept} == {"up_proj", "down_proj"} | others[one.architecture.model_type]
    left = sum((target - (student(residual) - residual) / added).square().sum() for target, residual in zip(wanted, residuals, strict=True))
    assert left.item() == pytest.approx(done.after, rel=1e-4)  # what the fit keeps count of is what the layer is off by


@pytest.mark.parametrize("asked", ["as it is", "not finite", "at its best already"])
def test_local_training_that_does_not_help_is_undone(asked):
    generator = torch.Generator().manual_seed(5)
    linear, given_NI = torch.nn.Linear(8, 8, bias=False), torch.randn(256, 8, generator=generator)
    wanted_NO = linear(given_NI).detach() if asked == "at its best already" else given_NI @ torch.randn(8, 8, generator=generator)
    before = linear.weight.detach().clone()
    if asked == "not finite":
        wanted_NO[3] = torch.inf
    kept = train_locally(linear.parameters(), lambda some: linear(given_NI[some]) - wanted_NO[some], 256, steps=20, batch=32)
    assert kept == (asked == "as it is") == (not torch.equal(linear.weight, before))


@pytest.mark.parametrize("one", ["qwen3_moe", "granite experts"], indirect=True)
def test_padding_is_no_token_of_an_expert(one, rows, logits_of):
    plan, recipe = keeping(one, (0, 2, 4)), replace(NOTHING, refit_experts=True)
    padded = [torch.cat([batch, torch.full((len(batch), 7), -1)], dim=1) for batch in rows]
    shown = [torch.where(batch == -1, 0, batch) for batch in padded]
    plain, same, other = (compensated(one, plan, batches, recipe).state_dict() for batches in (rows, padded, shown))
    names = [name for name in plain if ".experts." in name and name.endswith("down_proj.weight")]
    assert names and all(torch.allclose(plain[name], same[name], rtol=1e-3, atol=1e-4) for name in names)
    assert not any(torch.allclose(plain[name], other[name], rtol=1e-3, atol=1e-4) for name in names)


@pytest.mark.parametrize("one", ["nemotron_h experts"], indirect=True)
def test_a_walk_that_was_interrupted_within_a_layers_experts_goes_on_to_the_same_bits(one, rows, tmp_path, write_checkpoint):
    folder, plan = write_checkpoint(tmp_path / "base", one.model, one.config, dtype=torch.bfloat16), keeping(one, range(0, 8, 2))
    base = StreamedModel(one.family, folder, read_config(folder) | {"dtype": "float32"}, one.architecture, torch.device("cpu"))
    written = tmp_path / "student"
    written.mkdir()

    def write() -> MadeWeights:
        made = MadeWeights(base, plan, rows, Basis(torch.eye(32)), Recipe(None, local_steps=1), written)  # a step a round
        made.write(planned_tensors(one.family, plan, Checkpoint(folder)), max_shard_bytes=4_000)
        return made

    write()
    shards = {path: path.read_bytes() for path in sorted(written.glob("*.safetensors"))}
    of_experts = [path for path, stored in shards.items() if b".experts.1.down_proj" in stored]
    assert len(of_experts) == 2
    for path in of_experts:
        path.unlink()
    made = write()
    assert {path: path.read_bytes() for path in shards} == shards and 0 < len(made.checksums) < len(made.stored)
    config = one.family.hf_config(read_config(folder), plan.student)
    write_json(written / "config.json", config)
    assert "equal" in made.check(config)


@pytest.mark.parametrize("one", ["nemotron_h experts"], indirect=True)
def test_too_few_tokens_for_an_expert_are_said(one):
    said = CutCost(one.architecture, one.architecture, Recipe(), 4, 60, 4).few_tokens_note()
    assert said == ("60 calibration tokens, about 15 for each of 8 experts, are fewer than the 16 inputs solved for: prune.ridge goes from 0.001 up to 0.32; "
                    "prune.samples=5 would do")  # fmt: skip
    assert CutCost(one.architecture, one.architecture, Recipe(), 4, 64, 4).few_tokens_note() is None
