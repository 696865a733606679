"""What stages say they will hold, at the size that they are for and at one that can be looked at."""

from dataclasses import replace

import pytest
import torch

from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.units import GIB
from minitron.checkpoints.forward_memory import forward_memory
from minitron.importance.memory import ScoringNeeds
from minitron.machine.device import check_on_gpu
from minitron.machine.memory_plan import MemoryPlan
from minitron.settings.run import Placement, ScoringSettings
from minitron.settings.teachers import CONF_FOLDER

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


def test_a_plan_that_does_not_fit_says_the_stage_the_bytes_and_what_to_do():
    plan = MemoryPlan("score", {"weights": 3 * GIB, "states": GIB, "logits": 0}, "Lower scoring.block_tokens")
    plan.check(4 * GIB, "a GPU")
    with pytest.raises(ValueError, match=r"^score: each process will hold about 4.00 GiB: weights 3.00 GiB, states 1.00 GiB; a GPU has 3.00 GiB. Low"):
        plan.check(3 * GIB, "a GPU")
