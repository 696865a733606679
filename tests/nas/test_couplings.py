"""Sizes that follow from others by an equation: Mamba-2's hidden size and heads, which a whole expansion ties to each other."""

import json
from dataclasses import replace

import pytest

from memory_budget.architecture import Architecture
from memory_budget.calculator import memory_report
from memory_budget.parameters import count_total_parameters
from memory_budget.workload import Workload
from minitron.plan.students import students_of
from minitron.search.space import check_search, fixed_student, space_of
from minitron.settings.derived import axis_of, couplings_of, fixed_sizes, ranks_refitted, ranks_rotated
from minitron.settings.follow import axis_lows
from minitron.settings.run import BudgetSettings, DepthLapSettings, PruneMethod, PruneSettings, Settings, TeacherSettings, WorkloadSettings
from minitron.settings.search import AxisSettings, FixedSettings, SearchSettings
from minitron.walk.laps import depth_lap
from nas.axes import AXES, usual_step
from nas.candidates import enumerate_candidates
from nas.filters import step_savings

# mamba2-130m, whose heads are in one group, and Mamba-Codestral-7B with 8.
SMALL = Architecture(model_type="mamba2", pattern="M" * 24, hidden=768, vocab=50288, tied_embeddings=True, mamba_num_heads=24, mamba_head_dim=64,
                     mamba_num_groups=1, mamba_state_size=128, mamba_conv_kernel=4)  # fmt: skip
CODESTRAL = replace(SMALL, pattern="M" * 64, hidden=4096, vocab=32768, tied_embeddings=False, mamba_num_heads=128, mamba_num_groups=8)
WITHOUT = replace(SMALL, model_type="nemotron_h", tied_embeddings=False)  # the control: the same layers in a family without the equation
EQUATION = "expand × hidden_size == num_heads × head_dim with a whole expand"


def searched(method: PruneMethod = PruneMethod.slice, **axes) -> Settings:
    options = {name: AxisSettings(values=given) if isinstance(given, list) else AxisSettings(low=given) for name, given in axes.items()}
    budget, workload = BudgetSettings(name="mine", device_gib=100.0), WorkloadSettings(context_tokens=1024)
    return Settings(search=SearchSettings(**options), budget=budget, workload=workload, prune=PruneSettings(method=method))


def fixed(**sizes) -> Settings:
    return replace(searched(), search=SearchSettings(fixed=FixedSettings(**sizes)))


def widths(teacher: Architecture, **axes) -> set[tuple[int, int, int]]:
    """Hidden size, heads and channels of every candidate at full depth."""
    layers = {teacher.num_layers: tuple(range(teacher.num_layers))}
    found = enumerate_candidates(teacher, space_of(searched(**axes), teacher), layers, Workload())
    return set(zip(*(getattr(found, name).tolist() for name in ("hidden", "mamba_num_heads", "mamba_head_dim")), strict=True))


# Candidates.


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({"hidden": [512, 768]}, {(512, 16, 64), (768, 24, 64)}),
        ({"mamba_heads": [12, 20, 24]}, {(384, 12, 64), (640, 20, 64), (768, 24, 64)}),
        ({"mamba_channels": [32, 64]}, {(384, 24, 32), (768, 24, 64)}),
        ({"hidden": [384, 768], "mamba_channels": [32]}, {(384, 24, 32)}),  # 768 would want 48 heads, twice the teacher's
        ({"mamba_heads": [12], "mamba_channels": [32]}, {(192, 12, 32)}),
        ({"hidden": [500, 512]}, {(512, 16, 64)}),  # 1,000 channels are no whole heads of 64
        ({"hidden": [768], "mamba_heads": [12, 24]}, {(768, 12, 64), (768, 24, 64)}),  # given as it is, it does not follow; expand becomes 1
        ({"hidden": [512, 640], "mamba_heads": [20, 24]}, {(512, 24, 64), (640, 20, 64)}),  # expand 3 and 2; the others are none
    ],
)
def test_what_is_given_moves_what_is_not_and_what_is_given_is_held_to_the_equation(axes, expected):
    assert widths(SMALL, **axes) == expected
    without = {name: axes.get(name, [AXES[name].size(WITHOUT)]) for name in ("hidden", "mamba_heads", "mamba_channels")}
    assert len(widths(WITHOUT, **axes)) == len(without["hidden"]) * len(without["mamba_heads"]) * len(without["mamba_channels"])


def test_heads_that_follow_are_whole_numbers_for_each_group():
    """Of 8 groups: 4,096 − 128 would have 124 heads, 15.5 a group."""
    assert widths(CODESTRAL, hidden=[3840, 3968, 4096]) == {(3840, 120, 64), (4096, 128, 64)}
    assert (3968, 124, 64) in widths(replace(CODESTRAL, mamba_num_groups=4), hidden=[3840, 3968, 4096])


def test_candidates_with_sizes_that_follow_are_counted_as_one_at_a_time():
    space, layers = space_of(searched(hidden=[512, 640, 768]), SMALL), {24: tuple(range(24))}
    found = enumerate_candidates(SMALL, space, layers, Workload(context_tokens=512))
    for row in range(len(found)):
        one = found.architecture(row)
        assert found.parameters[row] == count_total_parameters(one) and found.total_bytes[row] == memory_report(one, Workload(context_tokens=512)).total
    assert len(found) == 3 and {found.identifier(row) for row in range(3)} == {"L24-H512-M16", "L24-H640-M20", "L24-H768-M24"}


# Steps and shares.


@pytest.mark.parametrize(("teacher", "steps"), [
    (SMALL, {"hidden": 32, "mamba_heads": 1, "mamba_channels": 8}),
    (CODESTRAL, {"hidden": 256, "mamba_heads": 8, "mamba_channels": 8}),
    (replace(SMALL, hidden=256, mamba_head_dim=32), {"hidden": 32, "mamba_heads": 3, "mamba_channels": 8}),
])  # fmt: skip
def test_usual_steps_keep_the_equation(teacher, steps):
    """The last has an expand of 3, so three heads of 32 channels go with 32 of hidden size."""
    found = {name: usual_step(AXES[name], teacher, couplings_of(teacher)) for name in steps}
    assert found == steps
    for name, step in found.items():
        options = [size for size in (AXES[name].size(teacher) - step, AXES[name].size(teacher)) if size > 0]
        assert len(widths(teacher, **{name: options})) == len(options)


def test_all_options_of_a_share_are_candidates():
    options = axis_of(searched(hidden=0.7), "hidden", CODESTRAL)
    assert options == tuple(range(3072, 4097, 256)) and len(widths(CODESTRAL, hidden=0.7)) == len(options)


@pytest.mark.parametrize("teacher", [SMALL, CODESTRAL])
def test_what_follows_a_budget_opens_hidden_and_leaves_heads_to_follow(teacher):
    workload = Workload(context_tokens=4096)
    lows = axis_lows(teacher, workload, memory_report(teacher, workload).total * 3 // 4)
    assert {name for name, low in lows.items() if low is not None} == {"layers", "hidden"}
    check_search(searched(layers=lows["layers"], hidden=lows["hidden"]), teacher)


def test_advice_lowers_heads_with_the_hidden_size():
    smallest, space = replace(SMALL, hidden=512, mamba_num_heads=16), space_of(searched(hidden=[512, 768]), SMALL)
    step, saved = step_savings(smallest, space, Workload())["hidden"]
    alone, along = (memory_report(replace(smallest, hidden=512 - step, **heads), Workload()).total for heads in ({}, {"mamba_num_heads": 8}))
    total = memory_report(smallest, Workload()).total
    assert saved == total - along > total - alone and "mamba_heads" not in step_savings(smallest, space, Workload())


# Fixed students.


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"hidden": 512}, (512, 16, 64)), ({"mamba_heads": 12}, (384, 12, 64)), ({"mamba_channels": 32}, (384, 24, 32)), ({"hidden": 768, "mamba_num_heads": 12},
      (768, 12, 64)), ({"hidden": 256, "mamba_heads": 8, "mamba_channels": 64}, (256, 8, 64)), ({"layers": 12}, (768, 24, 64))],
)  # fmt: skip
def test_a_fixed_size_moves_what_is_not_fixed(given, expected):
    student = fixed_student(fixed(**given), SMALL)
    assert (student.hidden, student.mamba_num_heads, student.mamba_head_dim) == expected
    check_search(fixed(**given), SMALL)


def test_a_files_sizes_are_all_given(tmp_path):
    (tmp_path / "export.json").write_text(json.dumps({"hidden_size": 512, "mamba_num_heads": 16}))
    assert fixed_sizes(fixed(file=str(tmp_path / "export.json")), SMALL) == {"hidden": 512, "mamba_num_heads": 16, "pattern": SMALL.pattern}


MISTAKES = {
    "no whole heads": (lambda: fixed(hidden=500), SMALL,
                       rf"search.fixed has hidden \(500\), from which no mamba_heads follows .*: {EQUATION}; it must be a multiple of 32, nearest: 480, 512"),
    "no whole groups": (lambda: fixed(hidden=3968), CODESTRAL, r"search.fixed has hidden \(3968\), from which .* a multiple of 256, nearest: 3840, 4096"),
    "no whole hidden": (lambda: fixed(mamba_heads=10), replace(SMALL, hidden=256, mamba_head_dim=32), r"has mamba_heads \(10\), from which no hidden follows"),
    "two that clash": (lambda: fixed(hidden=512, mamba_heads=20), SMALL,
                       f"the student breaks {EQUATION}: hidden is 512, mamba_num_heads 20, mamba_head_dim 64; no loader of mamba2 takes it"),
    "heads and groups": (lambda: fixed(mamba_heads=60), CODESTRAL, r"mamba heads \(60\) must be a multiple of the 8 groups; nearest: 56, 64"),
    "above the teacher": (lambda: fixed(hidden=1024), SMALL, r"hidden of the student \(1024\) must be at most the teacher's \(768\)"),
    "more heads than there are": (lambda: searched(hidden=[768], mamba_channels=[32]), SMALL, rf"{EQUATION} holds for no options of .* \(none follows\)"),
    "options": (lambda: searched(hidden=[500, 700]), SMALL,
                rf"{EQUATION} holds for no options of search.hidden \(500, 700\), search.mamba_heads \(none follows\) and search.mamba_channels \(64\)"),
    "clashing options": (lambda: searched(hidden=[512], mamba_heads=[20]), SMALL,
                         rf"{EQUATION} holds for no options of search.hidden \(512\), search.mamba_heads \(20\) and search.mamba_channels \(64\)"),
    "options and groups": (lambda: searched(mamba_heads=[60]), CODESTRAL, r"mamba heads to keep \(60\) must be a multiple of the 8 groups; nearest: 56, 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_sizes_that_the_equation_forbids_are_refused_in_a_line_that_names_it(name):
    settings, teacher, said = MISTAKES[name]
    with pytest.raises(ValueError, match=said) as raised:
        check_search(settings(), teacher)
    assert "\n" not in str(raised.value)


# What the walk knows of it.


@pytest.mark.parametrize(("settings", "follow", "ranges"), [
    (searched(hidden=[512, 768]), ("mamba_heads",), {"hidden": (512, 768), "mamba_heads": (16, 24)}),
    (searched(mamba_heads=[12, 24]), ("hidden",), {"hidden": (384, 768), "mamba_heads": (12, 24)}),
    (fixed(hidden=512), ("mamba_heads",), {"hidden": (512, 512), "mamba_heads": (16, 16)}),
    (searched(hidden=[512], mamba_heads=[16]), (), {"hidden": (512, 512), "mamba_heads": (16, 16)}),
], ids=["hidden", "heads", "fixed", "both"])  # fmt: skip
def test_a_plan_says_what_follows(settings, follow, ranges):
    students = students_of(settings, SMALL)
    assert students.follow == follow and {name: students.ranges[name] for name in ranges} == ranges
    assert students.likely.mamba_inner % students.likely.hidden == 0


@pytest.mark.parametrize(("axes", "rotated", "refitted"), [({"hidden": [512, 768]}, True, True), ({"mamba_heads": [12, 24]}, True, True),
                                                           ({"layers": [12, 24]}, False, False)])  # fmt: skip
def test_candidates_are_ranked_as_the_sizes_that_follow_are_cut(axes, rotated, refitted):
    settings = searched(PruneMethod.compensated, **axes)
    assert (ranks_rotated(settings, SMALL), ranks_refitted(settings, SMALL)) == (rotated, refitted)
    assert not ranks_rotated(searched(PruneMethod.compensated, mamba_heads=[12, 24]), WITHOUT), "the control: there hidden stays"


def test_the_first_of_two_laps_reckons_with_the_widths_that_follow(tmp_path):
    config = {"model_type": "mamba2", "hidden_size": 768, "num_heads": 24, "head_dim": 64, "n_groups": 1, "num_hidden_layers": 24, "vocab_size": 50288}
    (tmp_path / "config.json").write_text(json.dumps(config))
    laps = replace(searched(hidden=[512, 768], layers=[12, 24]), depth_lap=DepthLapSettings(enabled=True), teacher=TeacherSettings(path=str(tmp_path)))
    assert depth_lap(laps).search.later_widths.given() == {"hidden": 512, "ffn": 0, "mamba_num_heads": 16}
