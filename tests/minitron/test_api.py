"""The door for Python: the store and the results of the command, settings from Python values, progress, thinking budgets."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_budget.hf_config import architecture_from_config, read_config
from minitron import api
from minitron.door.composed import compose_settings
from minitron.settings.teachers import CONF_FOLDER, STORED_FOLDER

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


@pytest.fixture(scope="module")
def values(small_settings) -> dict:
    """The settings of the shared walk as Python has them."""
    return {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in small_settings)}


@pytest.fixture(scope="module")
def example(walk, values) -> dict:
    """The names that the example in the documents leaves, its model and text those of the shared walk."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    text = "\n".join(blocks)
    assert len(blocks) >= 6 and (line := re.search(r"^asked = .*$", text, re.MULTILINE))
    names = {"asked": {"runs_folder": walk.runs, "settings": values}}
    exec(compile(text.replace(line[0], "").replace('"MODEL"', repr(str(walk.checkpoint("teacher")))), str(PAGE), "exec"), names)
    return names


def test_the_example_in_the_documents_runs(example):
    assert set(example["measured"]) == {"teacher", "pruned", "student"} and example["answer"].tokens == 24
    assert example["tokens"].shape[1] > example["prompt"]["input_ids"].shape[1]


@pytest.mark.parametrize(("name", "stage"), [("scored", "score"), ("found", "search"), ("cut", "prune"), ("student", "distill")])
def test_a_call_finds_what_the_command_has_done(name, stage, walk, example):
    done = example[name]
    assert done.reused and done.folder.resolve() == walk.stage_folder(stage).resolve() and done.report == walk.runs / "tiny"
    assert (done.checkpoint is not None) == (stage in ("prune", "distill")) and (done.checkpoint is None or (done.checkpoint / "config.json").exists())


def test_a_call_makes_what_the_command_made_to_the_bit_and_tells_of_it(walk, values, tmp_path):
    shutil.copytree(walk.runs / "store", tmp_path / "store", ignore=shutil.ignore_patterns("score", "prune", "search", "shortlist", "distill"))
    heard = []
    scored = api.score(runs_folder=tmp_path, settings=values, progress=heard.append)
    command = walk.stage_folder("score")
    assert not scored.reused and scored.folder.name == command.name
    assert (scored.folder / "scores.safetensors").read_bytes() == (command / "scores.safetensors").read_bytes()
    assert {"data", "score"} <= {one.what for one in heard} and any(0 < one.done <= one.total for one in heard if one.total)
    assert api.importance(scored).hidden().shape == (32,)
    assert "minitron.run" in json.loads((tmp_path / "tiny" / "summary.json").read_text())["command"]


def test_progress_is_a_line_for_people():
    heard = (("data", "3 rows"), ("", "said"), ("scoring", "layer 2", 3.0, 4, "layers"), ("reading", "", 7.0, None, "GiB"))
    lines = [str(api.Progress(*one)) for one in heard]
    assert [line.strip() for line in lines] == ["data  3 rows", "said", "scoring   75 %  layer 2", "reading  7 GiB"]


def test_what_a_callback_raises_ends_the_call_and_the_call_goes_on(walk, values, tmp_path):
    shutil.copytree(walk.runs / "store", tmp_path / "store", ignore=shutil.ignore_patterns("search"))

    def stop(progress):
        if progress.what == "screen":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        api.search(runs_folder=tmp_path, settings=values, progress=stop)
    assert not api.search(runs_folder=tmp_path, settings=values).reused


ODD = {"teacher.path": "/a b/c=d, [1] {x} it's ${seed} \\", "data.files": ["a, b.jsonl", "null"], "search.hidden": [96, 112], "scoring.criterion": "kl",
       "teacher.config": None, "distill.train.tokens": 10**6, "distill.train.learning_rate": 1e-5, "search.fixed": {"layers": 9}, "workload": {"batch": 2},
       "evaluate.speed": [{"input_tokens": 8, "output_tokens": 4, "batch": 1}], "scoring.ceilings": {"ffn": 3}, "depth_lap.enabled": False}  # fmt: skip


def test_python_values_come_through_as_they_are():
    made = api.settings(experiment="tiny", settings=ODD)
    assert made.teacher.path == ODD["teacher.path"] and made.data.files == ODD["data.files"] and made.search.hidden.values == [96, 112]
    assert made.scoring.criterion.name == "kl" and made.teacher.config is None and made.distill.train.tokens == 10**6
    assert made.distill.train.learning_rate == 1e-5 and made.search.fixed.num_layers == 9 and made.workload.batch == 2 and made.workload.context_tokens == 4096
    assert [(one.input_tokens, one.output_tokens) for one in made.evaluate.speed] == [(8, 4)]
    assert made.scoring.ceilings["ffn"] == 3 and made.depth_lap.enabled is False


def test_a_model_and_a_budget_are_experiment_own_as_on_the_command_line(tmp_path):
    shutil.copyfile(STORED_FOLDER / "config.json", tmp_path / "config.json")
    assert api.settings(teacher=tmp_path, budget=0.005, runs_folder="x") == compose_settings(f"teacher.path={tmp_path}", "budget=0.005", "runs_folder=x")
    assert api.settings(teacher=tmp_path, budget=0.005, text="a") != compose_settings(f"teacher.path={tmp_path}", "budget=0.005")


@pytest.mark.parametrize(("wrong", "said"), [
    ({"settings": {"distil.train.tokens": 1}}, "did you mean distill.train.tokens"),
    ({"settings": {"distill.train.tokens": "many"}}, "distill.train.tokens"),
    ({"settings": {"distill.train.tokens": object()}}, "distill.train.tokens is"),
    ({"budget": "l5"}, "l4"), ({"experiment": "tinny"}, "tiny"), ({"teacher": STORED_FOLDER, "budget": 24}, "fits as it is"),
])  # fmt: skip
def test_a_mistake_is_one_line(wrong, said, tmp_path):
    with pytest.raises(ValueError, match=said) as raised:
        api.distill(**wrong, runs_folder=tmp_path)
    assert "\n" not in str(raised.value)


def test_a_name_that_no_call_takes_is_refused():
    with pytest.raises(TypeError, match="tokens is none of teacher"):
        api.plan(tokens=3)


def test_memory_is_the_published_figures_from_a_file_and_from_sizes():
    file = CONF_FOLDER / "architectures" / "nemotron-nano-12b-v2-base.json"
    from_file, from_sizes = api.memory(file, budget="a10g"), api.memory(architecture_from_config(read_config(file)))
    assert from_file.report == from_sizes.report and round(from_file.total / 2**30, 2) == 26.07
    assert from_file.fits is False and from_sizes.fits is None and api.memory(file, budget="a100-40").max_context_tokens > 131072


def test_importing_brings_neither_hydra_nor_torch():
    code = "import sys, minitron.api as api; api.memory(sys.argv[1]); print(sorted({'hydra', 'omegaconf', 'torch'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code, str(STORED_FOLDER)], cwd=PAGE.parents[1], text=True, capture_output=True, timeout=60)
    assert (found.stdout, found.stderr) == ("[]\n", "")


def test_max_thinking_tokens_is_the_budget_of_the_command_and_of_transformers(walk):
    folder = walk.checkpoint("student")
    short, free = (api.generate(folder, "Hi", thinking=True, max_thinking_tokens=most, max_new_tokens=16, device="cpu") for most in (4, None))
    assert short.reasoning_tokens == 4 < free.reasoning_tokens and "</think>" in short.text and not short.ended
    assert short.reasoning + "</think>" + short.answer == short.text
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("Problem <think>", return_tensors="pt")["input_ids"]
    close = tokenizer("</think>", add_special_tokens=False)["input_ids"]

    def thought(*processors) -> list[int]:
        made = model.generate(ids, max_new_tokens=4 + len(close), do_sample=False, eos_token_id=None, logits_processor=list(processors))
        return made[0, ids.shape[1] :].tolist()

    torch.manual_seed(0)
    assert thought(api.thinking_budget(tokenizer, 4))[4:] == close != thought()[4:]
