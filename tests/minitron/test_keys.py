"""What stages' keys are made of: what results follow from, and nothing else."""

import hashlib
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from memory_budget.architecture import Architecture, as_dict
from minitron.settings import run
from minitron.settings.rules import key_settings
from minitron.settings.run import BudgetSettings, PruneMethod, Settings, WorkloadSettings
from minitron.settings.search import Aggregation, AxisSettings, FixedSettings, LaterWidthsSettings, RankExperts, SearchSettings, ThroughputSettings
from minitron.settings.teachers import base_architecture
from minitron.walk.store import Result
from minitron.walk.table import stage_folder, stored_stages

TINY = run.TinyTeacherSettings(pattern="M-M*-M-*-", hidden=32, ffn=48, num_attention_heads=6, num_key_value_heads=2, attention_head_dim=8, mamba_num_heads=8,
                           mamba_head_dim=4, mamba_num_groups=2, mamba_state_size=6, mamba_conv_kernel=4)  # fmt: skip
# Digests of a stage's version, needs and `what`, as of the store's format 2; of `data` and those that follow a path there are none. Whoever changes one has
# results made anew that are in use, so its stage's version rises, or nothing was meant to change.
ALWAYS = {"against_slice": "7876ddd073ac", "distill": "56125dbaf0ae", "distill_cache": "c06daf05dacb", "distill_slice": "f06f77a924a8",
          "distill_whole": "54df7985b780", "evaluate": "bea80c34cc85", "phase_rows": "0df6e5b8746a", "prune_slice": "7936d2fa6b85",
          "reasoning": "26e59a9c28e9", "score": "9bc0b75c6527", "search": "08ec7fd6fa0f", "teacher": "74718b3eb1c6", "teacher_cache": "d5cacd2ac754",
          "whole_rows": "0df6e5b8746a"}  # fmt: skip
SLICE = {**ALWAYS, "prune": "5c737f5b1f51", "screen": "2f713e856b23", "shortlist": "a8faa30775e8"}
COMPENSATED = {**ALWAYS, "prune": "637f47458ec6", "screen": "cbbedb3da524", "shortlist": "1382e8e34e37"}


def settings(method: PruneMethod = PruneMethod.slice, *, search: dict | None = None, **groups) -> Settings:
    searched = {"hidden": AxisSettings(low=0.5), "ffn": AxisSettings(low=0.5)} | (search or {})
    budget = {"budget": BudgetSettings(name="mine", device_gib=1.0, cushion_fraction=0.0, set_aside_gib=0.0)}
    throughput = {"throughput": ThroughputSettings(device="mine", gb_per_second=10.0, tflops=0.1)}
    teacher, prune = run.TeacherSettings(tiny=TINY, train_anew=True), run.PruneSettings(method=method, samples=64)
    return Settings(**{"teacher": teacher, "search": SearchSettings(**searched), "prune": prune} | budget | throughput | groups)


def digests(one: Settings) -> dict[str, str]:
    found = {}
    for name, stage in stored_stages().items():
        if name not in ("data", "base", "merge"):
            text = json.dumps([stage.version, sorted(stage.needs(one)), stage.what(one)], sort_keys=True)
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return found


def changed(one: Settings, other: Settings) -> set[str]:
    found, before = digests(one), digests(other)
    return {name for name in before if found[name] != before[name]}


@pytest.mark.parametrize(("method", "expected"), [(PruneMethod.slice, SLICE), (PruneMethod.compensated, COMPENSATED)])
def test_what_is_in_use_is_found_again(method, expected):
    assert digests(settings(method)) == expected


# Labels are in no key; what they stand for is in the search's alone.


LABELS = {
    "budget.name": {"budget": BudgetSettings(name="other", device_gib=1.0, cushion_fraction=0.0, set_aside_gib=0.0)},
    "a budget of as many bytes": {"budget": BudgetSettings(name="mine", device_gib=2.0, cushion_fraction=0.5, set_aside_gib=0.0)},
    "throughput.device": {"throughput": ThroughputSettings(device="other", gb_per_second=10.0, tflops=0.1)},
    "run_name": {"run_name": "other"},
    "workload's dtype": {"workload": WorkloadSettings(ssm_dtype="fp32")},
}


@pytest.mark.parametrize("groups", LABELS.values(), ids=LABELS)
def test_two_names_of_one_thing_are_one_key(groups):
    assert changed(settings(**groups), settings()) == set()


NUMBERS = {
    "budget": {"budget": BudgetSettings(name="mine", device_gib=1.5, cushion_fraction=0.0, set_aside_gib=0.0)},
    "throughput": {"throughput": ThroughputSettings(device="mine", gb_per_second=11.0, tflops=0.1)},
    "workload": {"workload": WorkloadSettings(batch=2)},
    "a range": {"search": {"ffn": AxisSettings(low=0.6)}},
    "key_value_heads": {"search": {"key_value_heads": AxisSettings(values=[1])}},
    "fixed": {"search": {"fixed": FixedSettings(key_value_heads=1)}},
    "later widths": {"search": {"later_widths": LaterWidthsSettings(num_key_value_heads=1)}},
}


@pytest.mark.parametrize("groups", NUMBERS.values(), ids=NUMBERS)
def test_what_they_stand_for_is_in_the_shortlists_key_alone(groups):
    """The control of the labels, and of what later stages know of the search; one that has nothing to choose from needs no screens."""
    assert changed(settings(**groups), settings()) - {"search"} == {"shortlist"}


def test_the_rule_of_the_choice_is_in_the_searchs_key_alone():
    assert changed(settings(search={"noise": 0.1}), settings()) == {"search"}


def test_files_of_one_order_and_of_one_architecture_are_one_key(tmp_path):
    def shortlist(**search) -> dict:
        return stored_stages()["shortlist"].what(settings(search=search))

    orders = {name: tmp_path / name for name in ("list.json", "text.txt", "other.json")}
    for path, text in zip(orders.values(), ("[5, 7]", "5 7", "[7, 5]"), strict=True):
        path.write_text(text)
    one, same, other = (shortlist(layer_order=str(path)) for path in orders.values())
    assert one == same != other
    for name, hidden in (("one", 16), ("same", 16), ("other", 24)):
        (tmp_path / name).write_text(json.dumps({"hidden_size": hidden}))
    one, same, other = (shortlist(fixed=FixedSettings(file=str(tmp_path / name))) for name in ("one", "same", "other"))
    assert one == same != other
    assert shortlist(fixed=FixedSettings(mamba_heads=4)) == shortlist(fixed=FixedSettings(mamba_num_heads=4)) != shortlist()


# A cut's key.


def result(name: str, key: str = "own", **record) -> Result:
    return Result(Path(name), {"key": key, "facts": {}} | record)


def entry(one: Settings, **sizes) -> dict:
    return {"id": "any", "architecture": asdict(replace(base_architecture(one), **{"hidden": 16} | sizes)), "kept_layers": list(range(9))}


def folders(one: Settings, *, chosen: dict | None = None, score: dict | None = None, **keys: str) -> dict[str, Path]:
    """Where the results of cut stages lie, by stage, behind these results."""
    chosen = entry(one) if chosen is None else chosen
    scored = {"version": 3, "settings": {"samples": 8, "criterion": "loss"}, "inputs": {"data": keys.get("data", "data"), "teacher": "t"}} | (score or {})
    results = {name: result(name, keys.get(name, name)) for name in ("data", "teacher_cache")}
    results |= {
        "teacher": result("teacher", keys.get("teacher", "teacher"), facts={"identity": keys.get("identity", "weights")}),
        "score": result("score", keys.get("score", "score"), **scored),
        "shortlist": result("shortlist", keys.get("shortlist", "shortlist"), facts={"entries": {chosen["id"]: chosen}}),
        "search": result("search", keys.get("search", "search"), facts={"chosen": chosen}),
    }
    return {name: stage_folder(name, replace(one, candidate=chosen["id"]), results) for name in ("prune", "prune_slice", "screen")}


def differing(one: dict[str, Path], other: dict[str, Path]) -> set[str]:
    return {name for name in one if one[name] != other[name]}


CUTS = {"prune", "prune_slice", "screen"}
FREE = {
    "the search's key": {"search": "other", "shortlist": "other"},
    "the key of the stage that looked at the teacher": {"teacher": "other"},
    "how layers were removed": {"score": {"settings": {"samples": 8, "criterion": "kl", "fewest_layers": 3, "floors": {"*": 1}, "layer_samples": 9}}},
    "a candidate's id and bytes": {"chosen": {"id": "another", "memory_bytes": {"total": 1}}},
}


@pytest.mark.parametrize("method", [PruneMethod.slice, PruneMethod.compensated])
@pytest.mark.parametrize("what", FREE)
def test_a_cut_does_not_follow_from(what, method):
    one = settings(method)
    given = dict(FREE[what])
    if "chosen" in given:
        given["chosen"] = entry(one) | given["chosen"]
    assert differing(folders(one, **given), folders(one)) == set()


BOUND = {
    "the weights": {"identity": "other"},
    "rows that rank units": {"score": {"settings": {"samples": 9}}},
    "how ranks are put together": {"settings": {"search": {"aggregate_samples": Aggregation.mean}}},
    "sizes": {"sizes": {"hidden": 24}},
    "layers": {"kept_layers": [0, 1, 2, 3, 4, 5, 6, 8, 7]},
    "text": {"data": "other"},
}


@pytest.mark.parametrize("what", BOUND)
def test_a_cut_follows_from(what):
    one, given = settings(PruneMethod.compensated), dict(BOUND[what])
    chosen = entry(one, **given.pop("sizes", {})) | {name: given.pop(name) for name in ("kept_layers",) if name in given}
    other = settings(PruneMethod.compensated, **given.pop("settings", {}))
    assert differing(folders(other, chosen=chosen, **given), folders(one)) == CUTS


@pytest.mark.parametrize("search", [{"rank_experts": RankExperts.frequency}, {"protect_experts": {"1": [0]}}], ids=str)
def test_what_ranks_experts_is_in_the_key_of_a_cut_of_experts_alone(search):
    one, other = settings(), settings(search=search)
    of_experts = entry(one) | {"architecture": entry(one)["architecture"] | {"moe_num_experts": 4}}
    assert differing(folders(other, chosen=of_experts), folders(one, chosen=of_experts)) == CUTS
    assert differing(folders(other), folders(one)) == set()


def test_what_ranks_units_does_not_matter_where_only_layers_go():
    one = settings()
    depth = entry(one, hidden=32, pattern="M-M*-M-*")
    before = folders(one, chosen=depth)
    assert differing(folders(one, chosen=depth, score={"settings": {"samples": 9}}), before) == set()
    assert differing(folders(one, chosen=depth, identity="other"), before) == CUTS


def test_held_out_rows_are_a_screens_own():
    assert changed(settings(search={"screen_samples": 9}), settings()) == {"shortlist", "screen"}


def test_scoring_of_layers_is_the_scores_own():
    assert changed(settings(scoring=run.ScoringSettings(layer_samples=9)), settings()) == {"score"}


def test_that_a_lap_goes_before_is_in_no_key():
    assert changed(settings(depth_lap=run.DepthLapSettings(tokens=9)), settings()) == set()


OLD_FIELDS = [
    "model_type", "pattern", "hidden", "vocab", "tied_embeddings", "ffn", "ffn_gated", "ffn_bias", "num_attention_heads", "num_key_value_heads",
    "attention_head_dim", "attention_input_bias", "attention_output_bias", "attention_qk_norm", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups",
    "mamba_state_size", "mamba_conv_kernel", "mamba_conv_bias", "mamba_projection_bias", "moe_num_experts", "moe_experts_per_token", "moe_ffn",
    "moe_shared_ffn", "moe_latent",
]  # fmt: skip


def test_an_architecture_is_stored_as_it_was_before_there_were_windows():
    base = base_architecture(settings())
    assert list(as_dict(base)) == OLD_FIELDS
    windowed = replace(base, pattern="M-MW-M-*-", window=8)
    later = {"pattern": "M-MW-M-*E", "post_norms": True, "moe_groups": 2, "moe_groups_per_token": 2}
    assert list(as_dict(replace(windowed, **later))) == [field.name for field in fields(Architecture)] != OLD_FIELDS
    assert as_dict(windowed)["window"] == 8 and Architecture(**as_dict(windowed)) == windowed


def test_settings_of_how_are_left_out():
    assert not {"even_if_it_fits", "listed"} & key_settings(SearchSettings()).keys()
