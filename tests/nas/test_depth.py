"""Which layers stay, from an order of removal and floors per kind."""

import pytest

from nas.depth import check_layer_order, kept_layers


def spelled(pattern, layers) -> str:
    return "".join(pattern[layer] for layer in layers)


def test_the_published_student_comes_of_an_order_and_the_attention_floor(published_patterns, published_order):
    """N2, arXiv 2508.14444: 62 → 56 layers, four attention layers stay; the order's third attention layer is passed over."""
    teacher, student = published_patterns
    assert spelled(teacher, kept_layers(teacher, published_order, 56, {"*": 4})) == student


def test_without_the_floor_the_same_order_gives_another_student(published_patterns, published_order):
    teacher, student = published_patterns
    kept = kept_layers(teacher, published_order, 56, {})
    assert spelled(teacher, kept) != student and spelled(teacher, kept).count("*") == 3


def test_layers_go_in_the_given_order_until_the_depth_is_reached():
    assert kept_layers("M-M*-", [4, 0, 2], 3, {}) == (1, 2, 3)


def test_a_deeper_candidate_keeps_all_that_a_shallower_one_keeps(published_patterns, published_order):
    teacher, _ = published_patterns
    kept = [set(kept_layers(teacher, published_order, depth, {"*": 4})) for depth in (52, 54, 56, 62)]
    assert all(fewer < more for fewer, more in zip(kept, kept[1:], strict=False)) and len(kept[-1]) == 62


def test_no_layer_goes_at_the_teachers_depth():
    assert kept_layers("M-M*-", [0], 5, {"M": 2}) == (0, 1, 2, 3, 4)


def test_an_order_too_short_for_the_depth_is_refused():
    with pytest.raises(ValueError, match=r"search.layers has the option 2, but the layer order and the floors reach only 3 layers"):
        kept_layers("M-M*-", [4, 0], 2, {})


def test_floors_that_stop_the_removal_are_refused():
    with pytest.raises(ValueError, match="reach only 4 layers"):
        kept_layers("M-M*-", [4, 0, 2, 3], 3, {"M": 2, "*": 1})


@pytest.mark.parametrize(("order", "said"), [([0, 9], "names layer 9; the teacher has layers 0 to 4"), ([-1], "names layer -1"), ([2, 1, 2], "layer 2 twice")])
def test_an_order_of_layers_the_teacher_lacks_is_refused(order, said):
    with pytest.raises(ValueError, match=said):
        check_layer_order(order, 5)


def test_an_order_of_layers_the_teacher_has_is_taken():
    check_layer_order([4, 0, 2], 5)
