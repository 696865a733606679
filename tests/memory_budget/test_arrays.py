"""Sizes that are numpy arrays give, number by number, what the same sizes give one at a time."""

import random
from dataclasses import replace

import numpy
import pytest

from memory_budget.architecture import Architecture
from memory_budget.budget import Budget, fits
from memory_budget.calculator import NO_LIMIT, max_batch, max_context_tokens, memory_report
from memory_budget.parameters import count_active_parameters, count_parameters
from memory_budget.units import GIB
from memory_budget.workload import Workload

NUM_ARCHITECTURES = 40
PATTERNS = ["M-M*-", "ME*E", "M-*E", "*-*-", "**", "W-*-W-", "WW", "*EWE"]


def random_sizes(seed: int) -> list[dict[str, int]]:
    """Sizes of many architectures; MoE latent and shared widths are sometimes absent."""
    rng = random.Random(seed)
    return [
        {
            "hidden": rng.randrange(8, 6000),
            "ffn": rng.randrange(8, 25000),
            "num_attention_heads": rng.randrange(1, 64),
            "num_key_value_heads": rng.randrange(1, 9),
            "mamba_num_heads": rng.randrange(1, 200),
            "mamba_head_dim": rng.randrange(1, 128),
            "mamba_num_groups": rng.randrange(1, 9),
            "mamba_state_size": rng.randrange(1, 256),
            "moe_num_experts": rng.randrange(2, 128),
            "moe_ffn": rng.randrange(8, 4000),
            "moe_shared_ffn": rng.choice([0, 3712]),
            "moe_latent": rng.choice([0, 1024]),
        }
        for _ in range(NUM_ARCHITECTURES)
    ]


def architecture(pattern: str, sizes: dict) -> Architecture:
    return Architecture(
        model_type="nemotron_h",
        pattern=pattern,
        vocab=131072,
        attention_head_dim=128,
        window=70_000,
        mamba_conv_kernel=4,
        moe_experts_per_token=2,
        ffn_bias=True,
        ffn_gated="*E" in pattern,
        **sizes,
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "workload",
    [
        Workload(),
        Workload(batch=3, weights_dtype="int4", kv_dtype="fp8", ssm_dtype="bf16", activation_tokens=777),
        Workload(weights_dtype="fp8"),
    ],
    ids=str,
)
def test_arrays_equal_scalars_byte_for_byte(pattern, workload):
    rows = random_sizes(seed=PATTERNS.index(pattern))
    many = architecture(pattern, {name: numpy.array([row[name] for row in rows], dtype=numpy.int64) for name in rows[0]})
    reports = memory_report(many, workload).as_dict()
    counts = count_parameters(many)
    for index, row in enumerate(rows):
        one = architecture(pattern, row)
        for of_many, of_one in ((reports, memory_report(one, workload).as_dict()), (counts, count_parameters(one))):
            assert {name: int(numpy.broadcast_to(value, NUM_ARCHITECTURES)[index]) for name, value in of_many.items()} == of_one
        assert count_active_parameters(many)[index] == count_active_parameters(one)
        longest = max_context_tokens(one, workload, 30 * GIB)
        assert max_context_tokens(many, workload, 30 * GIB)[index] == (NO_LIMIT if longest is None else longest)
        assert max_batch(many, workload, 30 * GIB)[index] == max_batch(one, workload, 30 * GIB)
        assert fits(memory_report(many, workload), Budget("x", 30))[index] == fits(memory_report(one, workload), Budget("x", 30))


def test_axes_broadcast_against_each_other():
    base = architecture("M-*-", random_sizes(seed=1)[0])
    hidden, ffn = numpy.array([128, 256, 384])[:, None], numpy.array([512, 640])[None, :]
    totals = memory_report(replace(base, hidden=hidden, ffn=ffn), Workload()).total
    assert totals.shape == (3, 2)
    assert totals[2, 1] == memory_report(replace(base, hidden=384, ffn=640), Workload()).total != totals[1, 1]
