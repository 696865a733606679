"""What stages' keys are made of, held against those of the time before there were families of blocks: results that are in use are found again."""

import hashlib
import json

import pytest

from minitron.settings.rules import key_settings
from minitron.settings.run import PruneMethod, PruneSettings, Settings, TeacherSettings, TinyTeacherSettings
from minitron.settings.search import AxisSettings, FixedSettings, LaterWidthsSettings, SearchSettings
from minitron.walk.table import stored_stages

TINY = TinyTeacherSettings(pattern="M-M*-M-*-", hidden=32, ffn=48, num_attention_heads=6, num_key_value_heads=2, attention_head_dim=8, mamba_num_heads=8,
                           mamba_head_dim=4, mamba_num_groups=2, mamba_state_size=6, mamba_conv_kernel=4)  # fmt: skip
# Digests of a stage's version, needs and `what` at commit e39bbee; of `data` and those that follow a path there are none.
ALWAYS = {"against_slice": "7876ddd073ac", "distill": "56125dbaf0ae", "distill_cache": "c06daf05dacb", "distill_slice": "f06f77a924a8",
          "distill_whole": "54df7985b780", "evaluate": "bea80c34cc85", "phase_rows": "d318f9aa851c", "prune_slice": "7936d2fa6b85",
          "reasoning": "26e59a9c28e9", "score": "9bc0b75c6527", "search": "710bba786472", "teacher": "74718b3eb1c6", "teacher_cache": "d5cacd2ac754",
          "whole_rows": "d318f9aa851c"}  # fmt: skip
SLICE = {**ALWAYS, "prune": "5c737f5b1f51", "screen": "5275fa80894c", "shortlist": "d787c853afbc"}
COMPENSATED = {**ALWAYS, "prune": "b296c7d8cd86", "screen": "0cfa09f9e79a", "shortlist": "484c22e94867"}


def settings(method: PruneMethod, **search) -> Settings:
    widths = {"hidden": AxisSettings(low=0.5), "ffn": AxisSettings(low=0.5)}
    prune = PruneSettings(method=method, samples=64)  # what was the default then
    return Settings(teacher=TeacherSettings(tiny=TINY, train_anew=True), search=SearchSettings(**widths | search), prune=prune)


def digest(said: object) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def digests(one: Settings) -> dict[str, str]:
    found = {}
    for name in ALWAYS.keys() | {"prune", "screen", "shortlist"}:
        stage = stored_stages()[name]
        found[name] = digest([stage.version, sorted(stage.needs(one)), stage.what(one)])
    return found


def changed(found: dict[str, str], before: dict[str, str]) -> set[str]:
    return {name for name in before if found[name] != before[name]}


def test_a_sliced_walk_finds_all_that_it_made_before():
    assert changed(digests(settings(PruneMethod.slice)), SLICE) == set()


def test_of_a_compensated_walk_only_what_is_cut_is_made_anew():
    """Its norms are balanced now: the same function, other numbers."""
    assert changed(digests(settings(PruneMethod.compensated)), COMPENSATED) == {"prune", "screen"}


@pytest.mark.parametrize(
    "search",
    [{"key_value_heads": AxisSettings(values=[1])}, {"fixed": FixedSettings(layers=7)}, {"fixed": FixedSettings(key_value_heads=1)},
     {"later_widths": LaterWidthsSettings(num_key_value_heads=1)}, {"attention_heads": AxisSettings(values=[2])}],
)  # fmt: skip
def test_settings_that_came_later_count_once_they_are_given(search):
    assert "shortlist" in changed(digests(settings(PruneMethod.slice, **search)), SLICE)


def test_the_searchs_settings_are_what_they_were():
    assert digest(key_settings(SearchSettings())) == "a5f5a996ce02"
    assert not {"key_value_heads"} & key_settings(SearchSettings()).keys()
    assert set(key_settings(FixedSettings())) == {"file", "pattern", "hidden", "ffn", "mamba_num_heads", "mamba_head_dim", "num_attention_heads"}


def test_a_size_by_either_name_is_one_key():
    one, other = (key_settings(SearchSettings(fixed=FixedSettings(**sizes))) for sizes in ({"mamba_heads": 4}, {"mamba_num_heads": 4}))
    assert one == other != key_settings(SearchSettings())
