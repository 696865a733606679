"""Experts while they are trained: the same numbers as one by one, their load counted without padding, said, and evened out by biases where there are some."""

import json
from copy import deepcopy

import pytest
import torch

from distill.batches import PADDING
from distill.engines.loads import BIAS, Loads
from distill.objectives import head_of, next_token_objective
from memory_budget.hf_config import architecture_from_config
from minitron.families import experts as experts_module
from minitron.families.base import ROUTER
from minitron.families.experts import Experts, Products, Sent, experts_of
from minitron.families.state import in_dtype
from minitron.mamba import dispatch
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings, TeacherSettings
from minitron.settings.training import Balance, Router, TrainSettings
from minitron.stages.distill import check_experts
from minitron.training.expert_load import expert_load
from minitron.training.steps import train_plan

WITH_EXPERTS = pytest.mark.parametrize("one", ["nemotron_h experts", "qwen3_moe", "granite experts"], indirect=True)


def gradients_of(experts: Experts, total_ND: torch.Tensor, hidden_ND: torch.Tensor, weights_NK: torch.Tensor) -> list[torch.Tensor]:
    wanted = [hidden_ND, weights_NK, *experts.parameters()]
    return list(torch.autograd.grad((total_ND * torch.arange(total_ND.numel()).reshape(total_ND.shape)).sum(), wanted, allow_unused=True))


@WITH_EXPERTS
def test_all_at_once_gives_what_one_by_one_does_and_zeros_to_those_without_a_token(one):
    """In float64, against the experts' own forward passes on the tokens of each. The control is a token sent elsewhere."""
    block = next(block for block in one.family.parts(one.model).layers if experts_of(block) is not None)
    experts, generator = deepcopy(experts_of(block)).double(), torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(40, experts[0].up_proj.in_features, generator=generator, dtype=torch.float64).requires_grad_()
    experts_NK = torch.stack([torch.randperm(len(experts) - 1, generator=generator)[:2] for _ in hidden_ND])  # to the last one none
    weights_NK = torch.rand(40, 2, generator=generator, dtype=torch.float64).requires_grad_()

    def one_by_one(experts_NK: torch.Tensor) -> torch.Tensor:
        return torch.stack([sum(weight * experts[expert](row[None])[0] for expert, weight in zip(numbers, weights, strict=True))
                            for row, numbers, weights in zip(hidden_ND, experts_NK.tolist(), weights_NK, strict=True)])  # fmt: skip

    wanted, found = one_by_one(experts_NK), experts(hidden_ND, experts_NK, weights_NK)
    elsewhere_NK = experts_NK.clone()
    elsewhere_NK[0] = (elsewhere_NK[0] + 1) % (len(experts) - 1)
    assert (found - wanted).abs().max() < 1e-12 < (one_by_one(elsewhere_NK) - wanted).abs().max()
    for ours, theirs in zip(*(gradients_of(experts, total_ND, hidden_ND, weights_NK) for total_ND in (found, wanted)), strict=True):
        assert ours.count_nonzero() == 0 if theirs is None else (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def test_a_router_chooses_in_float32_under_autocast(build_tiny, monkeypatch):
    """As it does outside of it; the control is transformers' own."""
    block = next(block for block in build_tiny("nemotron_h experts").model.model.layers if experts_of(block) is not None)
    (replaced,) = [one for one in dispatch.replacements() if one[0] is type(block.mixer.gate)]
    hidden_BTD = torch.randn(4, 64, block.mixer.gate.hidden_dim, generator=torch.Generator().manual_seed(0))

    def logits() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block.mixer.gate(hidden_BTD)[0]

    exact = block.mixer.gate(hidden_BTD)[0]
    monkeypatch.setattr(replaced[0], "forward", replaced[2].in_place_of)
    assert logits().dtype == torch.bfloat16
    monkeypatch.setattr(*replaced)
    assert torch.equal(logits(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_for_all_experts_as_a_gpu_makes_it_gives_the_same_bits(dtype, monkeypatch):
    """torch has it for a CPU too. An expert without rows among them; the control is a row sent to another expert."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(12, 16, generator=generator).to(dtype).requires_grad_()
    weights = [torch.randn(8, 16, generator=generator).requires_grad_() for _ in range(4)]

    def outcome(counts: list[int]) -> list[torch.Tensor]:
        made = Products.apply(given, Sent(torch.arange(4).repeat_interleave(torch.tensor(counts))[:, None], 4), *weights)
        return [made, *torch.autograd.grad((made * torch.arange(96).view(12, 8)).sum(), [given, *weights])]

    one_by_one, elsewhere = outcome([5, 0, 3, 4]), outcome([4, 1, 3, 4])
    monkeypatch.setattr(experts_module, "is_grouped", lambda given, matrix: True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outcome([5, 0, 3, 4]), one_by_one, strict=True))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(elsewhere[:3], one_by_one[:3], strict=True))


@WITH_EXPERTS
def test_the_load_is_that_of_real_tokens(one, token_ids):
    """What the teacher's copy is sent, and what passes in eval mode are sent, is none of it."""
    model, rows_BT = deepcopy(one.model).train(), token_ids(rows=3, tokens=20)
    rows_BT[1:, 8:] = PADDING
    loads, layers = Loads(model), one.architecture.num_layers_of("E")
    head_of(model.eval(), rows_BT)
    assert sum(loads.take()) == 0
    head_of(model.train(), rows_BT)
    counts = loads.take()
    assert sum(counts) == layers * one.architecture.moe_experts_per_token * 36 and len(counts) == layers * one.architecture.moe_num_experts
    assert loads.measure(counts)["busiest_expert"] > 1 and loads.take() == [0] * len(counts)


def test_biases_even_out_the_load_and_a_model_without_them_says_so(build_tiny, token_ids):
    """The control is the load before."""
    model, rows_BT = build_tiny("nemotron_h experts").model.train(), token_ids(rows=8, tokens=32)
    loads, before = Loads(model), [router.e_score_correction_bias.clone() for router in Loads(model).routers]
    busiest = []
    for _ in range(30):
        next_token_objective(model, rows_BT)
        busiest.append(loads.measure(loads.take())["busiest_expert"])
        loads.balance(0.02)
    assert busiest[-1] < 1.3 < busiest[0]
    assert all(not torch.equal(router.get_buffer(BIAS), old) for router, old in zip(loads.routers, before, strict=True))
    other = build_tiny("qwen3_moe").model.train()
    loads = Loads(other)
    next_token_objective(other, rows_BT)
    loads.measure(loads.take())
    with pytest.raises(ValueError, match="train.balance is bias, but the model's routers have no correction bias"):
        loads.balance(0.02)


def test_a_model_laid_out_in_bf16_keeps_its_stored_buffers_in_float32(configs, build_tiny):
    """The correction bias is read as it is stored; a table of rotary positions, which is not, comes with the model."""
    for name, made in (("nemotron_h experts", 0), ("qwen3_moe", 1)):
        with torch.device("meta"):
            model = build_tiny(name).family.build(configs[name])
        laid_out, buffers = in_dtype(model, torch.bfloat16)
        assert {buffer.dtype for buffer in laid_out.buffers()} == {torch.float32}
        assert {parameter.dtype for parameter in laid_out.parameters()} == {torch.bfloat16}
        assert bool(buffers) == bool(made)


def test_what_became_of_the_load_is_said(tmp_path, configs):
    """From the first and the last twenty steps, and why."""
    lines = [{"step": step, "busiest_expert": 2.0 if step < 20 else 3.0, "idle_experts": float(step >= 20)} for step in range(40)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def load(name: str, **train) -> dict:
        return expert_load(tmp_path / "metrics.jsonl", architecture_from_config(configs[name]), TrainSettings(**train))

    found = load("nemotron_h experts")
    assert found["busiest_over_mean"] == {"first": 2.0, "last": 3.0} and found["idle"] == {"first": 0.0, "last": 1.0} and found["experts"] == 16
    assert found["sentence"] == (
        "The busiest of 8 experts in each of 2 layers was sent 2.0 times the mean in the first 20 steps and 3.0 times in the last; 0.0 and 1.0 of all 16 were "
        "sent nothing in a step. Nothing kept the load even: distill.train.balance is none."
    )
    assert load("nemotron_h experts", balance=Balance.bias)["sentence"].endswith("Correction biases were moved against the load.")
    assert load("qwen3_moe")["sentence"].endswith("Nothing kept the load even: routers of qwen3_moe have no correction bias.")
    assert load("llama tied") == {}


@pytest.mark.parametrize(("name", "train", "says"), [
    ("llama tied", {"router": Router.frozen}, "distill.train.router is frozen, but the teacher has no experts and so no router"),
    ("qwen3_moe", {"balance": Balance.bias}, "distill.train.balance is bias, but the teacher is a model whose routers have no correction bias .qwen3_moe."),
    ("llama tied", {"balance": Balance.bias}, "distill.train.balance is bias, but the teacher is a model which has no experts"),
])  # fmt: skip
def test_what_a_teacher_has_no_experts_or_no_bias_for_is_refused(name, train, says, tmp_path, configs):
    (tmp_path / "config.json").write_text(json.dumps(configs[name]))
    settings = Settings(teacher=TeacherSettings(path=str(tmp_path)))
    check_experts("distill.train", TrainSettings(), settings)
    with pytest.raises(ValueError, match=says):
        check_experts("distill.train", TrainSettings(**train), settings)


def test_a_setting_that_is_not_given_is_in_no_key():
    assert key_settings(TrainSettings(balance_rate=0.001)) == key_settings(TrainSettings()) != key_settings(TrainSettings(router=Router.frozen))
    assert train_plan(TrainSettings()).frozen is None and train_plan(TrainSettings(router=Router.frozen)).frozen == ROUTER.removeprefix("mixer")
