"""What is said where no candidate passes."""

import re
from collections import Counter
from dataclasses import replace

import pytest

from memory_budget.architecture import Architecture
from memory_budget.calculator import memory_report
from memory_budget.workload import Workload
from nas.candidates import enumerate_fitting
from nas.filters import Filters, advice, step_savings
from nas.space import SearchSpace
from nas.throughput import DEVICES, Serving

TEACHER = Architecture(
    model_type="nemotron_h", pattern="M-M-M*-M-M*-M-M*-M-M-", hidden=128, vocab=2048, ffn=512, num_attention_heads=8, num_key_value_heads=2,
    attention_head_dim=16, mamba_num_heads=16, mamba_head_dim=16, mamba_num_groups=2, mamba_state_size=32, mamba_conv_kernel=4,
)  # fmt: skip
WORKLOAD = Workload(context_tokens=4096)
SPACE = SearchSpace((17, 19, 21), (96, 112, 128), (320, 384, 448, 512), (12, 14, 16), {"*": 3})
LAYERS = {depth: tuple(range(depth)) for depth in SPACE.num_layers}
SMALLEST = replace(TEACHER, pattern=TEACHER.pattern[:17], hidden=96, ffn=320, mamba_num_heads=12)


def size(architecture: Architecture) -> int:
    return memory_report(architecture, WORKLOAD).total


def without(kinds: str) -> int:
    """Bytes of the smallest less a layer of each of those kinds."""
    pattern = SMALLEST.pattern
    for kind, number in Counter(kinds).items():
        pattern = pattern.replace(kind, "", number)
    assert len(pattern) == len(SMALLEST.pattern) - len(kinds)
    return size(replace(SMALLEST, pattern=pattern))


def refusal(**limits) -> str:
    with pytest.raises(ValueError) as caught:
        enumerate_fitting(TEACHER, SPACE, LAYERS, WORKLOAD, Filters(**limits))
    return str(caught.value)


def test_each_axis_saves_what_the_scalar_calculator_says_of_one_step_less():
    whole = size(SMALLEST)
    two_less = [without(kinds) for kinds in ("MM", "M-", "--")]  # the floor keeps the attention layers
    assert step_savings(SMALLEST, SPACE, WORKLOAD) == {
        "hidden": (16, whole - size(replace(SMALLEST, hidden=80))),
        "ffn": (64, whole - size(replace(SMALLEST, ffn=256))),
        "mamba_heads": (2, whole - size(replace(SMALLEST, mamba_num_heads=10))),
        "layers": (2, whole - min(two_less)),
    }
    assert len({whole - size(replace(SMALLEST, hidden=80)), whole - min(two_less), *two_less}) == 5


def test_a_depth_step_leaves_the_floors_alone():
    """The attention layers are what takes most; with the floor of 3 they stay, without it they go."""
    attention = size(SMALLEST) - without("**")
    assert step_savings(SMALLEST, SPACE, WORKLOAD)["layers"][1] < attention
    assert step_savings(SMALLEST, replace(SPACE, floors={}), WORKLOAD)["layers"] == (2, attention)


def test_axes_that_the_space_does_not_cut_are_no_advice_until_it_does():
    assert not {"mamba_channels", "attention_heads"} & set(step_savings(SMALLEST, SPACE, WORKLOAD))
    wider = replace(SPACE, mamba_head_dim=(12, 16), num_attention_heads=(6, 8))
    assert {"mamba_channels", "attention_heads"} < set(step_savings(SMALLEST, wider, WORKLOAD))


def test_an_axis_with_one_option_goes_by_its_usual_step():
    narrow = SearchSpace((17,), (96,), (320,), (12,), {})
    assert {setting: step for setting, (step, _) in step_savings(SMALLEST, narrow, WORKLOAD).items()} == {"ffn": 64, "mamba_heads": 2, "layers": 1}


def test_the_best_axis_is_named_first_with_its_step():
    savings = step_savings(SMALLEST, SPACE, WORKLOAD)
    best = max(savings, key=lambda setting: savings[setting][1])
    text = advice(SMALLEST, SPACE, WORKLOAD)
    assert re.match(rf"lowering search\.{best} helps most: each step of {savings[best][0]} saves [\d.]+ GiB; ", text)
    assert all(f"search.{setting}" in text for setting in savings)


def test_another_workload_has_another_best_axis():
    """The control: the advice follows the numbers. With a long context it is keys and values that cost, in attention layers."""
    free = replace(SPACE, floors={}, num_layers=(17, 18, 19))
    assert advice(SMALLEST, free, Workload(context_tokens=2**20)).startswith("lowering search.layers")
    assert advice(SMALLEST, SearchSpace((17,), (16, 96), (320,), (12,), {}), Workload(context_tokens=1)).startswith("lowering search.hidden")


def test_nothing_within_the_budget_says_what_would_help():
    text = refusal(budget_bytes=size(SMALLEST) - 1)
    assert "none of the 108 candidates passes: budget of" in text and "removed 108; the smallest, L17-H96-F320-M12, needs" in text
    assert text.endswith(advice(SMALLEST, SPACE, WORKLOAD)) and "\n" not in text


def test_every_filter_says_how_many_it_removed_of_those_before_it():
    budget = size(replace(SMALLEST, ffn=384))
    text = refusal(budget_bytes=budget, max_parameters=1000)
    within = re.search(r"budget of .* removed (\d+), search.max_parameters of 1,000 removed (\d+);", text)
    assert int(within[1]) + int(within[2]) == 108 and int(within[2]) >= 2
    assert "lowering" not in text  # memory is not what stands in the way


def test_a_speed_that_none_has_is_named_with_its_device():
    text = refusal(budget_bytes=2**40, min_tokens_per_second=1e12, serving=Serving(device=DEVICES["l4"]))
    assert "search.min_tokens_per_second of 1e+12 on l4 removed 108" in text


def test_a_budget_of_exactly_the_smallest_is_enough():
    fitting, _ = enumerate_fitting(TEACHER, SPACE, LAYERS, WORKLOAD, Filters(budget_bytes=size(SMALLEST)))
    assert [fitting.identifier(row) for row in range(len(fitting))] == ["L17-H96-F320-M12"]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"min_bytes": 2**31}, r"search.min_gib \(2.00 GiB\) must be at most the budget and search.max_gib, 1.00 GiB"),
        ({"min_bytes": 2**29, "max_bytes": 2**28}, r"search.min_gib \(0.500 GiB\).*0.250 GiB"),
        ({"min_tokens_per_second": 5.0}, r"search.min_tokens_per_second \(5.0\) needs a device"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(limits, said):
    with pytest.raises(ValueError, match=said):
        Filters(budget_bytes=2**30, **limits)
