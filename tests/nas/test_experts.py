"""Mixtures of experts in the search: their axes, rules, limits on active parameters, and what decoding reads of them."""

import shutil
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from memory_budget.architecture import Architecture
from memory_budget.calculator import memory_report, weight_bytes
from memory_budget.parameters import count_active_parameters
from memory_budget.workload import Workload
from minitron.importance.removal import layer_rules, removable_layers
from minitron.search.space import check_search, space_of
from minitron.settings.derived import axis_of, floors
from minitron.settings.run import BudgetSettings, DepthLapSettings, ScoringSettings, Settings, TeacherSettings
from minitron.settings.search import AxisSettings, FixedSettings, SearchSettings
from minitron.settings.teachers import CONF_FOLDER
from minitron.walk.laps import depth_lap
from nas.axes import WIDTHS, identifier
from nas.candidates import enumerate_candidates, enumerate_fitting
from nas.depth import check_is_cut, kept_layers, spelled
from nas.exchange import from_export_config, to_export_config
from nas.filters import Filters, step_savings
from nas.throughput import flops_per_token, reached_experts, weight_bytes_per_pass

# Nemotron-3-Nano-30B-A3B, and blocks of which the first has no experts. Both have an FFN's size; the first has no FFN.
NANO = Architecture(model_type="nemotron_h", pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", hidden=2688, vocab=131072, ffn=1856,
                    num_attention_heads=32, num_key_value_heads=2, attention_head_dim=128, mamba_num_heads=64, mamba_head_dim=64, mamba_num_groups=8,
                    mamba_state_size=128, mamba_conv_kernel=4, moe_num_experts=128, moe_experts_per_token=6, moe_ffn=1856, moe_shared_ffn=3712)  # fmt: skip
BLOCKS = Architecture(model_type="qwen3_moe", pattern="*-" + "*E" * 5, hidden=64, vocab=97, ffn=96, ffn_gated=True, num_attention_heads=4,
                      num_key_value_heads=2, attention_head_dim=16, attention_qk_norm=True, moe_num_experts=16, moe_experts_per_token=3,
                      moe_ffn=48)  # fmt: skip
GROUPED = replace(NANO, moe_groups=8, moe_groups_per_token=2)
WORKLOAD = Workload(context_tokens=4096)


def settings(**search) -> Settings:
    """Lists are an axis's values."""
    given = {name: AxisSettings(values=value) if isinstance(value, list) else value for name, value in search.items()}
    return Settings(search=SearchSettings(**given), budget=BudgetSettings(name="mine", device_gib=100.0))


def sizes(architecture: Architecture, **changed: int) -> dict[str, int]:
    return {"num_layers": architecture.num_layers, **{field: getattr(architecture, field) for field in WIDTHS}, **changed}


# Axes.


def test_an_identifier_says_experts_where_they_are_cut_and_no_ffn_where_there_is_none():
    assert identifier(NANO, sizes(NANO)) == "L52-H2688-M64"
    assert identifier(NANO, sizes(NANO, moe_num_experts=96, moe_ffn=1280, moe_shared_ffn=2048)) == "L52-H2688-M64-E96-X1280-S2048"
    assert identifier(BLOCKS, sizes(BLOCKS)) == "L6-H64-F96"


def test_usual_steps_are_a_16th_of_the_experts_in_whole_groups_and_64_neurons():
    half = {name: axis_of(settings(**{name: AxisSettings(low=0.5)}), name, NANO) for name in ("experts", "expert_ffn", "shared_ffn")}
    assert half["experts"] == tuple(range(64, 129, 8)) and half["expert_ffn"][:2] == (960, 1024) and half["shared_ffn"][:2] == (1856, 1920)
    assert axis_of(settings(experts=AxisSettings(low=0.5)), "experts", GROUPED) == half["experts"]
    assert axis_of(settings(expert_ffn=AxisSettings(low=0.3)), "expert_ffn", BLOCKS) == (16, 32, 48), "small ones by 16"


def test_what_the_pattern_lacks_is_no_axis_and_stays_as_it_is():
    for ask in ({"ffn": [960]}, {"fixed": FixedSettings(ffn=960)}):
        with pytest.raises(ValueError, match=r"ffn is given, but a nemotron_h has no such axis; it has layers, hidden, mamba_heads, .*, experts, "):
            check_search(settings(**ask), NANO)
    candidates = enumerate_candidates(NANO, space_of(settings(experts=[96, 128]), NANO), {52: tuple(range(52))}, WORKLOAD)
    assert candidates.architecture(1) == NANO and candidates.architecture(0) == replace(NANO, moe_num_experts=96)


def test_an_export_config_has_nvidias_names_of_experts():
    student = replace(NANO, moe_num_experts=96, moe_ffn=1280, moe_shared_ffn=2560)
    config = to_export_config(student)
    assert config.items() >= {"num_moe_experts": 96, "moe_ffn_hidden_size": 1280, "moe_shared_expert_intermediate_size": 2560}.items()
    assert replace(NANO, **from_export_config(config, NANO).sizes) == student
    with pytest.raises(ValueError, match="export_config has moe_ffn_hidden_size, .*; it may have num_layers"):
        from_export_config(config, replace(NANO, pattern="M-*"))


# Rules.

REFUSED = {
    "fewer than a token goes to": (NANO, {"experts": [4, 64]}, r"search.experts has the option 4; it must be at least 6: a token goes to 6 experts$"),
    "not as many of each group": (GROUPED, {"experts": [100]}, r"experts to keep \(100\) must be a multiple of the 8 routing groups; nearest: 96, 104"),
    "too few in a token's groups": (GROUPED, {"experts": [16]}, r"it must be at least 24: a token goes to 6 experts, in 2 of 8 routing groups of two or more"),
    "fixed": (NANO, {"fixed": FixedSettings(experts=4)}, r"search.fixed: experts per token \(6\) must be at most the number of experts \(4\)"),
    "a layer without": (NANO, {"protect_experts": {"0": [1]}}, "search.protect_experts names layer 0; it must be one with experts: 1, 3, 6, "),
    "a layer beyond": (BLOCKS, {"protect_experts": {"6": [1]}}, "names layer 6; it must be one with experts: 1, 2, 3, 4, 5$"),
    "an expert beyond": (BLOCKS, {"protect_experts": {"1": [16]}}, "names expert 16 of layer 1; its experts are 0 to 15"),
    "more than stay": (BLOCKS, {"experts": [4], "protect_experts": {"1": [0, 1, 2, 3, 9]}},
                       r"has \[0, 1, 2, 3, 9\] of layer 1; search.experts leaves 4 experts in a layer, so no"),
    "more than stay of a group": (GROUPED, {"experts": [24], "protect_experts": {"1": [0, 1, 2, 15]}}, r"leaves 24 experts in a layer of 8 routing groups, 3"),
    "few active parameters": (NANO, {"experts": [96], "max_active_parameters": 3_000_000_000},
                              r"search.max_active_parameters \(3,000,000,000\) lets none of the 1 candidates pass; the smallest, L52-.*-E96, has at least 3,5"),
    "a floor of the other kind": (NANO, {"floors": {"ffn": 1}}, r"search.floors keeps 1 layers of kind '-'; .* of the kinds \['\*', 'E', 'M'\]"),
    "a floor above": (BLOCKS, {"floors": {"moe": 6}}, r"search.floors keeps 6 layers of kind '\*E'; the teacher has 5"),
    "a floor of all": (BLOCKS, {"floors": {"attention": 2}}, r"search.floors keeps 2 layers of kind '\*'; the teacher's layers are of the kinds"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_router_can_do_is_refused_before_any_work(what):
    teacher, ask, said = REFUSED[what]
    with pytest.raises(ValueError, match=said):
        check_search(settings(**ask), teacher)


def test_what_it_can_do_is_not():
    check_search(settings(experts=[6, 96]), NANO)
    check_search(settings(experts=[24, 96], protect_experts={"1": [0, 1, 15, 16]}), GROUPED)
    check_search(settings(fixed=FixedSettings(experts=4), protect_experts={"1": [0, 1, 2, 9]}), BLOCKS)


@pytest.mark.parametrize("field", ["moe_experts_per_token", "moe_latent", "moe_groups", "moe_groups_per_token"])
def test_how_tokens_are_routed_is_the_teachers(field):
    student = replace(GROUPED, moe_num_experts=64)
    check_is_cut(GROUPED, student, tuple(range(52)))
    with pytest.raises(ValueError, match=rf"{field} of the student .* must equal the teacher's .*; it is not a cut axis"):
        check_is_cut(GROUPED, replace(student, **{field: {"moe_groups": 4}.get(field, 1)}), tuple(range(52)))


def test_a_floor_is_of_the_blocks_that_have_the_mixer():
    asked = Settings(search=SearchSettings(floors={"ffn": 1, "moe": 4}), scoring=ScoringSettings(ceilings={"moe": 4}))
    assert floors(asked, BLOCKS) == {"*-": 1, "*E": 4} and floors(asked, NANO) == {"-": 1, "E": 4}
    assert spelled(BLOCKS, kept_layers(BLOCKS.layer_kinds, [0, 1, 2, 3], 5, floors(asked, BLOCKS))) == "*-" + "*E" * 4
    assert spelled(BLOCKS, kept_layers(BLOCKS.layer_kinds, [0, 1, 2, 3], 5, {})) == "*E" * 5, "the control"
    rules = layer_rules(asked, BLOCKS.layer_kinds)
    assert rules.ceilings == {"*E": 4} and removable_layers(BLOCKS.layer_kinds, range(6), 5, rules) == [1, 2, 3, 4, 5]


def test_the_first_of_two_laps_reckons_with_the_fewest_experts_that_the_second_may_keep(tmp_path):
    shutil.copy(CONF_FOLDER / "architectures" / "nemotron-3-nano-30b-a3b.json", tmp_path / "config.json")
    laps = replace(settings(layers=[46, 52], experts=[96, 128], max_active_parameters=10**9), depth_lap=DepthLapSettings(enabled=True),
                   teacher=TeacherSettings(path=str(tmp_path)))  # fmt: skip
    first = depth_lap(laps).search
    assert first.later_widths.given() == {"hidden": 2688, "ffn": 1856, "mamba_num_heads": 64, "moe_num_experts": 96}
    assert first.experts == AxisSettings() and first.max_active_parameters is None


# Active parameters.


def test_only_candidates_whose_active_parameters_are_few_enough_pass():
    space = space_of(settings(experts=[64, 128], expert_ffn=[960, 1856], hidden=[2048, 2688]), NANO)
    layers = {52: tuple(range(52))}
    everything = enumerate_candidates(NANO, space, layers, WORKLOAD)
    active = [count_active_parameters(everything.architecture(row)) for row in range(len(everything))]
    np.testing.assert_array_equal(everything.active_parameters(), active)
    most = sorted(active)[3]
    passing, looked_at = enumerate_fitting(NANO, space, layers, WORKLOAD, Filters(budget_bytes=2**40, max_active_parameters=most))
    assert looked_at == 8 and passing.active_parameters().tolist() == [one for one in active if one <= most] != active
    with pytest.raises(ValueError, match=r"search.max_active_parameters of 1,000 removed 8"):
        enumerate_fitting(NANO, space, layers, WORKLOAD, Filters(budget_bytes=2**40, max_active_parameters=1000))


def test_fewer_experts_are_other_bytes_and_as_many_active_parameters_but_the_routers():
    fewer = replace(NANO, moe_num_experts=96)
    assert count_active_parameters(NANO) - count_active_parameters(fewer) == 23 * 32 * 2688
    assert memory_report(NANO, WORKLOAD).total - memory_report(fewer, WORKLOAD).total == 2 * 23 * 32 * (2 * 1856 * 2688 + 2688)


def test_what_a_step_down_saves_is_said_of_experts_too_but_not_below_what_a_token_goes_to():
    space = space_of(settings(experts=[8, 16], expert_ffn=[48]), BLOCKS)
    smallest = replace(BLOCKS, moe_num_experts=8)
    assert step_savings(smallest, space, WORKLOAD).keys() == {"ffn", "layers"}, "8 fewer would be none"
    space = space_of(settings(experts=[8, 12]), BLOCKS)
    assert step_savings(smallest, space, WORKLOAD)["experts"] == (4, 2 * 5 * 4 * (3 * 48 + 1) * 64)


# Throughput.


@pytest.mark.parametrize(("experts", "per_token", "tokens"), [(4, 2, 3), (5, 1, 4), (3, 3, 2)])
def test_the_experts_that_tokens_reach_are_those_of_all_ways_to_send_them(experts, per_token, tokens):
    """The oracle sends each token to every set of experts in turn. The control: as if no two tokens met at one."""
    ways = [set().union(*way) for way in product(combinations(range(experts), per_token), repeat=tokens)]
    one = replace(NANO, moe_num_experts=experts, moe_experts_per_token=per_token)
    assert reached_experts(one, tokens) == pytest.approx(np.mean([len(way) for way in ways]), rel=1e-12)
    assert experts == per_token or reached_experts(one, tokens) < min(experts, tokens * per_token) - 0.1


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_a_pass_reads_the_experts_that_its_tokens_reach_and_all_else(dtype):
    """One token reads what is active, many read everything; in between by hand. The control: a model of FFNs reads the same whatever the tokens."""
    workload = replace(WORKLOAD, weights_dtype=dtype)
    embedding = 2 * 131072 * 2688
    whole, active = (weight_bytes(NANO, dtype, active_only=one) - embedding for one in (False, True))
    read = [weight_bytes_per_pass(NANO, workload, tokens=tokens) for tokens in (1, 8, 100_000)]
    assert read[0] == pytest.approx(active, rel=1e-12) and read[2] == pytest.approx(whole, rel=1e-12)
    each = (whole - active) / (128 - 6)
    assert read[1] == pytest.approx(active + (128 * (1 - (1 - 6 / 128) ** 8) - 6) * each, rel=1e-12)
    dense = replace(NANO, pattern="M-*")
    assert weight_bytes_per_pass(dense, workload, tokens=1) == weight_bytes_per_pass(dense, workload, tokens=8)


def test_a_token_costs_the_products_of_its_own_experts_the_shared_one_and_the_router():
    one = replace(NANO, pattern="ME")
    experts = 2 * (6 * 2 * 1856 * 2688 + 2 * 3712 * 2688 + 128 * 2688)
    assert flops_per_token(one, 1) - flops_per_token(replace(one, pattern="M"), 1) == experts
    assert flops_per_token(replace(one, moe_num_experts=64), 1) == flops_per_token(one, 1) - 2 * 64 * 2688, "as many a token, a smaller router"
    assert flops_per_token(replace(one, moe_experts_per_token=12), 1) == flops_per_token(one, 1) + 2 * 6 * 2 * 1856 * 2688
