"""Options of every axis, and what no student can have."""

from dataclasses import replace

import pytest

from memory_budget.architecture import Architecture
from nas.space import SearchSpace, axis_options, check_space

TEACHER = Architecture(
    model_type="nemotron_h", pattern="M-M*-M-*-", hidden=32, vocab=97, ffn=48, num_attention_heads=4, num_key_value_heads=2, attention_head_dim=8,
    mamba_num_heads=8, mamba_head_dim=4, mamba_num_groups=4, mamba_state_size=6, mamba_conv_kernel=4,
)  # fmt: skip
SPACE = SearchSpace((7, 9), (24, 32), (32, 48), (4, 8), {"*": 1})


def test_a_range_holds_both_ends():
    assert axis_options("hidden", 128, None, 96, 128, 16) == (96, 112, 128)


def test_a_missing_end_is_the_teachers_value():
    assert axis_options("hidden", 128, None, 96, None, 16) == (96, 112, 128)
    assert axis_options("hidden", 128, None, None, None, 16) == (128,)


def test_values_are_sorted_and_counted_once():
    assert axis_options("layers", 62, [56, 52, 56], None, None, 1) == (52, 56)


def test_values_go_before_a_range():
    assert axis_options("layers", 62, [52], 54, 56, 1) == (52,)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([], None, None, 1), "search.ffn.values is empty"),
        ((None, 10, 20, 0), r"search.ffn.step \(0\) must be at least 1"),
        ((None, 30, 20, 1), r"search.ffn.low \(30\) must be at most high \(20\)"),
        ((None, 10, 20, 4), r"steps of 4 from 10 never meet high \(20\); nearest: 18, 22"),
        (([0, 5], None, None, 1), "search.ffn has the option 0; it must be at least 1"),
        ((None, 0, 20, 1), "search.ffn has the option 0; it must be at least 1"),
        (([65], None, None, 1), "search.ffn has the option 65, above the teacher's 64"),
        ((None, 60, 68, 1), "search.ffn has the option 68, above the teacher's 64"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        axis_options("ffn", 64, *arguments)


def test_a_space_of_possible_students_is_taken():
    check_space(SPACE, TEACHER)
    assert SPACE.size == 16


def test_channels_may_be_any_number_and_attention_heads_go_by_key_value_heads():
    space = replace(SPACE, mamba_head_dim=(1, 3, 4), num_attention_heads=(2, 4))
    check_space(space, TEACHER)
    assert space.size == 16 * 6


def test_an_axis_left_open_has_the_teachers_value_alone():
    assert SPACE.widths(TEACHER) == {"hidden": (24, 32), "ffn": (32, 48), "mamba_num_heads": (4, 8), "mamba_head_dim": (4,), "num_attention_heads": (4,),
                                     "num_key_value_heads": (TEACHER.num_key_value_heads,), "moe_num_experts": (0,), "moe_ffn": (0,),
                                     "moe_shared_ffn": (0,)}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mamba_num_heads": (4, 6)}, r"mamba heads to keep \(6\) must be a multiple of the 4 groups; nearest: 4, 8"),
        ({"mamba_num_heads": (2, 8)}, r"mamba heads to keep \(2\) must be a multiple of the 4 groups; nearest: 4$"),
        ({"num_attention_heads": (3, 4)}, r"attention heads to keep \(3\) must be a multiple of the 2 key-value heads; nearest: 2, 4"),
        ({"floors": {"*": 3}}, "search.floors keeps 3 layers of kind '\\*'; the teacher has 2"),
        ({"num_layers": (4, 9), "floors": {"*": 2, "M": 3}}, "search.layers has the option 4; the floors per kind of layer keep at least 5"),
    ],
)
def test_a_space_no_student_can_be_in_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        check_space(replace(SPACE, **change), TEACHER)


def test_a_floor_of_nothing_is_no_ask_of_a_kind_that_the_teacher_lacks():
    space = replace(SPACE, num_layers=(2,), mamba_num_heads=(0,), num_attention_heads=(4,), floors={"M": 0, "*": 0, "-": 0})
    blocks = replace(TEACHER, model_type="llama", pattern="*-" * 4, mamba_num_groups=0, mamba_num_heads=0)
    check_space(space, blocks)
    with pytest.raises(ValueError, match=r"search.floors keeps 1 layers of kind '\*'; the teacher's layers are of the kinds \['\*-'\]"):
        check_space(replace(space, floors={"*": 1}), blocks)
