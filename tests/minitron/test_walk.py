"""The whole walk by the real command, in miniature: what it writes, and what it does not do again."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_budget.calculator import memory_report
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from memory_budget.workload import Workload
from minitron.checkpoints.files import Checkpoint
from minitron.families.nemotron_h import FAMILY
from minitron.importance.scores import load_scores
from minitron.pruning.cut import build_pruned
from minitron.pruning.plan import make_plan

MODELS = ("teacher", "pruned", "student")
STAGES = ("data", "teacher", "score", "shortlist", "teacher_cache", "screen", "screen", "search", "prune", "distill", "evaluate")  # two finalists


@pytest.fixture(scope="module")
def summary(walk) -> dict:
    assert walk.finished.returncode == 0, walk.finished.stderr
    return walk.summary


@pytest.fixture
def store_copy(walk, tmp_path) -> Path:
    """A runs folder of one's own with everything the walk has done."""
    shutil.copytree(walk.runs / "store", tmp_path / "runs" / "store")
    return tmp_path / "runs"


def at(runs: Path, walk, *more: str) -> tuple[str, ...]:
    """The walk's arguments with another runs folder and further overrides."""
    return (f"runs_folder={runs}", *walk.settings[1:], *more)


def summary_of(runs: Path, name: str = "tiny") -> dict:
    return json.loads((runs / name / "summary.json").read_text())


def made(finished) -> list[str]:
    """The stages that a command has run, one entry for each result."""
    assert finished.returncode == 0, finished.stderr
    return [line.split()[0] for line in finished.stdout.splitlines() if re.search(r"\(\d+ s\)$", line)]


def missing_keys(contract: dict, value: dict, prefix: str = "") -> list[str]:
    missing = []
    for key, inside in contract.items():
        if key not in value:
            missing.append(prefix + key)
        elif inside:
            missing += missing_keys(inside, value[key], f"{prefix}{key}.")
    return missing


def keys(names: str) -> dict:
    return dict.fromkeys(names.split())


MEMORY = keys("weights kv_cache ssm_state conv_state activations total")
EVALUATION = keys("loss_nats_per_token kl_to_teacher_nats_per_token top1_agreement tokens")
CONTRACT = {
    **keys("run_name command versions seed removed_layers"),
    "budget": {**keys("name bytes"), "workload": keys("context_tokens batch weights_dtype kv_dtype ssm_dtype")},
    "stages": dict.fromkeys([stage for stage in STAGES if stage != "screen"], keys("key path seconds cached peak_rss_bytes")),
    "models": dict.fromkeys(MODELS, {**keys("path parameters architecture fits"), "memory_bytes": MEMORY, "evaluation": EVALUATION}),
    "distillation": keys("tokens steps seconds final_kl_nats_per_token"),
    "plan": {**keys("device processes seconds"), "stages": dict.fromkeys(STAGES, dict.fromkeys(("planned", "taken"), keys("seconds memory_bytes disk_bytes")))},
}
CANDIDATE = {**keys("id architecture parameters kept_layers zero_shot_loss short_distill_loss tokens_per_second chosen"), "memory_bytes": MEMORY}


def test_the_summary_has_every_key_of_the_contract(summary):
    assert missing_keys(CONTRACT, summary) == []
    assert [missing_keys(CANDIDATE, candidate) for candidate in summary["candidates"]] == [[], [], []]


def test_a_summary_without_a_key_of_the_contract_is_caught(summary):
    poorer = json.loads(json.dumps(summary))
    del poorer["models"]["student"]["evaluation"]["top1_agreement"], poorer["seed"]
    assert missing_keys(CONTRACT, poorer) == ["seed", "models.student.evaluation.top1_agreement"]


def test_the_plan_stands_before_the_work_and_beside_what_was_taken(walk, summary):
    said = walk.finished.stdout.splitlines()
    of_plan = [line.startswith("     plan  ") for line in said]
    assert of_plan == sorted(of_plan, reverse=True) and 4 <= sum(of_plan) <= 8  # before anything else is said
    taken = {name: both["taken"] for name, both in summary["plan"]["stages"].items()}
    assert taken["distill"]["seconds"] == summary["stages"]["distill"]["seconds"] and taken["screen"]["seconds"] > taken["search"]["seconds"]
    weights = (walk.checkpoint("student") / "model.safetensors").stat().st_size
    assert weights < taken["distill"]["disk_bytes"] < 2 * weights + 10**6
    assert summary["plan"]["seconds"]["taken"] == pytest.approx(sum(one["seconds"] for one in taken.values()))


def test_the_teacher_does_not_fit_and_its_students_do(summary):
    assert [summary["models"][name]["fits"] for name in MODELS] == [False, True, True]
    assert summary["models"]["student"]["memory_bytes"]["total"] <= summary["budget"]["bytes"] < summary["models"]["teacher"]["memory_bytes"]["total"]


def test_exactly_one_candidate_is_chosen_and_it_is_the_one_with_the_lowest_loss(summary):
    chosen = [candidate for candidate in summary["candidates"] if candidate["chosen"]]
    assert len(chosen) == 1 and chosen[0]["zero_shot_loss"] == min(candidate["zero_shot_loss"] for candidate in summary["candidates"])


def test_every_candidate_listed_fits_the_budget(walk, summary):
    with (walk.stage_folder("search") / "candidates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == summary["search"]["num_fitting"] < summary["search"]["num_candidates"]
    assert max(int(row["total_bytes"]) for row in rows) <= summary["budget"]["bytes"]


@pytest.mark.parametrize("model", MODELS)
def test_planned_parameters_are_those_of_the_written_checkpoint(walk, summary, model):
    folder = walk.checkpoint(model)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    counts = {Checkpoint(folder).num_parameters, loaded.num_parameters(), sum(tensor.numel() for tensor in loaded.state_dict().values())}
    assert counts == {summary["models"][model]["parameters"]}


def test_the_student_is_the_chosen_candidate(walk, summary):
    chosen = next(candidate for candidate in summary["candidates"] if candidate["chosen"])
    for model in ("pruned", "student"):
        assert summary["models"][model]["parameters"] == chosen["parameters"]
        assert summary["models"][model]["memory_bytes"] == chosen["memory_bytes"]
        assert summary["models"][model]["architecture"]["pattern"] == chosen["architecture"]["pattern"]
    assert sorted(set(range(11)) - set(chosen["kept_layers"])) == summary["removed_layers"] != []


def test_every_shortlisted_candidate_has_its_planned_parameters_once_cut(walk, summary):
    folder = walk.checkpoint("teacher")
    teacher, config = FAMILY.load(folder), read_config(folder)
    architecture, scores = architecture_from_config(config), load_scores(walk.stage_folder("score") / "scores.safetensors")
    sizes = set()
    for candidate in summary["candidates"]:
        student = type(architecture)(**candidate["architecture"])
        plan = make_plan(architecture, student, tuple(candidate["kept_layers"]), scores)
        model = build_pruned(FAMILY, teacher, plan, config)
        assert sum(tensor.numel() for tensor in model.state_dict().values()) == candidate["parameters"] == count_total_parameters(student)
        assert candidate["memory_bytes"]["total"] == memory_report(student, Workload(context_tokens=1024)).total
        sizes.add(candidate["parameters"])
    assert len(sizes) == 3


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_loads_as_any_other_and_writes_text(walk, model):
    folder = walk.checkpoint(model)
    tokenizer, loaded = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("import os\n", return_tensors="pt")
    made = loaded.generate(**ids, max_new_tokens=5, do_sample=False)
    assert made.shape[1] == ids["input_ids"].shape[1] + 5 and isinstance(tokenizer.decode(made[0]), str)


@pytest.mark.parametrize("model", MODELS)
def test_tensors_are_named_as_nvidia_publishes_them(walk, model):
    names = set(Checkpoint(walk.checkpoint(model)).entries)
    assert "lm_head.weight" in names and "backbone.embeddings.weight" in names
    assert all(name.startswith("backbone.") for name in names - {"lm_head.weight"})


@pytest.mark.parametrize("model", MODELS)
def test_config_json_says_what_every_runtime_reads(walk, summary, model):
    config, architecture = read_config(walk.checkpoint(model)), summary["models"][model]["architecture"]
    assert config["hybrid_override_pattern"] == architecture["pattern"] and "layers_block_type" not in config
    assert config["num_hidden_layers"] == len(architecture["pattern"])
    assert (config["head_dim"], config["hidden_size"], config["mamba_num_heads"]) == (8, architecture["hidden"], architecture["mamba_num_heads"])
    assert config["architectures"] == ["NemotronHForCausalLM"] and "num_experts_per_tok" not in config and "__float__" not in json.dumps(config)


def test_the_dtype_of_the_teacher_is_kept(walk):
    dtypes = [{entry.dtype for entry in Checkpoint(walk.checkpoint(model)).entries.values()} for model in MODELS]
    assert dtypes == [{"F32"}] * 3


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"])
def test_tokenizer_and_generation_files_are_the_teachers_byte_for_byte(walk, name):
    teacher, pruned, student = ((walk.checkpoint(model) / name).read_bytes() for model in MODELS)
    assert teacher == pruned == student


def test_the_tokenizer_of_our_own_names_a_class_every_version_has(walk):
    assert read_config(walk.checkpoint("student") / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_model_card_says_what_was_cut_from_what(walk, summary):
    card = (walk.checkpoint("pruned") / "README.md").read_text()
    assert "Cut from tiny teacher" in card and f"{summary['models']['pruned']['parameters']:,}" in card
    assert f"Removed layers (from 0): {', '.join(map(str, summary['removed_layers']))}" in card


def test_distillation_moved_the_weights_and_lowered_the_kl(walk, summary):
    pruned, student = (Checkpoint(walk.checkpoint(model)) for model in ("pruned", "student"))
    assert all(not torch.equal(pruned.read(name), student.read(name)) for name in pruned.entries)
    kl = {model: summary["models"][model]["evaluation"]["kl_to_teacher_nats_per_token"] for model in MODELS}
    assert kl["teacher"] == 0 < kl["student"] < kl["pruned"]


def test_nothing_but_finished_results_is_left_in_the_store(walk):
    assert not list(walk.runs.rglob("*.partial")) and not list(walk.runs.rglob("states"))


def test_every_stage_says_one_headline(walk):
    lines = walk.finished.stdout.splitlines()
    assert [sum(line.split()[:1] == [stage] for line in lines) for stage in (*STAGES, "report")] == [1] * 5 + [2, 2] + [1] * 5


def test_a_second_run_does_no_stage_again(walk, summary, run_process, done_folders, tmp_path):
    before = {folder: (folder / "done.json").stat().st_mtime_ns for folder in done_folders(walk.runs)}
    again = run_process(tmp_path, *walk.settings)
    assert again.returncode == 0 and again.stdout.count("(already done)") == len(STAGES) and again.seconds < 20
    assert {folder: (folder / "done.json").stat().st_mtime_ns for folder in done_folders(walk.runs)} == before
    assert [stage["cached"] for stage in walk.summary["stages"].values()] == [True] * len(STAGES)
    assert walk.summary["models"] == summary["models"]


def test_a_setting_of_how_reuses_what_is_done(walk, store_copy, door, done_folders, tmp_path):
    before = done_folders(store_copy)
    changes = ("scoring.batch=3", "evaluate.batch=2", "prune.max_shard_gib=1", "distill.train.save_every_seconds=5", "tracking=disabled", "run_name=other")
    finished = door(tmp_path, *at(store_copy, walk, *changes))
    assert finished.returncode == 0 and finished.stdout.count("(already done)") == len(STAGES)
    assert done_folders(store_copy) == before and summary_of(store_copy, "other")["run_name"] == "other"


def test_a_setting_of_what_gives_a_new_folder_from_its_stage_on(walk, store_copy, door, done_folders, tmp_path):
    before = done_folders(store_copy)
    finished = door(tmp_path, *at(store_copy, walk, "distill.temperature=2.0"))
    assert finished.returncode == 0 and finished.stdout.count("(already done)") == len(STAGES) - 2
    assert sorted(folder.parent.name for folder in done_folders(store_copy) - before) == ["distill", "evaluate"]


def test_a_loss_that_is_no_kl_is_not_reported_as_one(walk, store_copy, door, tmp_path):
    finished = door(tmp_path, *at(store_copy, walk, "distill.loss={divergence: jsd, cross_entropy_weight: 0.25}", "run_name=jsd"))
    assert finished.returncode == 0 and "loss" in next(line for line in finished.stdout.splitlines() if line.lstrip().startswith("distill "))
    summary = summary_of(store_copy, "jsd")
    assert summary["distillation"]["final_kl_nats_per_token"] is None and "distillation" not in summary["curves"]
    assert walk.summary["distillation"]["final_kl_nats_per_token"] > 0 and "distillation" in walk.summary["curves"]
    card = (Path(summary["models"]["student"]["path"]) / "README.md").read_text()
    assert "by JSD(0.5) on logits, mixed with 25% cross-entropy, for" in card and "loss at the end" in card


def test_two_budgets_that_choose_one_architecture_share_its_cut_and_its_student(walk, summary, store_copy, door, tmp_path):
    most = summary["budget"]["bytes"]
    label, bytes_less = ("budget.name=other", "run_name=other"), f"budget.device_gib={(most - 16) / 2**30:.12f}"
    finished = door(tmp_path, *at(store_copy, walk, *label))
    assert finished.returncode == 0 and finished.stdout.count("(already done)") == len(STAGES), finished.stderr
    finished = door(tmp_path, *at(store_copy, walk, *label, bytes_less))
    assert made(finished) == ["shortlist", "search"]
    other = summary_of(store_copy, "other")
    assert (other["budget"]["name"], other["budget"]["bytes"]) != (summary["budget"]["name"], most)
    for stage in ("prune", "distill", "evaluate"):
        assert other["stages"][stage]["cached"] and other["stages"][stage]["key"] == summary["stages"][stage]["key"]
    assert other["stages"]["search"]["key"] != summary["stages"]["search"]["key"]
    assert other["removed_layers"] == summary["removed_layers"] and other["models"]["student"]["fits"]


def test_a_budget_that_chooses_another_architecture_has_a_cut_of_its_own(walk, summary, store_copy, door, tmp_path):
    """The control: the chosen one no longer fits."""
    chosen = next(candidate for candidate in summary["candidates"] if candidate["chosen"])
    less = f"budget.device_gib={(chosen['memory_bytes']['total'] - 1) / 2**30:.12f}"
    finished = door(tmp_path, *at(store_copy, walk, less, "search.finalists=0", "stage=prune"))
    assert finished.returncode == 0, finished.stderr
    assert summary_of(store_copy)["stages"]["prune"]["key"] != summary["stages"]["prune"]["key"]


def test_stage_prune_stops_at_prune(walk, store_copy, door, tmp_path):
    for stage in ("prune", "distill", "evaluate"):
        shutil.rmtree(store_copy / "store" / stage)
    finished = door(tmp_path, *at(store_copy, walk, "stage=prune"))
    assert finished.returncode == 0, finished.stderr
    assert list((store_copy / "store" / "prune").glob("*/checkpoint/model.safetensors"))
    assert not (store_copy / "store" / "distill").exists() and set(summary_of(store_copy)["models"]) == {"teacher", "pruned"}


def test_a_fixed_architecture_is_what_prune_writes(walk, store_copy, door, tmp_path):
    fixed = "search.fixed={pattern: 'M-M-M-*-', hidden: 24, ffn: 40, mamba_num_heads: 4}"
    finished = door(tmp_path, *at(store_copy, walk, "stage=prune", fixed))
    assert finished.returncode == 0, finished.stderr
    pruned = summary_of(store_copy)["models"]["pruned"]
    written = architecture_from_config(read_config(pruned["path"]))
    assert (written.pattern, written.hidden, written.ffn, written.mamba_num_heads) == ("M-M-M-*-", 24, 40, 4)
    assert Checkpoint(Path(pruned["path"])).num_parameters == pruned["parameters"] == count_total_parameters(written)


def test_stage_report_shows_what_is_done_and_does_nothing(walk, store_copy, door, done_folders, tmp_path):
    before = done_folders(store_copy)
    finished = door(tmp_path, *at(store_copy, walk, "stage=report"))
    assert finished.returncode == 0 and done_folders(store_copy) == before
    assert summary_of(store_copy)["models"].keys() == dict.fromkeys(MODELS).keys()


@pytest.fixture(scope="module")
def own_teacher(walk, door, tmp_path_factory):
    """(folder, settings, finished command) of a prune of the walk's student, copied elsewhere, as the user's own teacher."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(walk.checkpoint("student"), folder / "mine")
    settings = at(folder / "runs", walk, "experiment=tiny", "teacher.path=mine", "search.layers={low: 6, high: 8}", "search.hidden={values: [16, 24]}",
                  "search.ffn={values: [32]}", "search.mamba_heads={values: [6]}")  # fmt: skip
    return folder, settings, door(folder, *settings, "stage=prune")


def test_a_checkpoint_of_the_user_is_pruned(own_teacher):
    folder, _, finished = own_teacher
    assert finished.returncode == 0, finished.stderr
    models = summary_of(folder / "runs")["models"]
    assert models["teacher"]["path"] == str(folder / "mine")
    loaded = AutoModelForCausalLM.from_pretrained(models["pruned"]["path"])
    assert loaded.num_parameters() == models["pruned"]["parameters"] < models["teacher"]["parameters"]


def test_a_checkpoint_of_the_user_keeps_its_own_tokenizer(own_teacher):
    folder, _, _ = own_teacher
    assert not list((folder / "runs" / "store").glob("data/*/tokenizer"))
    pruned = Path(summary_of(folder / "runs")["models"]["pruned"]["path"])
    assert (pruned / "tokenizer.json").read_bytes() == (folder / "mine" / "tokenizer.json").read_bytes()


def teacher_cached(door, folder: Path, settings: tuple[str, ...]) -> bool:
    finished = door(folder, *settings, "stage=teacher")
    assert finished.returncode == 0, finished.stderr
    return summary_of(folder / "runs")["stages"]["teacher"]["cached"]


@pytest.fixture
def own_copy(own_teacher, tmp_path):
    """A user's teacher that has been looked at once, to be changed: (folder, settings)."""
    folder, settings, _ = own_teacher
    shutil.copytree(folder / "mine", tmp_path / "mine")
    settings = (f"runs_folder={tmp_path / 'runs'}", *settings[1:])
    return tmp_path, settings


def test_the_same_teacher_is_looked_at_once(own_copy, door):
    assert [teacher_cached(door, *own_copy) for _ in range(2)] == [False, True]


def test_other_weights_of_the_same_shapes_are_another_teacher(walk, own_copy, door):
    folder, settings = own_copy
    teacher_cached(door, folder, settings)
    weights = folder / "mine" / "model.safetensors"
    size = weights.stat().st_size
    shutil.copyfile(walk.checkpoint("pruned") / "model.safetensors", weights)
    assert abs(weights.stat().st_size - size) < 16 and not teacher_cached(door, folder, settings)


@pytest.fixture
def moved(own_teacher, tmp_path):
    """The pruned teacher and its store, both in another place: (folder, settings)."""
    folder, settings, _ = own_teacher
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, symlinks=True)
    return tmp_path, (f"runs_folder={tmp_path / 'runs'}", *settings[1:])


def test_a_teacher_moved_or_touched_is_read_once_more_and_nothing_else_is_done_again(moved, door):
    folder, settings = moved
    assert made(door(folder, *settings, "stage=prune")) == ["teacher"]
    os.utime(folder / "mine" / "model.safetensors")
    assert made(door(folder, *settings, "stage=prune")) == ["teacher"] and made(door(folder, *settings, "stage=prune")) == []


def test_a_tail_overwritten_in_place_is_another_teacher_for_all_that_follows(moved, door):
    """The control of the one before: as many bytes, all headers and every tensor's beginning as they were."""
    folder, settings = moved
    with (folder / "mine" / "model.safetensors").open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    assert made(door(folder, *settings, "stage=score")) == ["teacher", "data", "score"]


def test_another_tokenizer_is_another_teacher_and_other_rows(moved, door):
    folder, settings = moved
    tokenizer = folder / "mine" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert made(door(folder, *settings, "stage=data")) == ["teacher", "data"]


def test_a_teacher_that_was_moved_is_found_in_its_new_place(own_copy, door):
    folder, settings = own_copy
    teacher_cached(door, folder, settings)
    (folder / "mine").rename(folder / "moved")
    teacher_cached(door, folder, tuple("teacher.path=moved" if item == "teacher.path=mine" else item for item in settings))
    assert summary_of(folder / "runs")["models"]["teacher"]["path"] == str(folder / "moved")
