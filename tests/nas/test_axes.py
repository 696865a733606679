"""The table of axes, and equations between sizes that a family insists on: steps that keep them, spaces and students that do not."""

from dataclasses import replace

import pytest

from memory_budget.architecture import Architecture
from memory_budget.workload import Workload
from minitron.families.blocks import transformers_config
from minitron.families.llama import LLAMA
from minitron.families.qwen import QWEN3
from minitron.pruning.plan import make_plan
from minitron.search.space import check_search, space_of
from minitron.settings.derived import axis_of, couplings_of
from minitron.settings.run import Settings
from minitron.settings.search import AxisSettings, FixedSettings, SearchSettings
from nas.axes import AXES, WIDTHS, axes_of, identifier, usual_step
from nas.candidates import enumerate_candidates, enumerate_fitting
from nas.depth import check_is_cut, kept_layers
from nas.filters import Filters, advice
from nas.space import SearchSpace, check_space

SMOLLM2 = Architecture(model_type="llama", pattern="*-" * 30, hidden=576, vocab=49152, tied_embeddings=True, ffn=1536, ffn_gated=True,
                       num_attention_heads=9, num_key_value_heads=3, attention_head_dim=64)  # fmt: skip
LLAMA_1B = replace(SMOLLM2, pattern="*-" * 16, hidden=2048, vocab=128256, ffn=8192, num_attention_heads=32, num_key_value_heads=8)
HYBRID = Architecture(model_type="nemotron_h", pattern="M-M*-M-*-", hidden=32, vocab=97, ffn=48, num_attention_heads=4, num_key_value_heads=2,
                      attention_head_dim=8, mamba_num_heads=8, mamba_head_dim=4, mamba_num_groups=4, mamba_state_size=6, mamba_conv_kernel=4)  # fmt: skip
COUPLING = r"hidden % num_attention_heads == 0"


def as_qwen3(architecture: Architecture) -> Architecture:
    return replace(architecture, model_type="qwen3", attention_qk_norm=True)


def options(architecture: Architecture, **axes) -> tuple[int, ...]:
    (name,) = axes
    return axis_of(Settings(search=SearchSettings(**axes)), name, architecture)


def space(architecture: Architecture, **axes) -> SearchSpace:
    return space_of(Settings(search=SearchSettings(**{name: AxisSettings(values=values) for name, values in axes.items()})), architecture)


# The table.


def test_a_model_has_the_axes_whose_size_is_not_0():
    assert axes_of(SMOLLM2) == ("layers", "hidden", "ffn", "attention_heads", "key_value_heads")
    assert axes_of(HYBRID) == tuple(name for name, axis in AXES.items() if axis.kind != "E")
    experts = {"moe_num_experts": 8, "moe_experts_per_token": 2, "moe_ffn": 16, "moe_shared_ffn": 32}
    assert axes_of(replace(HYBRID, pattern="MEM-*", **experts)) == tuple(AXES)
    assert axes_of(replace(HYBRID, pattern="MEE", **experts)) == ("layers", "hidden", "mamba_heads", "mamba_channels", "experts", "expert_ffn", "shared_ffn"), (
        "sizes of layers that the pattern lacks")


def test_an_identifier_says_what_is_usual_and_what_was_cut_beside_it():
    sizes = {"num_layers": 24, **{field: getattr(SMOLLM2, field) for field in WIDTHS}}
    assert identifier(SMOLLM2, sizes) == "L24-H576-F1536"
    assert identifier(SMOLLM2, sizes | {"num_attention_heads": 3, "num_key_value_heads": 1}) == "L24-H576-F1536-A3-K1"
    assert identifier(HYBRID, {"num_layers": 7, **{field: getattr(HYBRID, field) for field in WIDTHS}}) == "L7-H32-F48-M8"


def test_an_axis_that_a_model_lacks_cannot_be_given():
    assert options(SMOLLM2, mamba_heads=AxisSettings()) == (0,)
    said = "search.mamba_heads is given, but a llama has no such axis; it has layers, hidden, ffn, attention_heads, key_value_heads"
    with pytest.raises(ValueError, match=said):
        options(SMOLLM2, mamba_heads=AxisSettings(low=0.5))


# Steps.


@pytest.mark.parametrize(("hidden", "heads", "step"), [(576, 9, 72), (2048, 32, 128), (3072, 24, 384), (896, 14, 112), (48, 6, 24)])
def test_the_usual_step_of_hidden_keeps_a_llamas_equation(hidden, heads, step):
    sizes = replace(SMOLLM2, hidden=hidden, num_attention_heads=heads)
    assert usual_step(AXES["hidden"], sizes, LLAMA.couplings) == step and step % heads == 0
    assert usual_step(AXES["hidden"], sizes) == (128 if hidden >= 2048 else 16), "without it, the axis's own"


def test_shares_of_hidden_are_options_that_keep_it():
    assert options(SMOLLM2, hidden=AxisSettings(low=0.7)) == (432, 504, 576)  # 0.7 is 403.2, above which lies 432
    assert all(option % 9 == 0 for option in options(SMOLLM2, hidden=AxisSettings(low=0.3)))
    assert 560 in options(as_qwen3(SMOLLM2), hidden=AxisSettings(low=0.7)), "the control: qwen3 has no such equation"


@pytest.mark.parametrize(("architecture", "step"), [(SMOLLM2, 72), (as_qwen3(SMOLLM2), 128)])
def test_advice_is_a_step_that_keeps_it(architecture, step):
    text = advice(architecture, space(architecture), Workload(context_tokens=1024))
    assert f"search.hidden, by {step}:" in text or f"search.hidden helps most: each step of {step} saves" in text


# Spaces.


def test_options_that_no_loader_takes_are_refused_by_their_equation():
    said = rf"{COUPLING} holds for no options of search.hidden \(500, 560\) and search.attention_heads \(9\); no loader of llama takes another"
    with pytest.raises(ValueError, match=said):
        space(SMOLLM2, hidden=[500, 560])
    check_space(space(SMOLLM2, hidden=[500, 504]), SMOLLM2)
    check_space(space(as_qwen3(SMOLLM2), hidden=[500, 560]), as_qwen3(SMOLLM2))


def test_heads_that_follow_kv_heads_count_in_it():
    """With 1 of 3 KV heads there are 3 query heads, of which 500 is no multiple and 501 is."""
    check_space(space(SMOLLM2, hidden=[501], key_value_heads=[1]), SMOLLM2)
    with pytest.raises(ValueError, match=rf"{COUPLING} holds for no options of search.hidden \(500\) and search.attention_heads \(3\)"):
        space(SMOLLM2, hidden=[500], key_value_heads=[1])


def widths_of(candidates) -> set[tuple[int, int, int]]:
    return set(zip(*(getattr(candidates, name).tolist() for name in ("hidden", "num_attention_heads", "num_key_value_heads")), strict=True))


def test_only_candidates_that_keep_it_are_enumerated():
    layers, free, axes = {30: tuple(range(30))}, as_qwen3(SMOLLM2), {"hidden": [500, 504, 576], "attention_heads": [3, 6, 9]}
    found = enumerate_candidates(SMOLLM2, space(SMOLLM2, **axes), layers, Workload())
    assert widths_of(found) == {(504, 3, 3), (504, 6, 3), (504, 9, 3), (576, 3, 3), (576, 6, 3), (576, 9, 3)}
    assert len(enumerate_candidates(free, space(free, **axes), layers, Workload())) == 9
    fitting, looked_at = enumerate_fitting(SMOLLM2, space(SMOLLM2, **axes), layers, Workload(), Filters(budget_bytes=2**40))
    assert widths_of(fitting) == widths_of(found) and looked_at == 9


def test_candidates_that_break_it_are_counted_where_nothing_is_left():
    """The smallest that keeps to it is named, not the smallest of all."""
    both = space(SMOLLM2, hidden=[500, 504], attention_heads=[9])
    with pytest.raises(ValueError, match=rf"none of the 2 candidates passes: {COUPLING} .* removed 1, .* removed 1; the smallest, L30-H504-F1536, needs"):
        enumerate_fitting(SMOLLM2, both, {30: tuple(range(30))}, Workload(), Filters(budget_bytes=1))


def test_query_heads_follow_kv_heads_or_are_no_more_for_each_than_they_were():
    layers = {30: tuple(range(30))}
    assert widths_of(enumerate_candidates(SMOLLM2, space(SMOLLM2, key_value_heads=[1, 2, 3]), layers, Workload())) == {(576, 3, 1), (576, 6, 2), (576, 9, 3)}
    both = widths_of(enumerate_candidates(SMOLLM2, space(SMOLLM2, key_value_heads=[1, 2, 3], attention_heads=[2, 3, 6, 9]), layers, Workload()))
    assert both == {(576, 2, 1), (576, 3, 1), (576, 2, 2), (576, 6, 2), (576, 3, 3), (576, 6, 3), (576, 9, 3)}


# Students.


@pytest.mark.parametrize(("hidden", "heads", "keys"), [(500, 9, 3), (560, 3, 1)])
def test_a_student_that_breaks_it_is_refused_here_and_by_transformers(hidden, heads, keys):
    student = replace(SMOLLM2, hidden=hidden, num_attention_heads=heads, num_key_value_heads=keys)
    with pytest.raises(ValueError, match=f"the student breaks {COUPLING}: hidden is {hidden}, num_attention_heads {heads}; no loader of llama takes it"):
        check_is_cut(SMOLLM2, student, tuple(range(30)), couplings_of(SMOLLM2))
    with pytest.raises(ValueError, match=rf"hidden size \({hidden}\) is not a multiple of the number of attention heads \({heads}\)"):
        transformers_config(LLAMA.hf_config({"model_type": "llama"}, student))
    taken = as_qwen3(student)
    check_is_cut(as_qwen3(SMOLLM2), taken, tuple(range(30)), couplings_of(taken))
    assert transformers_config(QWEN3.hf_config({"model_type": "qwen3"}, taken)).head_dim == 64


def test_a_fixed_student_that_breaks_it_is_refused_before_any_work():
    for fixed in ({"hidden": 500}, {"hidden": 500, "layers": 20}):
        with pytest.raises(ValueError, match=f"the student breaks {COUPLING}: hidden is 500, num_attention_heads 9"):
            check_search(Settings(search=SearchSettings(fixed=FixedSettings(**fixed))), SMOLLM2)
    check_search(Settings(search=SearchSettings(fixed=FixedSettings(hidden=504, layers=20))), SMOLLM2)


@pytest.mark.parametrize("layers", [0, 31])
def test_a_fixed_depth_that_the_teacher_has_not_is_refused(layers):
    with pytest.raises(ValueError, match=rf"search.fixed.*layers.* \({layers}\) must be at least 1 and at most the teacher's 30"):
        check_search(Settings(search=SearchSettings(fixed=FixedSettings(layers=layers))), SMOLLM2)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"num_key_value_heads": 4, "num_attention_heads": 12}, r"num_attention_heads of the student \(12\) must be at most the teacher's \(9\)"),
        ({"num_key_value_heads": 1}, r"9 query heads for 1 KV heads are more for each than the teacher has \(9 for 3\)"),
        ({"attention_head_dim": 32}, r"attention_head_dim of the student \(32\) must equal the teacher's \(64\); it is not a cut axis"),
        ({"pattern": "*-" * 29}, r"kept layers give the pattern"),
        ({"pattern": "*-" * 29 + "-*"}, r"must be blocks of attention and FFN or experts, \*- or W- or \*E or WE, for llama"),
    ],
)
def test_a_student_that_is_no_cut_of_a_block_model_is_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        make_plan(SMOLLM2, replace(SMOLLM2, **sizes), tuple(range(30)), scores=None)


# Floors.


def test_blocks_are_kept_or_go_whole():
    assert kept_layers(SMOLLM2.layer_kinds, [3, 0, 5], 28, {}) == (1, 2, *range(4, 30))
    check_space(replace(space(SMOLLM2), floors={"M": 0, "*": 0, "-": 0}), SMOLLM2)  # what conf/run.yaml says
    with pytest.raises(ValueError, match=r"search.floors keeps 2 layers of kind '\*'; the teacher's layers are of the kinds \['\*-'\]"):
        check_space(replace(space(SMOLLM2), floors={"*": 2}), SMOLLM2)


# Two names of one size.


def test_an_axis_of_a_fixed_student_may_be_given_by_either_name_and_by_one_only():
    assert FixedSettings(mamba_heads=4, layers=8) == FixedSettings(mamba_num_heads=4, num_layers=8) != FixedSettings(mamba_num_heads=6, num_layers=8)
    for axis in AXES.values():
        if axis.name != axis.field:
            with pytest.raises(ValueError, match=rf"search.fixed has {axis.name} \(4\) and {axis.field} \(4\), two names of one size; give one"):
                FixedSettings(**{axis.name: 4, axis.field: 4})
    with pytest.raises(ValueError, match=r"search.fixed has a pattern and layers \(2\)"):
        FixedSettings(pattern="*-*-", layers=2)
