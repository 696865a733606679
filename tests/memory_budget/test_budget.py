"""Budgets, workloads and units."""

import math

import pytest

from memory_budget.budget import PRESETS, Budget, fits, parse_budget
from memory_budget.calculator import memory_report
from memory_budget.units import GIB, format_gib
from memory_budget.workload import Workload


def test_a10g_leaves_the_published_budget():
    assert parse_budget("a10g").bytes == math.floor((22.06 * 0.95 - 1.3) * 2**30)
    assert round(parse_budget("A10G").bytes / GIB, 3) == 19.657


def test_published_student_fits_the_a10g_and_teacher_does_not(architecture_of):
    budget = parse_budget("a10g")
    assert fits(memory_report(architecture_of("nemotron-nano-9b-v2"), Workload()), budget)
    assert not fits(memory_report(architecture_of("nemotron-nano-12b-v2"), Workload()), budget)
    assert not fits(memory_report(architecture_of("nemotron-nano-depth-56"), Workload()), budget)


def test_a_number_is_gib_without_a_cushion():
    assert parse_budget("19.66").bytes == parse_budget(19.66).bytes == math.floor(19.66 * GIB)


@pytest.mark.parametrize(("text", "gib"), [("24", 24), ("24gb", 24), ("24 GiB", 24), ("0.5G", 0.5), ("4091", 4091)])
def test_gib_are_taken_as_people_write_them(text, gib):
    assert parse_budget(text).device_gib == gib


@pytest.mark.parametrize(("text", "card"), [("4090", "rtx4090"), ("rtx-4090", "rtx4090"), ("a10", "a10g"), ("h100", "h100-80"), ("5090", "rtx5090")])
def test_a_card_by_nearly_its_name_is_told_the_name(text, card):
    with pytest.raises(ValueError, match=f"; did you mean {card}"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["a11g", "-3", "0", "nan", "inf", "", "19,66", "1e300"])
def test_what_is_no_budget_is_refused_with_the_presets(text):
    with pytest.raises(ValueError, match=", ".join(PRESETS)):
        parse_budget(text)


@pytest.mark.parametrize(
    "sizes",
    [
        {"device_gib": 0},
        {"device_gib": 10, "cushion_fraction": 1},
        {"device_gib": 10, "set_aside_gib": -1},
        {"device_gib": 1, "set_aside_gib": 2},
    ],
    ids=str,
)
def test_a_budget_out_of_range_is_refused(sizes):
    with pytest.raises(ValueError, match="of budget x"):
        Budget("x", **sizes)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"context_tokens": 0}, r"context_tokens \(0\)"),
        ({"context_tokens": 1.5}, r"context_tokens \(1.5\)"),
        ({"batch": 0}, r"batch \(0\)"),
        ({"batch": True}, r"batch \(True\)"),
        ({"activation_tokens": -1}, r"activation_tokens \(-1\)"),
        ({"weights_dtype": "int3"}, r"weights_dtype \(int3\) must be one of .*int4"),
        ({"context_tokens": 2**53 + 1}, r"context_tokens \(9007199254740993\) must be at most 2\*\*53"),
        ({"kv_dtype": "int4"}, r"kv_dtype \(int4\)"),
        ({"ssm_dtype": "fp8"}, r"ssm_dtype \(fp8\)"),
    ],
    ids=str,
)
def test_a_workload_that_cannot_be_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Workload(**settings)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 GiB"),
        (GIB, "1.00 GiB"),
        (27_991_080_960, "26.07 GiB"),
        (7_785_000, "0.00725 GiB"),
        (-GIB // 2, "-0.500 GiB"),
        (1000 * GIB, "1000.00 GiB"),
        (1, "0.000000000931 GiB"),
    ],
)
def test_gib_are_shown_with_unit_and_three_significant_digits(num_bytes, text):
    assert format_gib(num_bytes) == text
