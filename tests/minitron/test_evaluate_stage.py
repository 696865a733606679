"""stage=evaluate at the door: lm-eval's tasks as by its own command, what is kept and what is measured again, what is refused."""

import importlib.metadata
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.measures.tasks import load_task, task_identity, tasks_identity
from minitron.settings.evaluate import EvaluateSettings

MODELS = ("teacher", "pruned", "student")
WORDS = ("import", "return", "self", "class", "def", "if", "else", "for", "while", "try", "except", "raise", "with", "yield", "None", "True")
CHOICE = """task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TEXT = """task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""
NOWHERE = "task: nowhere\ndataset_path: nobody/nothing-of-this-name\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with a task of each kind that reads likelihoods, and one whose dataset is not on this machine."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    choices = [{"question": " ".join(draw.choices(WORDS, k=2)), "choices": draw.sample(WORDS, 4), "answer": draw.randrange(4)} for _ in range(24)]
    texts = [{"text": "\n".join(" ".join(draw.choices(WORDS, k=6)) for _ in range(8))} for _ in range(6)]
    for name, records in (("choice", choices), ("text", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, described in (("choice", CHOICE), ("text", TEXT), ("nowhere", NOWHERE)):
        (folder / f"{name}.yaml").write_text(described.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def evaluated(walk, door, tasks, tmp_path_factory):
    """Runs the finished walk on, with tasks: run(*more) gives the measurements there are by then, with their times, and the summary."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(walk.runs / "store", folder / "runs" / "store")

    def run(*more: str) -> tuple[dict[str, int], dict]:
        finished = door(folder, f"runs_folder={folder / 'runs'}", *walk.settings[1:], f"evaluate.task_folders=[{tasks}]", *more)
        assert finished.returncode == 0 and finished.stderr == "", finished.stderr
        store = folder / "runs" / "store" / "measurements"
        files = {path.relative_to(store).as_posix(): path.stat().st_mtime_ns for path in store.glob("*/*.json")}
        name = next((value.partition("=")[2] for value in more if value.startswith("run_name=")), "tiny")
        return files, json.loads((folder / "runs" / name / "summary.json").read_text())

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def one_task(evaluated):
    return evaluated("evaluate.tasks=[own_choice]")


@pytest.fixture(scope="module")
def both_tasks(evaluated, one_task):
    return evaluated("evaluate.tasks=[own_choice, own_text]")


def test_a_task_that_is_added_is_all_that_runs(one_task, both_tasks):
    (before, _), (after, summary) = one_task, both_tasks
    assert sum("/task_own_choice" in name for name in before) == 3 and before.items() <= after.items()
    assert sorted(name.split("/")[1].rsplit("-", 1)[0] for name in after.keys() - before.keys()) == ["task_own_text"] * 3
    for model in MODELS:
        assert list(summary["models"][model]["evaluation"]["tasks"]) == ["own_choice", "own_text"]


def test_another_student_is_measured_and_its_teacher_is_not(both_tasks, evaluated):
    before, _ = both_tasks
    after, summary = evaluated("evaluate.tasks=[own_choice]", "distill.temperature=2.0", "run_name=tiny")
    (folder,) = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert before.items() <= after.items() and folder == f"distill-{summary['stages']['distill']['key']}"


def test_models_stand_side_by_side_with_standard_errors(both_tasks):
    _, summary = both_tasks
    results = [summary["models"][model]["evaluation"]["tasks"]["own_choice"]["own_choice"] for model in MODELS]
    assert all(result["samples"] == 24 and result["shots"] == 0 for result in results)
    accuracies = [result["metrics"]["acc"] for result in results]
    for accuracy in accuracies:  # the standard error of a mean of 24 zeros and ones
        share = accuracy["value"]
        assert accuracy["standard_error"] == pytest.approx((share * (1 - share) / 23) ** 0.5) and accuracy["higher_is_better"]
    perplexities = [summary["models"][model]["evaluation"]["tasks"]["own_text"]["own_text"]["metrics"]["bits_per_byte"]["value"] for model in MODELS]
    assert len(set(perplexities)) == 3 and min(perplexities) > 1


def test_lm_eval_by_its_own_command_gives_the_same_of_the_export(walk, both_tasks, evaluated, door, tasks, environment):
    """Both ways compute in float32, in another order: measured, they differ by 3e-8."""
    _, summary = both_tasks
    folder = evaluated.folder
    wanted = (f"evaluate.task_folders=[{tasks}]", "evaluate.tasks=[own_choice, own_text]")
    exported = door(folder, f"runs_folder={folder / 'runs'}", *walk.settings[1:], *wanted, "stage=export")
    assert exported.returncode == 0, exported.stderr
    assert "| own\\_choice | 24 | acc ↑ |" in (folder / "runs" / "tiny" / "export" / "README.md").read_text()
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={folder / 'runs' / 'tiny' / 'export'}", "--include_path",
               tasks, "--tasks", "own_choice", "own_text", "--device", "cpu", "--batch_size", "4", "--output_path", folder / "own"]  # fmt: skip
    subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True, timeout=600)
    (file,) = (folder / "own").rglob("results*.json")
    own = json.loads(file.read_text())["results"]
    ours, pruned = ({name: one[name] for name, one in summary["models"][model]["evaluation"]["tasks"].items()} for model in ("student", "pruned"))
    for metric in ("acc", "acc_norm"):
        stated = ours["own_choice"]["metrics"][metric]
        assert (stated["value"], stated["standard_error"]) == (own["own_choice"][f"{metric},none"], own["own_choice"][f"{metric}_stderr,none"])
    bits = pytest.approx(own["own_text"]["bits_per_byte,none"], rel=2e-7)
    assert ours["own_text"]["metrics"]["bits_per_byte"]["value"] == bits != pruned["own_text"]["metrics"]["bits_per_byte"]["value"]


def test_the_report_shows_what_was_measured(both_tasks, evaluated):
    evaluated("evaluate.tasks=[own_choice, own_text]")  # the last to write the page
    folder = evaluated.folder / "runs" / "tiny"
    page = (folder / "report.md").read_text()
    said = ["| source | held-out tokens | teacher: loss (nats/token) |", "| sequences × tokens | model |", "| context (tokens) | teacher |", "Chance is 25.0 %"]
    said += ["| task (lm-eval) | documents | metric | teacher | pruned | student |", "| own\\_choice | 24 | acc ↑ |", "](positions.png)", "](needle.png)"]
    assert [text for text in said if text not in page] == []
    assert all((folder / name).stat().st_size > 5000 for name in ("positions.png", "needle.png"))


def test_a_run_that_finds_everything_done_imports_neither_torch_nor_lm_eval(both_tasks, walk, evaluated, tasks, environment):
    code = ("import sys, minitron.run\ncode = minitron.run.main()\n"
            "print('imported', code, [name for name in ('torch', 'transformers', 'lm_eval', 'datasets') if name in sys.modules])")  # fmt: skip
    arguments = (f"runs_folder={evaluated.folder / 'runs'}", *walk.settings[1:], f"evaluate.task_folders=[{tasks}]", "evaluate.tasks=[own_choice, own_text]")
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, cwd=evaluated.folder, capture_output=True, text=True)
    assert "imported 0 []" in done.stdout and done.stdout.count("(already done)") == 11, done.stdout + done.stderr


# What a key says of tasks.


@pytest.mark.parametrize("file", ["text.jsonl", "text.yaml", "choice.yaml"])
def test_a_changed_file_is_another_evaluation(file, tasks, tmp_path):
    copy = shutil.copytree(tasks, tmp_path / "copy")
    settings = EvaluateSettings(tasks=["own_text"], task_folders=[str(copy)])
    before = tasks_identity(settings)
    assert tasks_identity(settings) == before
    (copy / file).write_text((copy / file).read_text().replace("self", "this").replace("acc_norm", "acc"))
    assert (tasks_identity(settings) != before) == (file != "text.yaml")  # in which neither word stands


def test_data_outside_the_folder_count_too(tasks, tmp_path):
    (tmp_path / "only").mkdir()
    shutil.copyfile(tasks / "choice.jsonl", tmp_path / "choice.jsonl")
    (tmp_path / "only" / "choice.yaml").write_text(CHOICE.replace("FOLDER", str(tmp_path)) + "process_docs: !function nowhere.nothing\n")
    settings = EvaluateSettings(tasks=["own_choice"], task_folders=[str(tmp_path / "only")])
    before = tasks_identity(settings)
    (tmp_path / "choice.jsonl").write_text((tmp_path / "choice.jsonl").read_text() + "\n")
    assert tasks_identity(settings) != before


def test_a_neighbour_in_the_folder_does_not_change_what_a_task_is(tasks, tmp_path):
    def identity(folder: Path) -> dict:
        settings = EvaluateSettings(tasks=["own_text"], task_folders=[str(folder)])
        return task_identity(load_task("own_text", settings), settings)

    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copyfile(tasks / "text.yaml", alone / "text.yaml")
    assert identity(alone) == identity(tasks)
    (alone / "text.yaml").write_text(TEXT.replace("FOLDER", str(tasks)).replace("{{text}}", "{{text}}!"))
    assert identity(tmp_path / "alone") == identity(alone)
    other = shutil.copytree(alone, tmp_path / "other")
    assert identity(other) != identity(tasks)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate.tasks=[own_choise]"], "; did you mean own_choice?"),
        (["evaluate.tasks=[own_choice, nowhere]"], "evaluate.tasks: nowhere cannot be loaded ("),
        (["evaluate.tasks=[own_choice]", "evaluate.task_folders=[nowhere]"], "evaluate.task_folders names 'nowhere'; it must be a folder"),
        (["evaluate.task_limit=0"], "evaluate.task_limit is 0; it must be at least 1"),
        (["evaluate.needle.lengths=[64, 131073]"], "evaluate.needle.lengths has 131,073; it must be at least 1 and at most 131,072"),
        (["evaluate.speed=[{input_tokens: 131072, output_tokens: 1}]"], "together they must be at most 131,072, the teacher's max_position_embeddings"),
        (["evaluate.speed=[{prompt_tokens: 1}]"], "prompt_tokens is no setting"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_any_work(arguments, said, door, small_settings, tasks, tmp_path):
    finished = door(tmp_path, "runs_folder=runs", *small_settings, f"evaluate.task_folders=[{tasks}]", *arguments)
    assert finished.returncode == 2 and len(finished.error_lines) == 1 and said in finished.stderr, finished.stderr
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    def version(_name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert tasks_identity(EvaluateSettings()) is None
    with pytest.raises(ValueError, match=r"evaluate.tasks is \['arc_easy'\], which needs the package lm-eval; install it with: pip install 'minitron\[eval\]'"):
        tasks_identity(EvaluateSettings(tasks=["arc_easy"]))


def test_prompts_that_are_added_are_all_that_runs(evaluated):
    before, summary = evaluated("evaluate.tasks=[own_choice, own_text]")
    asked = ("evaluate.prompts=['import ', 'def main']", "evaluate.held_out_prompts=1", "evaluate.new_tokens=5")
    after, written = evaluated("evaluate.tasks=[own_choice, own_text]", *asked, "run_name=prompts")
    assert before.items() <= after.items()
    assert sorted(name.split("/")[1].rsplit("-", 1)[0] for name in after.keys() - before.keys()) == ["prompts"] * 3
    for model in MODELS:
        found = written["models"][model]["evaluation"]
        assert [one["prompt"] for one in found["continuations"]][:2] == ["import ", "def main"] and len(found["continuations"]) == 3
        assert "continuations" not in summary["models"][model]["evaluation"]
    assert "<h2>What they write</h2>" in (evaluated.folder / "runs" / "prompts" / "report.html").read_text()
