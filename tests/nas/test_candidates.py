"""Every architecture of a space with its memory, held to the scalar calculator."""

import re

import numpy as np
import pytest

from memory_budget.architecture import Architecture
from memory_budget.calculator import memory_report
from memory_budget.parameters import count_total_parameters
from memory_budget.workload import Workload
from nas.candidates import enumerate_candidates, filter_fitting
from nas.space import SearchSpace

TEACHER = Architecture(
    model_type="nemotron_h", pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", hidden=5120, vocab=131072, ffn=20480,
    num_attention_heads=40, num_key_value_heads=8, attention_head_dim=128,
    mamba_num_heads=128, mamba_head_dim=80, mamba_num_groups=8, mamba_state_size=128, mamba_conv_kernel=4,
)  # fmt: skip
LAYERS = {60: tuple(range(2, 62)), 62: tuple(range(62))}
SPACE = SearchSpace((60, 62), tuple(range(4480, 5121, 128)), tuple(range(13440, 20481, 320)), (112, 120, 128), {})


@pytest.fixture(scope="module")
def candidates():
    return enumerate_candidates(TEACHER, SPACE, LAYERS, Workload())


@pytest.mark.parametrize(
    "workload",
    [Workload(), Workload(context_tokens=4096, batch=7, weights_dtype="int4", kv_dtype="fp8", ssm_dtype="bf16", activation_tokens=2048)],
    ids=["plain", "quantised"],
)
def test_every_row_has_the_bytes_of_the_scalar_calculator(workload):
    candidates = enumerate_candidates(TEACHER, SPACE, LAYERS, workload)
    for row in np.random.default_rng(0).choice(len(candidates), 60, replace=False).tolist():
        architecture = candidates.architecture(row)
        assert candidates.total_bytes[row] == memory_report(architecture, workload).total
        assert candidates.parameters[row] == count_total_parameters(architecture)


def test_rows_of_different_sizes_have_different_bytes(candidates):
    """The control: the comparison above would see one row taken for another."""
    assert len(set(candidates.total_bytes.tolist())) > 0.9 * len(candidates)


def test_every_architecture_of_the_space_is_there_once(candidates):
    identifiers = {candidates.identifier(row) for row in range(len(candidates))}
    assert len(identifiers) == len(candidates) == SPACE.size
    assert "L60-H4480-F13440-M112" in identifiers and "L62-H5120-F20480-M128" in identifiers


def test_a_rows_architecture_has_the_rows_sizes_and_its_depths_pattern(candidates):
    row = next(row for row in range(len(candidates)) if candidates.identifier(row) == "L60-H4608-F13760-M120")
    architecture = candidates.architecture(row)
    assert (architecture.hidden, architecture.ffn, architecture.mamba_num_heads, architecture.pattern) == (4608, 13760, 120, TEACHER.pattern[2:])
    assert type(architecture.hidden) is int


def test_only_what_is_within_the_budget_stays_and_all_of_it(candidates):
    budget = int(np.median(candidates.total_bytes))
    fitting = filter_fitting(candidates, budget)
    assert 0 < len(fitting) < len(candidates) and fitting.total_bytes.max() <= budget
    assert len(fitting) == (candidates.total_bytes <= budget).sum()


def test_a_candidate_of_exactly_the_budget_fits(candidates):
    smallest = int(candidates.total_bytes.min())
    assert len(filter_fitting(candidates, smallest)) == 1


def test_a_budget_that_nothing_fits_names_the_smallest_candidate(candidates):
    smallest = candidates.architecture(int(np.argmin(candidates.total_bytes)))
    gib = memory_report(smallest, Workload()).total / 2**30
    with pytest.raises(ValueError, match=re.escape(f"L60-H4480-F13440-M112, needs {gib:.2f} GiB")):
        filter_fitting(candidates, int(candidates.total_bytes.min()) - 1)
