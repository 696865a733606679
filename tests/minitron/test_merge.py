"""stage=merge: the weighted mean of checkpoints, by the command that users give."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import NemotronHConfig

from memory_budget.hf_config import architecture_from_config, read_config
from minitron.checkpoints.files import PIECE_BYTES, Checkpoint
from minitron.checkpoints.folder import content_digest
from minitron.checkpoints.shards import save_model_weights
from minitron.families.known import family_of
from minitron.families.nemotron_h import FAMILY
from minitron.families.table import names_by_canonical
from minitron.hand_over.merge import Source, check_same_kind, idle_differences, merged_tensors
from minitron.measures.held_out import held_out_loss
from minitron.settings.hand_over import MergeSettings
from minitron.text.samples import batches_of, evaluation_rows, screening_rows, spread_rows
from minitron.walk.store import write_json

VOCABULARY = {"model": {"vocab": {"a": 0, "b": 1, "<old>": 2}}}


@pytest.fixture(scope="module")
def checkpoints(build_model, config_of, tiny, write_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """Three models of one architecture, the third in bf16 and in shards; some weights of the first are −0."""
    folder, found = tmp_path_factory.mktemp("checkpoints"), {}
    for seed, name in enumerate(("one", "two", "three")):
        model = build_model(seed)
        if name == "one":
            model.lm_head.weight.data[:3] = -0.0
        more = {"dtype": torch.bfloat16, "max_shard_bytes": 20_000} if name == "three" else {}
        found[name] = write_checkpoint(folder / name, model, config_of(tiny), **more)
        write_json(found[name] / "tokenizer.json", VOCABULARY)
    return found


@pytest.fixture
def merge(door, tmp_path):
    """Runs stage=merge of folders; gives the command's end and the merged folder, None where there is none."""

    def run(*folders: object, **settings: object):
        arguments = [f"merge.checkpoints=[{','.join(map(str, folders))}]", *(f"merge.{name}={value}" for name, value in settings.items())]
        finished = door(tmp_path, "stage=merge", "device=cpu", f"runs_folder={tmp_path / 'runs'}", *arguments)
        merged = [path.parent for path in tmp_path.glob("runs/store/merge/*/done.json")]
        return finished, max(merged, key=lambda path: path.stat().st_mtime_ns) / "checkpoint" if merged else None

    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def same_bits(one: Path, other: Path) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32)) for name in ours)


def refusal(finished) -> str:
    assert finished.returncode == 2 and len(finished.error_lines) == 1, finished.stderr
    return finished.error_lines[0]


def test_equal_weights_give_the_mean(merge, checkpoints):
    finished, merged = merge(checkpoints["one"], checkpoints["two"])
    assert finished.returncode == 0, finished.stderr
    one, two, made = tensors(checkpoints["one"]), tensors(checkpoints["two"]), tensors(merged)
    for name, tensor in made.items():
        expected = (one[name].double() + two[name].double()) / 2
        assert (tensor.double() - expected).abs().max() <= 2**-23 * max(one[name].abs().max(), two[name].abs().max())
    assert str(merged) in finished.stdout and made.keys() == one.keys()


def test_weights_are_those_given(merge, checkpoints):
    _, merged = merge(checkpoints["one"], checkpoints["two"], checkpoints["three"], weights="[0.5,-0.25,0.75]")
    parts = [tensors(checkpoints[name]) for name in ("one", "two", "three")]
    for name, tensor in tensors(merged).items():
        expected = sum(share * part[name].double() for share, part in zip((0.5, -0.25, 0.75), parts, strict=True))
        assert (tensor.double() - expected).abs().max() <= 1e-6 * max(part[name].abs().max() for part in parts)


@pytest.mark.parametrize(
    ("names", "weights", "same_as"),
    [(("one", "one"), "[0.3,0.7]", "one"), (("one", "one", "one"), "null", "one"), (("one", "two"), "[1,0]", "one"), (("one", "two"), "[0,1]", "two")],
)  # fmt: skip
def test_a_merge_with_nothing_to_mix_gives_the_same_bits(names, weights, same_as, merge, checkpoints):
    finished, merged = merge(*(checkpoints[name] for name in names), weights=weights)
    assert finished.returncode == 0, finished.stderr
    assert same_bits(merged, checkpoints[same_as])


def test_a_little_of_another_checkpoint_changes_the_bits(merge, checkpoints):
    _, merged = merge(checkpoints["one"], checkpoints["two"], weights="[0.999,0.001]")
    assert not same_bits(merged, checkpoints["one"])


def test_dtypes_config_and_tokenizer_are_the_firsts(merge, checkpoints):
    _, merged = merge(checkpoints["three"], checkpoints["one"])
    assert {entry.dtype for entry in Checkpoint(merged).entries.values()} == {"BF16"} and read_config(merged)["dtype"] == "bfloat16"
    assert (merged / "tokenizer.json").read_bytes() == (checkpoints["three"] / "tokenizer.json").read_bytes()
    _, merged = merge(checkpoints["one"], checkpoints["three"])
    assert {entry.dtype for entry in Checkpoint(merged).entries.values()} == {"F32"}


def test_the_card_names_what_was_merged_with_which_weights(merge, checkpoints):
    _, merged = merge(checkpoints["one"], checkpoints["two"], weights="[0.25,0.75]")
    card = (merged / "README.md").read_text()
    assert f"- 0.25 × one (`{content_digest(checkpoints['one'])}`)" in card and "- 0.75 × two" in card


def test_a_merge_is_kept_and_other_weights_make_another(merge, checkpoints, tmp_path):
    pair = checkpoints["one"], checkpoints["two"]
    _, first = merge(*pair)
    again, same = merge(*pair, weights="[0.5,0.5]")
    assert "already done" in again.stdout and same == first
    _, other = merge(*pair, weights="[0.6,0.4]")
    assert other != first and len(list(tmp_path.glob("runs/store/merge/*/done.json"))) == 2


def test_what_an_interrupted_merge_left_is_made_anew(merge, checkpoints):
    _, merged = merge(checkpoints["one"], checkpoints["two"])
    expected = {path.name: path.read_bytes() for path in merged.iterdir()}
    (merged.parent / "done.json").unlink()
    (merged / "model.safetensors").rename(merged / "model.partial")
    with (merged / "model.partial").open("r+b") as file:
        file.truncate(1000)
    finished, again = merge(checkpoints["one"], checkpoints["two"])
    assert finished.returncode == 0 and again == merged and {path.name: path.read_bytes() for path in merged.iterdir()} == expected


def test_a_large_tensor_is_merged_piece_by_piece(tmp_path):
    sources = []
    for number, dtype in enumerate((torch.bfloat16, torch.float32)):
        folder = tmp_path / str(number)
        folder.mkdir()
        weight = torch.arange(4_100_000 * 2, dtype=torch.float32).reshape(-1, 2).mul_(number + 1).to(dtype)
        save_model_weights({"lm_head.weight": weight}, folder, max_shard_bytes=2**40)
        sources.append(Source(str(number), str(number), 0.5, Checkpoint(folder), {"lm_head.weight": "lm_head.weight"}))
    pieces = list(merged_tensors(FAMILY, sources)[0].pieces())
    assert len(pieces) > 1 and max(piece.numel() * 4 for piece in pieces) <= PIECE_BYTES and sum(map(len, pieces)) == 4_100_000
    expected = (sources[0].checkpoint.read("lm_head.weight").float() + sources[1].checkpoint.read("lm_head.weight")) / 2
    assert torch.equal(torch.cat(pieces), expected.to(torch.bfloat16))


def test_another_width_is_refused_by_tensor_and_shapes(merge, checkpoints, build_model, config_of, tiny, write_checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "narrow", build_model(ffn=40), config_of(replace(tiny, ffn=40)))
    said = refusal(merge(checkpoints["one"], other)[0])
    assert "narrow" in said and "tensor layers.1.mixer.up_proj.weight of shape [40, 32]" in said and "of [48, 32]" in said


def test_other_layers_are_refused_by_the_tensor_that_is_lacking(merge, checkpoints, build_model, config_of, tiny, write_checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "shallow", build_model(pattern="M-M*-M-*"), config_of(replace(tiny, pattern="M-M*-M-*")))
    assert "lacks tensor layers.8." in refusal(merge(checkpoints["one"], other)[0])
    assert "also has tensor layers.8." in refusal(merge(other, checkpoints["one"])[0])


def test_a_config_that_computes_something_else_is_refused(merge, checkpoints, build_model, config_of, tiny, write_checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "other", build_model(3), config_of(tiny) | {"layer_norm_epsilon": 1e-3})
    assert "layer_norm_epsilon 0.001" in refusal(merge(checkpoints["one"], other)[0])


def test_a_config_of_a_trainer_is_taken_and_what_it_says_besides_is_named(merge, checkpoints, build_model, config_of, tiny, write_checkpoint, tmp_path):
    """Handed over by us, then tuned and saved elsewhere: transformers' names and defaults, a trainer's own keys."""
    handed = FAMILY.handed_over(config_of(tiny))
    saved = NemotronHConfig(**handed | {"eos_token_id": [2, 11], "hidden_dropout": 0.1, "unsloth_version": "2025.12", "use_cache": False}).to_dict()
    other = write_checkpoint(tmp_path / "other", build_model(3), saved | {"_name_or_path": "/home/me/x", "auto_map": {"AutoConfig": "c.C"}})
    write_json(other / "tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1, "<new>": 2}}})
    finished, merged = merge(checkpoints["one"], other)
    assert finished.returncode == 0, finished.stderr
    (line,) = (line for line in finished.stdout.splitlines() if "what computes nothing" in line)
    named = line.split("is kept: ")[1]
    assert named == ("eos_token_id [2, 11] (not 0), hidden_dropout 0.1 (not 0.0), time_step_min 1e-30 (not 0.001), unsloth_version '2025.12' (not absent), "
                     "use_cache False (not True)")  # fmt: skip
    assert "unsloth_version" not in read_config(merged) and "auto_map" not in read_config(merged)


# What a config.json may say of a NemotronH, a Llama and a Qwen3, with experts and without: what computes is refused by its name, what does not is named.
COMPUTES = {
    "nemotron_h": [{"mlp_hidden_act": "silu"}, {"mamba_hidden_act": "gelu"}, {"time_step_limit": [0.01, 1.0]}, {"layer_norm_epsilon": 1e-6}],
    "llama untied": [{"rms_norm_eps": 1e-6}, {"hidden_act": "gelu"}, {"rope_theta": 5e5}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
                     {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                          "original_max_position_embeddings": 128}}],
    "qwen3 tied": [{"rms_norm_eps": 1e-6}, {"rope_theta": 1e6}],
    "nemotron_h experts": [{"routed_scaling_factor": 1.0}, {"norm_topk_prob": False}, {"topk_group": 2}],
    "qwen3_moe": [{"num_experts_per_tok": 3}, {"norm_topk_prob": False}],
}  # fmt: skip
IDLE = [
    {"unsloth_version": "2025.12"}, {"unsloth_fixed": True}, {"use_cache": False}, {"torch_dtype": "bfloat16", "dtype": "bfloat16"}, {"eos_token_id": [0, 5]},
    {"bos_token_id": 7}, {"pad_token_id": 3}, {"initializer_range": 0.5}, {"attention_dropout": 0.2}, {"max_position_embeddings": 300},
]  # fmt: skip


@pytest.fixture(scope="module")
def pair(build_model, build_tiny, config_of, tiny, write_checkpoint, tmp_path_factory):
    """Gives what a merge finds of a checkpoint and the same with another config.json: (refusal or None, what is named)."""
    folder = tmp_path_factory.mktemp("pair")

    def compare(name: str, change: dict) -> tuple[str | None, str]:
        sources = []
        model, config = (build_model(), config_of(tiny)) if name == "nemotron_h" else ((made := build_tiny(name)).model, made.config)
        family = family_of(config)
        for label, more in (("one", {}), ("other", change)):
            if not (folder / name / label).exists():
                write_checkpoint(folder / name / label, model, config)
            write_json(folder / name / label / "config.json", config | more)
            checkpoint = Checkpoint(folder / name / label)
            sources.append(Source(label, label, 0.5, checkpoint, names_by_canonical(family, architecture_from_config(config), checkpoint.entries)))
        idle = idle_differences(family, *sources)
        try:
            check_same_kind(family, *sources)
        except ValueError as error:
            return str(error), idle
        return None, idle

    return compare


@pytest.mark.parametrize(("name", "change"), [(name, change) for name, changes in COMPUTES.items() for change in changes], ids=str)
def test_keys_that_compute_are_refused(name, change, pair):
    said, _ = pair(name, change)
    key = "rope_parameters" if any("rope" in key for key in change) else next(iter(change))
    assert said is not None and f" has {key} " in said and said.endswith("all must compute alike")


@pytest.mark.parametrize("name", COMPUTES)
def test_keys_that_compute_nothing_are_taken_and_named(name, pair):
    assert pair(name, {}) == (None, "")
    for change in IDLE:
        said, idle = pair(name, change)
        assert said is None and idle.startswith(f"{sorted(change)[0]} ") and idle.count(" (not ") == 1, (change, idle)


@pytest.mark.parametrize("name", ["nemotron_h experts", "qwen3_moe"])
def test_experts_are_merged_by_number_with_their_routers(name, build_tiny, write_checkpoint, tmp_path):
    """As stage=merge plans it; routers' corrections too, which are no parameters."""
    sources = []
    for seed in (0, 1):
        one = build_tiny(name, seed)
        checkpoint = Checkpoint(write_checkpoint(tmp_path / str(seed), one.model, one.config))
        sources.append(Source(str(seed), str(seed), 0.5, checkpoint, names_by_canonical(one.family, one.architecture, checkpoint.entries)))
    check_same_kind(one.family, *sources)
    made, (ours, theirs) = merged_tensors(one.family, sources), (tensors(source.folder) for source in sources)
    assert {planned.name for planned in made} == ours.keys() and sum(".experts." in planned.name for planned in made) >= 30
    for planned in made:
        assert torch.allclose(torch.cat(list(planned.pieces())), (ours[planned.name] + theirs[planned.name]) / 2, atol=1e-6), planned.name
        assert not torch.allclose(ours[planned.name], theirs[planned.name], atol=1e-3), "the control"


@pytest.mark.parametrize("spelled", [
    {"rope_theta": 10000.0, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, {"torch_dtype": "float32"},
    {"_name_or_path": "/home/me/x", "transformers_version": "4.40.0", "auto_map": {"AutoConfig": "x.X"}},
], ids=str)  # fmt: skip
def test_the_same_in_other_spellings_is_no_difference(spelled, pair):
    assert pair("llama untied", spelled) == pair("qwen3 tied", spelled) == (None, "")


def test_models_of_two_families_are_refused_by_their_names(merge, checkpoints, build_tiny, write_checkpoint, tmp_path):
    blocks = build_tiny("llama untied")
    other = write_checkpoint(tmp_path / "other", blocks.model, blocks.config)
    assert "is a llama," in refusal(merge(checkpoints["one"], other)[0])


def test_another_vocabulary_is_refused(merge, checkpoints, build_model, config_of, tiny, write_checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "other", build_model(3), config_of(tiny))
    write_json(other / "tokenizer.json", {"model": {"vocab": {"a": 1, "b": 0}}})
    assert "another vocabulary" in refusal(merge(checkpoints["one"], other)[0])


def test_weights_that_are_not_finite_are_refused(merge, checkpoints, build_model, config_of, tiny, write_checkpoint, tmp_path):
    model = build_model(3)
    model.model.norm_f.weight.data[5] = float("inf")
    other = write_checkpoint(tmp_path / "other", model, config_of(tiny))
    write_json(other / "tokenizer.json", VOCABULARY)
    assert "tensor norm_f.weight is not finite" in refusal(merge(checkpoints["one"], other)[0])


@pytest.mark.parametrize(
    ("weights", "said"),
    [("[0.5,nan]", "must be a finite number"), ("[0.5,0.4]", "sum to 0.9; they must sum to 1"), ("[1]", "has 1 numbers for 2 merge.checkpoints")],
)
def test_bad_weights_are_refused_in_one_line(weights, said, merge, checkpoints):
    assert said in refusal(merge(checkpoints["one"], checkpoints["two"], weights=weights)[0])


@pytest.mark.parametrize(("names", "said"), [((), "needs at least two"), (("distill",), "needs at least two"), (("nowhere", "distill"), "'nowhere'")])
def test_checkpoints_that_are_not_there_are_refused_before_any_work(names, said, merge, tmp_path):
    assert said in refusal(merge(*names)[0]) and not (tmp_path / "runs").exists()


def test_a_base_that_the_run_has_not_is_refused(door, tmp_path):
    finished = door(tmp_path, "stage=merge", "depth_lap.enabled=false", "merge.checkpoints=[base,distill]")
    assert "names 'base', but there is none" in refusal(finished) and list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def merged_walk(walk, door, tmp_path_factory):
    """The pruned and the distilled checkpoint of the finished walk, merged by their stages' names."""
    before = (walk.runs / "tiny" / "summary.json").read_bytes()
    finished = door(tmp_path_factory.mktemp("merged"), *walk.settings, "stage=merge", "merge.checkpoints=[prune,distill]", "merge.weights=[0.25,0.75]")
    return before, finished, next(walk.runs.glob("store/merge/*/done.json")).parent


def test_finished_stages_are_merged_by_their_names(walk, merged_walk):
    _, finished, folder = merged_walk
    assert finished.returncode == 0, finished.stderr
    pruned, student, merged = (tensors(path) for path in (walk.checkpoint("pruned"), walk.checkpoint("student"), folder / "checkpoint"))
    assert all(torch.allclose(merged[name], 0.25 * pruned[name] + 0.75 * student[name], atol=1e-6) for name in merged)
    record = json.loads((folder / "done.json").read_text())
    assert set(record["inputs"]) == {"prune", "distill"} and (folder / "checkpoint" / "chat_template.jinja").exists()


def test_the_page_of_the_walk_is_as_it_was_before_the_merge(walk, merged_walk):
    before, _, _ = merged_walk
    assert (walk.runs / "tiny" / "summary.json").read_bytes() == before


# Weights chosen by evaluation.


@pytest.fixture(scope="module")
def swept(walk, door, tmp_path_factory):
    """The pruned and the distilled checkpoint of the finished walk, and beyond: the best of five."""
    wanted = ("merge.checkpoints=[prune,distill]", "merge.sweep=[[1,0],[0.5,0.5],[0,1],[-0.5,1.5],[0.25,0.75]]", "merge.samples=8")
    finished = door(tmp_path_factory.mktemp("swept"), *walk.settings, "stage=merge", *wanted)
    assert finished.returncode == 0, finished.stderr
    folder = max(walk.runs.glob("store/merge/*/done.json"), key=lambda path: path.stat().st_mtime_ns).parent
    return wanted, finished, folder, json.loads((folder / "done.json").read_text())["facts"]


def test_the_merge_with_the_lowest_held_out_loss_is_kept(walk, swept):
    _, finished, folder, facts = swept
    best = min(facts["sweep"], key=lambda one: one["loss_nats_per_token"])
    assert [part["weight"] for part in facts["merged"]] == best["weights"] and len({one["loss_nats_per_token"] for one in facts["sweep"]}) == 5
    pruned, student, merged = (tensors(path) for path in (walk.checkpoint("pruned"), walk.checkpoint("student"), folder / "checkpoint"))
    first, second = best["weights"]
    assert all(torch.allclose(merged[name], first * pruned[name] + second * student[name], atol=1e-6) for name in merged)
    assert "lowest of 5 held-out losses, nats/token: 1 + 0 " in finished.stdout and "| -0.5 + 1.5 |" in (folder / "checkpoint" / "README.md").read_text()


def test_losses_are_those_of_the_checkpoints_on_rows_that_evaluate_does_not_report(walk, swept):
    *_, facts = swept
    held_out = np.load(walk.stage_folder("data") / "heldout.npy")
    losses = {tuple(one["weights"]): one["loss_nats_per_token"] for one in facts["sweep"]}
    for weights, model in (((1, 0), "pruned"), ((0, 1), "student")):
        rows = spread_rows(screening_rows(held_out), 8)
        assert losses[weights] == pytest.approx(held_out_loss(FAMILY.load(walk.checkpoint(model)), batches_of(rows, 8, "cpu")), abs=1e-5)
    reported = {row.tobytes() for row in evaluation_rows(held_out)}
    assert reported and not any(row.tobytes() in reported for row in screening_rows(held_out))


def test_an_interrupted_sweep_goes_on_after_the_last_candidate_measured(walk, door, swept, tmp_path):
    wanted, _, folder, facts = swept
    (folder / "done.json").unlink()
    kept = [{**facts["sweep"][0], "loss_nats_per_token": 99.0}, facts["sweep"][1]]  # a mark that only a kept measurement has
    write_json(folder / "sweep.json", kept)
    finished = door(tmp_path, *walk.settings, "stage=merge", *wanted)
    assert finished.returncode == 0 and f"merge  goes on from merge 2 of {len(facts['sweep'])}" in finished.stdout, finished.stderr
    again = json.loads((folder / "done.json").read_text())["facts"]["sweep"]
    assert again == [*kept, *facts["sweep"][2:]]


def test_steps_are_equal_ones_between_two_checkpoints():
    assert MergeSettings(checkpoints=["a", "b"], steps=2).candidates() == [[1, 0], [0.5, 0.5], [0, 1]]
    assert MergeSettings(checkpoints=["a", "b"]).candidates() == []


@pytest.mark.parametrize(("settings", "said"), [
    ({"steps": "0"}, "merge.steps is 0 for 2 merge.checkpoints; it must be at least 1"),
    ({"sweep": "[[1,0],[0.5,0.4]]"}, "merge.sweep[1] sum to 0.9; they must sum to 1"),
    ({"sweep": "[1,0]"}, "merge.sweep[0] is 1; it must be a list of weights"),
    ({"sweep": "[[1]]"}, "merge.sweep[0] has 1 numbers for 2 merge.checkpoints"),
    ({"sweep": "[[1,0]]", "weights": "[1,0]"}, "one of merge.weights, merge.sweep and merge.steps"),
    ({"steps": "2", "samples": "0"}, "merge.samples is 0; it must be at least 1"),
])  # fmt: skip
def test_a_sweep_that_cannot_be_is_refused_in_one_line(settings, said, merge, checkpoints):
    assert said in refusal(merge(checkpoints["one"], checkpoints["two"], **settings)[0])


def test_checkpoints_of_another_vocabulary_than_the_rows_are_refused(walk, door, checkpoints, tmp_path):
    names = f"merge.checkpoints=[{checkpoints['one']},{checkpoints['two']}]"
    finished = door(tmp_path, *walk.settings, "stage=merge", names, "merge.steps=1")
    assert "have a vocabulary of 97, the held-out rows hold token" in refusal(finished)
