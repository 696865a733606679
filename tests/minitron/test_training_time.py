"""How long distillation must take without fused kernels, and where that is refused."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3TextConfig
from transformers.masking_utils import create_sliding_window_causal_mask

from memory_budget.architecture import Architecture
from minitron.checkpoints.forward_work import has_mask
from minitron.settings.training import Precision, TrainSettings
from minitron.training.time import check_time, training_flops

CPU = torch.device("cpu")


def test_flops_are_those_of_the_linear_layers_and_a_little_attention(teacher, tiny, token_ids):
    ids, linear = token_ids(rows=2, tokens=64, seed=1), [module for module in teacher.modules() if isinstance(module, torch.nn.Linear)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for module in linear:
            module(torch.zeros(ids.numel(), module.in_features))
    told = training_flops(tiny, None, [(TrainSettings(tokens=ids.numel()), 64)]) / 3
    attention = tiny.pattern.count("*") * sum(2 * 2 * tiny.num_attention_heads * tiny.attention_head_dim * seen for seen in range(1, 65)) * len(ids)
    assert told == pytest.approx(counter.get_total_flops() + attention, rel=0.03)
    assert training_flops(tiny, tiny, [(TrainSettings(tokens=ids.numel()), 64)]) == pytest.approx(4 * told)


BLOCKS = Architecture(model_type="gemma3_text", pattern="W-*-W-", hidden=16, vocab=50, ffn=24, num_attention_heads=4, num_key_value_heads=2,
                      attention_head_dim=8, window=64)  # fmt: skip


def test_under_the_mask_of_a_window_whole_rows_are_computed():
    """By hand, of both products of four heads of 8: half of a row of 64 tokens a layer, and the other half under a mask."""

    def flops(model: Architecture) -> float:
        return training_flops(model, None, [(TrainSettings(tokens=100), 64)]) / 300

    wide = flops(replace(BLOCKS, window=65))
    assert flops(BLOCKS) - wide == 2 * 4 * 4 * 8 * 32 and wide == flops(replace(BLOCKS, pattern="*-*-*-"))


@pytest.mark.parametrize("length", [63, 64, 65])
def test_there_is_a_mask_where_transformers_makes_one(length):
    config, rows = Gemma3TextConfig(hidden_size=16, sliding_window=64), torch.zeros(1, length, 16)
    config._attn_implementation = "sdpa"
    mask = create_sliding_window_causal_mask(config, rows, attention_mask=None, past_key_values=None, position_ids=torch.arange(length)[None])
    assert has_mask(BLOCKS, "W", length) == (mask is not None) and not has_mask(BLOCKS, "*", length)


def test_a_long_run_is_refused_with_what_it_would_take_and_forced_by_no_limit():
    with pytest.raises(ValueError, match=r"distill.max_hours is 2; without fused Mamba-2 kernels \(there are none for cpu\) this run takes at least .* years"):
        check_time(10**23, CPU, Precision.float32, processes=1, max_hours=2)
    check_time(10**23, CPU, Precision.float32, processes=1, max_hours=None)
    check_time(10**9, CPU, Precision.float32, processes=1, max_hours=2)


def test_it_is_refused_at_the_door_in_one_line(door, tmp_path, small_settings):
    finished = door(tmp_path, "stage=distill", *small_settings, "distill.max_hours=0")
    assert finished.returncode == 2 and "distill.max_hours is 0; without fused Mamba-2 kernels" in finished.stderr and len(finished.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()  # before any work
