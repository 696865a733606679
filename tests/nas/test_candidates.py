"""Every architecture of a space with its memory, held to the scalar calculator."""

import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from memory_budget.architecture import Architecture
from memory_budget.calculator import memory_report
from memory_budget.parameters import count_total_parameters
from memory_budget.workload import Workload
from nas import candidates as candidates_module
from nas.candidates import Candidates, enumerate_candidates, enumerate_fitting, filter_fitting
from nas.filters import Filters
from nas.space import WIDTHS, SearchSpace
from nas.throughput import DEVICES, Serving, tokens_per_second

TEACHER = Architecture(
    model_type="nemotron_h", pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", hidden=5120, vocab=131072, ffn=20480,
    num_attention_heads=40, num_key_value_heads=8, attention_head_dim=128,
    mamba_num_heads=128, mamba_head_dim=80, mamba_num_groups=8, mamba_state_size=128, mamba_conv_kernel=4,
)  # fmt: skip
LAYERS = {60: tuple(range(2, 62)), 62: tuple(range(62))}
SPACE = SearchSpace((60, 62), tuple(range(4480, 5121, 128)), tuple(range(13440, 20481, 320)), (112, 120, 128), {})
FIVE_AXES = SearchSpace((60, 62), (4480, 5120), (13440, 16960, 20480), (112, 128), {}, (48, 61, 80), (24, 32, 40))
COLUMNS = ("num_layers", *WIDTHS, "parameters", "total_bytes")


def assert_equal(first: Candidates, second: Candidates) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


@pytest.fixture(scope="module")
def candidates():
    return enumerate_candidates(TEACHER, SPACE, LAYERS, Workload())


@pytest.mark.parametrize("space", [SPACE, FIVE_AXES], ids=["three widths", "five widths"])
@pytest.mark.parametrize(
    "workload",
    [Workload(), Workload(context_tokens=4096, batch=7, weights_dtype="int4", kv_dtype="fp8", ssm_dtype="bf16", activation_tokens=2048)],
    ids=["plain", "quantised"],
)
def test_every_row_has_the_bytes_of_the_scalar_calculator(workload, space):
    candidates = enumerate_candidates(TEACHER, space, LAYERS, workload)
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


def test_an_axis_left_open_is_the_teachers(candidates):
    assert set(candidates.mamba_head_dim.tolist()) == {80} and set(candidates.num_attention_heads.tolist()) == {40}


def test_channels_and_attention_heads_are_named_where_they_are_not_the_teachers():
    candidates = enumerate_candidates(TEACHER, FIVE_AXES, LAYERS, Workload())
    identifiers = {candidates.identifier(row) for row in range(len(candidates))}
    assert len(identifiers) == len(candidates) == FIVE_AXES.size == 216
    assert {"L60-H4480-F13440-M112", "L62-H5120-F20480-M128-P48", "L62-H5120-F20480-M128-A24", "L62-H5120-F20480-M128-P61-A32"} <= identifiers


@pytest.mark.parametrize("points", [1, 7, 100])
def test_blocks_of_any_size_give_the_same_rows_in_the_same_order(monkeypatch, points):
    whole = enumerate_candidates(TEACHER, FIVE_AXES, LAYERS, Workload())
    monkeypatch.setattr(candidates_module, "BLOCK_POINTS", points)
    assert_equal(enumerate_candidates(TEACHER, FIVE_AXES, LAYERS, Workload()), whole)


def test_what_fits_is_what_filtering_everything_leaves(candidates, monkeypatch):
    monkeypatch.setattr(candidates_module, "BLOCK_POINTS", 50)
    budget = int(np.median(candidates.total_bytes))
    fitting, num_looked_at = enumerate_fitting(TEACHER, SPACE, LAYERS, Workload(), Filters(budget_bytes=budget))
    assert num_looked_at == len(candidates) == SPACE.size
    assert_equal(fitting, filter_fitting(candidates, budget))


def test_every_filter_keeps_those_that_the_scalar_formulas_pass(candidates):
    workload, serving = Workload(), Serving(device=DEVICES["a10g"], batch=2)
    middle = {name: int(np.median(getattr(candidates, name))) for name in ("parameters", "total_bytes")}
    speeds = [tokens_per_second(candidates.architecture(row), workload, serving) for row in range(len(candidates))]
    limits = {
        "max_parameters": (middle["parameters"], candidates.parameters <= middle["parameters"]),
        "min_bytes": (middle["total_bytes"], candidates.total_bytes >= middle["total_bytes"]),
        "max_bytes": (middle["total_bytes"], candidates.total_bytes <= middle["total_bytes"]),
        "min_tokens_per_second": (float(np.median(speeds)), np.array(speeds) >= np.median(speeds)),
    }
    for name, (limit, passes) in limits.items():
        filters = Filters(budget_bytes=2**40, serving=serving, **{name: limit})
        fitting, _ = enumerate_fitting(TEACHER, SPACE, LAYERS, workload, filters)
        assert 0 < passes.sum() < len(candidates)
        assert_equal(fitting, candidates.take(np.flatnonzero(passes)))


def test_memory_goes_by_what_fits_and_not_by_what_is_looked_at():
    space = SearchSpace((60, 62), tuple(range(4096, 5121, 8)), tuple(range(10241, 20481, 20)), (112, 120, 128), {})
    assert space.size > 390_000
    column = 8 * space.size

    def peak(budget_gib: float) -> int:
        tracemalloc.start()
        enumerate_fitting(TEACHER, space, LAYERS, Workload(), Filters(budget_bytes=int(budget_gib * 2**30)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(15.9) < 3 * column  # a few arrays of one block
    assert peak(40) > 8 * column  # the control: all of it


def test_depths_that_spell_one_pattern_are_one_architecture():
    space = replace(SPACE, num_layers=(59, 60, 62))
    layers = {**LAYERS, 59: LAYERS[60]}
    merged, num_looked_at = enumerate_fitting(TEACHER, space, layers, Workload(), Filters(budget_bytes=2**40))
    assert num_looked_at == len(merged) == SPACE.size == len(enumerate_candidates(TEACHER, space, layers, Workload()))
    assert set(merged.num_layers.tolist()) == {59, 62}


def test_depths_of_different_patterns_are_all_kept():
    """The control: as long, but not the same layers."""
    space = replace(SPACE, num_layers=(59, 60, 62))
    assert len(enumerate_candidates(TEACHER, space, {**LAYERS, 59: LAYERS[60][:-1]}, Workload())) == SPACE.size * 3 // 2


def test_a_columns_throughput_is_each_rows_own(candidates):
    workload, serving = Workload(), Serving(device=DEVICES["l4"])
    column = candidates.tokens_per_second(workload, serving)
    for row in (0, 5, len(candidates) // 2, len(candidates) - 1):
        assert column[row] == pytest.approx(tokens_per_second(candidates.architecture(row), workload, serving), rel=1e-12)
    assert len(set(column.tolist())) > 0.9 * len(candidates)
