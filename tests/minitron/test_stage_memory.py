"""What stages say they will hold, at the size that they are for and at one that can be looked at."""

from dataclasses import replace

import pytest
import torch

from distill.engines.launch import Launch
from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import layer_parameters
from memory_budget.units import GIB
from minitron.checkpoints.forward_memory import forward_memory, layer_bytes, streamed_bytes
from minitron.checkpoints.forward_work import forward_work
from minitron.importance.cost import scoring_work
from minitron.importance.memory import ScoringNeeds
from minitron.machine.device import check_on_gpu
from minitron.machine.memory_plan import MemoryPlan
from minitron.pruning.cut_cost import CutCost
from minitron.pruning.plan import Recipe
from minitron.settings.run import Placement, ScoringSettings
from minitron.settings.teachers import CONF_FOLDER
from minitron.settings.training import Optimizer, TrainSettings
from minitron.training.memory import training_memory
from minitron.training.time import training_work

H100 = int(79.1 * GIB)
NANO2 = ScoringSettings(samples=1024, batch=1, layer_samples=64)


@pytest.fixture(scope="module")
def teacher():
    return architecture_from_config(read_config(CONF_FOLDER / "architectures" / "nemotron-nano-12b-v2-base.json"))


@pytest.mark.parametrize(("placement", "free", "bar"), [(Placement.device, H100, 70), (Placement.stream, 22 * GIB, 22)], ids=["H100", "streamed"])
def test_scoring_the_12b_at_8192_tokens_fits(placement, free, bar, teacher):
    scoring, needs = replace(NANO2, placement=placement), ScoringNeeds(teacher, 8192, 2)
    tokens = needs.depth_block_tokens(scoring, free)
    assert tokens % 8192 == 0 and needs.plan(scoring, tokens).total <= bar * GIB
    assert needs.plan(replace(scoring, branch_tokens=64 * 8192), tokens).total > bar * GIB  # 64 rows at once, as it was


def test_blocks_of_the_depth_sweep_grow_with_the_memory_up_to_what_is_set(teacher):
    needs = ScoringNeeds(teacher, 8192, 2)
    tokens = [needs.depth_block_tokens(NANO2, gib * GIB) for gib in (1, 60, 80, 1000)]
    assert tokens == sorted(tokens) and (tokens[0], tokens[-1]) == (8192, NANO2.block_tokens) and len(set(tokens)) == 4


def test_processes_share_the_rows_that_they_hold(teacher):
    one, eight = (ScoringNeeds(teacher, 8192, 2, processes).plan(NANO2, 8192).parts["full states"] for processes in (1, 8))
    assert one == 8 * eight == 64 * 8192 * 5120 * 2


def test_two_models_weigh_what_they_have(teacher):
    plan = forward_memory("evaluate", [(teacher, 2), (teacher, 4)], tokens=8192, logits_tokens=1024, advice="Lower it")
    assert plan.parts["weights"] == 6 * 12_310_001_152 and plan.parts["states"] == 6 * 8192 * 5120
    check_on_gpu(plan, torch.device("cpu"))  # whose blocks take less: nothing is refused by it


BLOCKS = Architecture(model_type="gemma3_text", pattern="W-*-W-", hidden=64, vocab=500, ffn=96, ffn_gated=True, num_attention_heads=4, num_key_value_heads=2,
                      attention_head_dim=8, window=128)  # fmt: skip
TRAIN = TrainSettings(batch=2, optimizer=Optimizer.muon)
SIZES = {"sequence_length": 64, "teacher_bytes_per_number": 2}
PLANNED = {
    "forward pass": lambda model: forward_work(model, 640, 64),
    "training": lambda model: training_work(model, model, TRAIN, 64),
    "scoring": lambda model: scoring_work(model, ScoringSettings(), length=64, fewest_layers=2, width=2),
    "scoring's memory": lambda model: ScoringNeeds(model, 64, 4).plan(ScoringSettings(), 640),
    "streamed scoring's memory": lambda model: ScoringNeeds(model, 64, 4).plan(ScoringSettings(placement=Placement.stream), 640),
    "evaluation's memory": lambda model: forward_memory("", [(model, 4)], tokens=64, logits_tokens=8, advice=""),
    "a long row's memory": lambda model: layer_bytes(replace(model, window=2**20 * bool(model.window)), 2, 1, 2**17),
    "training's memory": lambda model: training_memory(model, model, TRAIN, Launch(), **SIZES, on_gpu=False),
    "training's memory on a GPU": lambda model: training_memory(model, model, TRAIN, Launch(), **SIZES, on_gpu=True),
    "a cut's memory": lambda model: CutCost(model, replace(model, hidden=48), Recipe(), 10, 640, 4).held_bytes,
    "a cut": lambda model: CutCost(model, replace(model, hidden=48), Recipe(), 10, 640, 4).work,
}


@pytest.mark.parametrize("what", PLANNED)
def test_a_window_that_holds_the_row_is_planned_as_full_attention(what):
    """A layer within it is an attention layer with the same tensors; the control is the same model with as many Mamba-2 layers in its stead."""
    full = replace(BLOCKS, pattern="*-*-*-")
    assert PLANNED[what](BLOCKS) == PLANNED[what](full)
    sizes = {"mamba_num_heads": 64, "mamba_head_dim": 8, "mamba_num_groups": 1, "mamba_state_size": 64, "mamba_conv_kernel": 4}
    assert PLANNED[what](replace(full, model_type="nemotron_h", pattern="M-*-M-", **sizes)) != PLANNED[what](full)


EXPERTS = {"moe_num_experts": 8, "moe_experts_per_token": 2, "moe_ffn": 48}


@pytest.mark.parametrize("what", [what for what in PLANNED if not what.startswith("a ")])
def test_experts_are_planned_by_their_own_sizes(what):
    """Blocks of experts, of which a token's two are together as wide as an FFN; twice as wide ones are planned otherwise, and so is the FFN."""
    blocks = replace(BLOCKS, model_type="qwen3_moe", pattern="*E*E*E", **EXPERTS)
    planned = [PLANNED[what](one) for one in (blocks, replace(blocks, moe_ffn=96), replace(blocks, pattern="*-*-*-"))]
    assert planned[0] != planned[1] and planned[0] != planned[2]


def test_streamed_experts_are_held_one_by_one():
    """Of Nemotron-3-Nano's layers one and the next, but of routed experts what is kept, the one at work and the next; whole layers would be 5.0 GiB."""
    expert, rest = 2 * 1856 * 2688, 2 * 3712 * 2688 + 128 * 2688
    nano = replace(BLOCKS, model_type="nemotron_h", pattern="ME", hidden=2688, ffn_gated=False, mamba_num_heads=64, mamba_head_dim=64, mamba_num_groups=8,
                   mamba_state_size=128, mamba_conv_kernel=4, moe_num_experts=128, moe_experts_per_token=6, moe_ffn=1856, moe_shared_ffn=3712)  # fmt: skip
    assert streamed_bytes(nano, 2) == 2 * (2 * rest + 2 * expert) + 2**27 < GIB / 4
    few = replace(nano, moe_num_experts=6)
    assert streamed_bytes(few, 2) == 2 * (2 * (rest - 122 * 2688) + 2 * expert) + min(2**27, 2 * 6 * expert)
    assert streamed_bytes(replace(nano, pattern="M"), 2) == 4 * layer_parameters(nano, "M").total


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_window_shorter_than_the_row_is_planned_with_its_masks(on_gpu):
    """Of every layer within it a float32 number for every two tokens of a row, and keys and values for all four query heads, not two; on a GPU the bool too."""
    masked, full = (training_memory(one, one, TRAIN, Launch(), **SIZES, on_gpu=on_gpu) for one in (replace(BLOCKS, window=64), BLOCKS))
    bytes_of_layer = 2 * 64 * (64 * 4 + 2 * 2 * 8 * 4)
    of_scores = 2 * 64 * 64 * 4 * 4 if on_gpu else 0  # which torch makes there of heads that share keys, but not with a mask
    assert masked.activations - full.activations == 2 * (bytes_of_layer - of_scores)
    assert masked.mask - full.mask == (2 * 64 * 64 if on_gpu else 0)


def test_a_plan_that_does_not_fit_says_the_stage_the_bytes_and_what_to_do():
    plan = MemoryPlan("score", {"weights": 3 * GIB, "states": GIB, "logits": 0}, "Lower scoring.block_tokens")
    plan.check(4 * GIB, "a GPU")
    with pytest.raises(ValueError, match=r"^score: each process will hold about 4.00 GiB: weights 3.00 GiB, states 1.00 GiB; a GPU has 3.00 GiB. Low"):
        plan.check(3 * GIB, "a GPU")
