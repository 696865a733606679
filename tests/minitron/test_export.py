"""stage=export: one folder with everything of the student, by the command that users give."""

import json
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.states import best_state, load_weights, newest_state
from minitron.checkpoints.local_paths import public, without_paths
from minitron.checkpoints.publish import licence_note, licence_of, model_card
from minitron.families.nemotron_h import FAMILY
from minitron.hand_over.card import repeating_command
from minitron.hand_over.export import check_place, check_push, is_export
from minitron.settings.hand_over import CardSettings

IDS = torch.arange(40).reshape(2, 20) * 7


@pytest.fixture(scope="module")
def exported(walk, door, tmp_path_factory):
    """(folder, finished command) of the finished walk's export; what the run's own folder held before."""
    folder, before = tmp_path_factory.mktemp("exported"), (walk.runs / "tiny" / "summary.json").read_bytes()
    finished = door(folder, *walk.settings, "stage=export", f"export.folder={folder / 'out'}")
    assert finished.returncode == 0, finished.stderr
    return folder / "out", finished, before


@pytest.fixture(scope="module")
def card(exported) -> str:
    return (exported[0] / "README.md").read_text()


def logits(folder: Path, load=AutoModelForCausalLM.from_pretrained) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(IDS, use_cache=False).logits


def refusal(finished) -> str:
    assert finished.returncode == 2 and len(finished.error_lines) == 1, finished.stderr
    return finished.error_lines[0]


def test_plain_transformers_loads_the_export_and_finds_the_student(exported, walk):
    ours = logits(exported[0])
    student, pruned = (logits(walk.checkpoint(model), FAMILY.load) for model in ("student", "pruned"))
    assert torch.equal(ours, student) and not torch.equal(ours, pruned)
    tokenizer = AutoTokenizer.from_pretrained(exported[0])
    assert tokenizer.decode(tokenizer("import os")["input_ids"]).endswith("import os")


def test_everything_of_the_student_is_there_byte_for_byte(exported, walk):
    for path in walk.checkpoint("student").iterdir():
        if path.name not in ("README.md", "model.safetensors", "config.json"):
            assert (exported[0] / path.name).read_bytes() == path.read_bytes()
    expected = json.loads((walk.checkpoint("student") / "config.json").read_text()) | {"time_step_min": 1e-30}  # so that transformers clamps nothing
    assert json.loads((exported[0] / "config.json").read_text()) == expected


def test_the_folder_of_the_run_is_as_it_was(exported, walk):
    assert (walk.runs / "tiny" / "summary.json").read_bytes() == exported[2]


def test_the_card_tells_the_lineage_with_tokens_and_losses(card, walk):
    summary = walk.summary
    steps = card.split("## Lineage")[1].split("##")[0].strip().splitlines()
    losses = [f"{summary['models'][name]['evaluation']['loss_nats_per_token']:.3f}" for name in ("teacher", "pruned", "student")]
    assert len(steps) == 3 and all(f"Held-out loss {loss}" in step for loss, step in zip(losses, steps, strict=True))
    assert f"{summary['distillation']['tokens']:,} tokens" in steps[2] and f"KL of {summary['distillation']['final_kl_nats_per_token']:.3f}" in steps[2]
    assert re.search(r"Removed layers \(from 0\): " + ", ".join(map(str, summary["removed_layers"])), steps[1])


def test_the_card_has_memory_evaluation_licence_and_the_programs(card):
    for said in ("| **total** |", "It fits the budget", "top-1 as teacher", "Unknown: the folder of the teacher", "vLLM takes all", "llama.cpp would not"):
        assert said in card
    assert "/store/" not in card  # no path of this machine


def test_what_the_programs_would_not_take_is_printed(exported):
    finished, record = exported[1], json.loads((exported[0] / "export.json").read_text())
    assert "llama.cpp would not take it" in finished.stdout and {"llama.cpp"} == {one["program"] for one in record["refused"]}


def test_the_command_of_the_card_repeats_the_run(card, walk, door, tmp_path):
    """Under its settings everything is found done: they are those of the walk."""
    command = card.split("```\npython -m minitron.run ")[1].split("\n")[0]
    shutil.copytree(walk.runs / "store", tmp_path / "runs" / "store")
    finished = door(tmp_path, *shlex.split(command), "device=cpu")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("(already done)") == len(walk.summary["stages"])


def test_a_command_drops_what_says_only_where_things_are():
    given = ["stage=export", "export.folder=/x", "+run_name=a", "runs_folder=/y", "experiment=nano2", "search.hidden={low: 1}"]
    assert repeating_command(given) == "python -m minitron.run experiment=nano2 'search.hidden={low: 1}'"


@pytest.mark.parametrize(("given", "handed_over"), [
    ("/home/me/models/own", "own"), ("/home/me/own/", "own"), ("~/own", "own"), ("./own", "own"), ("../models/own", "own"), ("more/*.txt", "*.txt"),
    ("file:///home/me/own", "own"), ("there/own", "own"), ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "nvidia/NVIDIA-Nemotron-Nano-9B-v2"),
    ("https://example.org/a/b", "https://example.org/a/b"), ("adamw", "adamw"), ("What is 1/2 of 3/4?", "What is 1/2 of 3/4?"), ("/", "/"), ("", ""),
])  # fmt: skip
def test_a_place_of_this_machine_goes_by_its_last_part_and_a_hub_id_as_it_is(given, handed_over, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "own").mkdir(parents=True)
    assert public({"teacher": {"path": given}, "files": [given, 3, None]}) == {"teacher": {"path": handed_over}, "files": [handed_over, 3, None]}
    assert repeating_command([f"teacher.path={given}"]) == repeating_command([f"teacher.path={handed_over}"])


def test_paths_in_lists_of_a_command_go_by_their_last_parts():
    given = ["data.files=[/a/b.jsonl,'/c d/e f.txt']", "distill.phases=[{blend: [{files: [/x/y.jsonl], weight: 0.5}]}]", "search.hidden={low: 96, high: 128}"]
    assert shlex.split(repeating_command(given))[3:] == [
        "data.files=[b.jsonl,'e f.txt']", "distill.phases=[{blend: [{files: [y.jsonl], weight: 0.5}]}]", "search.hidden={low: 96, high: 128}",
    ]  # fmt: skip


def test_a_text_of_an_earlier_version_loses_the_places_it_names():
    text = "Cut from /home/me/own: hidden 48 → 40, by /home/me/own/plan.json; /home/me/own-2 and https://example.org/home/me/own are others."
    assert without_paths(text, ["/home/me/own"]) == "Cut from own: hidden 48 → 40, by plan.json; /home/me/own-2 and https://example.org/home/me/own are others."


def test_an_export_is_replaced_and_anything_else_is_kept(exported, walk, door, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("years of work")
    arguments = (*walk.settings, "stage=export", f"export.folder={own}")
    assert "is no export" in refusal(door(tmp_path, *arguments)) and [path.name for path in own.iterdir()] == ["thesis.txt"]
    assert door(tmp_path, *arguments, "export.overwrite=true").returncode == 0
    assert is_export(own) and not (own / "thesis.txt").exists()
    (own / "stale.txt").write_text("")
    assert door(tmp_path, *arguments).returncode == 0 and not (own / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".own.lock", "own"]


def test_a_file_in_the_way_is_refused_and_an_empty_folder_is_not(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check_place(tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_place(tmp_path / "empty", overwrite=False)
    check_place(tmp_path / "new", overwrite=False)


def test_what_is_missing_is_said_in_one_line(walk, door, tmp_path):
    said = refusal(door(tmp_path, f"runs_folder={tmp_path / 'runs'}", *walk.settings[1:], "stage=export"))
    assert "prune, distill; run stage=distill first" in said and not (tmp_path / "runs" / "tiny").exists()


@pytest.fixture(scope="module")
def interrupted(walk, start, door, tmp_path_factory):
    """(folder, settings, stage folder) of a distillation stopped by SIGINT between two steps, with best weights kept."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(walk.runs / "store", folder / "runs" / "store", ignore=lambda path, names: {"distill", "evaluate"} & set(names))
    own = ("distill.train.tokens=40000", "distill.train.save_every_steps=3", "distill.held_out_every=5", "distill.held_out_samples=4")
    settings = (f"runs_folder={folder / 'runs'}", *walk.settings[1:], *own)

    def saved(name: str) -> bool:
        return any(folder.glob(f"runs/store/distill/*/states/{name}/state.json"))

    process, deadline = start(folder, *settings, "stage=distill"), time.monotonic() + 120
    while not (saved("best") and saved("step-*[0-9]")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    stage = next(folder.glob("runs/store/distill/*/"))
    assert process.returncode == 130 and not (stage / "done.json").exists(), stderr
    return folder, settings, stage


@pytest.mark.parametrize(("state", "find"), [("newest", newest_state), ("best", best_state)])
def test_a_saved_state_of_a_distillation_under_way_is_exported(state, find, interrupted, door):
    folder, settings, stage = interrupted
    out = folder / state
    finished = door(folder, *settings, "stage=export", f"export.state={state}", f"export.folder={out}")
    assert finished.returncode == 0, finished.stderr
    saved, model, expected = find(stage), AutoModelForCausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        for tensor in expected.state_dict().values():
            tensor.zero_()
    assert not torch.equal(model.lm_head.weight, expected.lm_head.weight)
    load_weights(saved, expected)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    card, steps = (out / "README.md").read_text(), saved.facts["record"]["step"] + 1
    assert f"{steps:,} of 156 steps: a state saved on the way" in card and "they were not evaluated" in card
    assert ("the lowest held-out loss" in card) == (state == "best")


def test_the_student_of_a_distillation_under_way_is_missing(interrupted, door):
    folder, settings, _ = interrupted
    assert refusal(door(folder, *settings, "stage=export")).endswith(": distill; run stage=distill first")


def test_a_finished_distillation_has_no_newest_state(walk, door, tmp_path):
    said = refusal(door(tmp_path, *walk.settings, "stage=export", "export.state=newest", f"export.folder={tmp_path / 'out'}"))
    assert "its last one is export.state=student" in said and list(tmp_path.iterdir()) == [tmp_path / ".out.lock"]
    assert "distill.held_out_every" in refusal(door(tmp_path, *walk.settings, "stage=export", "export.state=best", f"export.folder={tmp_path / 'out'}"))


def test_an_upload_offline_is_refused_before_anything_is_written(walk, door, tmp_path):
    said = refusal(door(tmp_path, *walk.settings, "stage=export", "export.push=me/model", f"export.folder={tmp_path / 'out'}"))
    assert "HF_HUB_OFFLINE is set" in said and list(tmp_path.iterdir()) == []


def test_an_upload_without_a_token_or_an_id_is_refused(monkeypatch, tmp_path):
    from huggingface_hub import constants

    for name, value in {"HF_HUB_OFFLINE": False, "HF_TOKEN_PATH": str(tmp_path / "none")}.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="no token"):
        check_push("me/model")
    with pytest.raises(ValueError, match="form owner/name"):
        check_push("model")
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    check_push("me/model")
    check_push(None)


def test_the_licence_is_that_of_the_teachers_card_and_files(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: 'open: yes'\nlicense_link: https://example.org/l\nother: 3\n---\n# Model\n")
    (tmp_path / "LICENSE").write_text("terms")
    licence = licence_of(tmp_path)
    note = licence_note(licence, "owner/teacher", carried=True)
    assert "**open: yes** (https://example.org/l)" in note and "[LICENSE](LICENSE) is carried over" in note
    assert [path.name for path in licence.files] == ["LICENSE"]
    assert licence.metadata == {"license": "other", "license_name": "open: yes", "license_link": "https://example.org/l"}


def test_the_licence_stands_where_the_hub_reads_it(tmp_path, tiny):
    metadata = {"license": "other", "license_name": "open: yes"}
    card = model_card("Title", lines=[], architecture=tiny, base="owner/teacher", metadata=metadata)
    assert yaml.safe_load(card.split("---")[1]) == metadata | {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["minitron", "pruning", "distillation", "nemotron_h"],
        "base_model": "owner/teacher",
    }  # fmt: skip


def test_a_licence_that_is_nowhere_is_unknown_and_an_unreadable_card_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# Model\nlicense: mit is said here, but not to the Hub\n")
    assert licence_note(licence_of(tmp_path), "it", carried=True).startswith("Unknown")
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match="must have metadata in YAML"):
        licence_of(tmp_path)
    assert licence_of(tmp_path, "mit").metadata == {"license": "mit"}


def metadata_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


@pytest.mark.parametrize("model", ["pruned", "student"])
def test_a_checkpoint_of_a_teacher_that_nobody_knows_names_no_base_and_no_licence(model, walk):
    found, card = metadata_of(walk.checkpoint(model)), (walk.checkpoint(model) / "README.md").read_text()
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation" and "nemotron_h" in found["tags"]
    assert not {"base_model", "license"} & set(found) and "Unknown: the folder of the teacher" in card and "card.licence=ID" in card


def test_an_export_tells_the_hub_what_the_settings_say(walk, door, tmp_path):
    finished = door(tmp_path, *walk.settings, "stage=export", f"export.folder={tmp_path / 'out'}", "card.base_model=owner/teacher", "card.licence=apache-2.0")
    assert finished.returncode == 0, finished.stderr
    found = metadata_of(tmp_path / "out")
    assert (found["base_model"], found["license"]) == ("owner/teacher", "apache-2.0")
    assert "whose licence is **apache-2.0**" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("given", "said"), [
    ({"base_model": "/data/teacher"}, "form owner/name"), ({"base_model": "teacher"}, "form owner/name"), ({"licence": "Apache 2.0"}, "in lower case"),
])  # fmt: skip
def test_a_base_or_a_licence_that_the_hub_does_not_know_how_to_read_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        CardSettings(**given)
