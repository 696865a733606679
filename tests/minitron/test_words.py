"""What people type on the command line, through Hydra itself to the settings."""

from itertools import cycle, islice

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import minitron.run  # noqa: F401 registers the schema
from memory_budget.units import GIB
from minitron.settings.derived import axis_of, budget_of
from minitron.settings.names import nearest, setting_types
from minitron.settings.run import Criterion, Settings, Stage
from minitron.settings.teachers import CONF_FOLDER
from minitron.settings.words import for_hydra
from nas.axes import AXES


def composed(*overrides: str) -> Settings:
    with initialize_config_dir(str(CONF_FOLDER), version_base="1.3"):
        return OmegaConf.to_object(compose("run", overrides=list(overrides)))


def typed(*arguments: str) -> Settings:
    """Settings of the tiny experiment's, where no other is named."""
    named = any(argument.lstrip("~").startswith("experiment") for argument in arguments)
    return composed(*for_hydra([*arguments, *([] if named else ["experiment=tiny"])]))


def values_of(settings, name: str):
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


# ----------------------------------------------------------------------------------------------------------------- text

AWKWARD = ("a=b", "with space", "ünï-ß-漢", "[ab].txt", "(ab", "a)b", "{a,b", "x,y", "#1", "~home", "it's", '"both', "'", "a'b\"c", "100%", "$HOME", "${a}",
           "\\", "a\\'b", "\\${x}", "1e6", "true", "-5", "key: value", "a:b", "*", "??", "@", "!", "&;|", " edges ", "choice(a,b)", "null?")  # fmt: skip
ELSEWHERE = {"device", "plan.device", "run_name", "budget.name", "teacher.gguf", "teacher.package", "search.fixed.pattern", "data.dataset",
             "data.dataset_config", "data.dataset_revision", "data.prompt_field",
             "data.answer_field", "card.base_model", "card.licence"}  # what else is checked of them, or of them together, comes first  # fmt: skip
TEXTS = {name for name, kind in setting_types().items() if kind is str} - ELSEWHERE
LISTS = ("data.files", "evaluate.task_folders", "merge.checkpoints", "evaluate.prompts")


def test_text_settings_take_any_character_as_it_is():
    """All of a path or a name, a text each, until every text has been one."""
    names = [*sorted(TEXTS), *LISTS]
    assert {"runs_folder", "teacher.path", "teacher.config", "base.path", "search.layer_order", "search.fixed.file", "export.folder", "prompt"} <= set(names)
    for first in range(0, len(AWKWARD), len(names)):
        wanted = dict(zip(names, islice(cycle(AWKWARD), first, None), strict=False))
        settings = typed(*(f"{name}={text}" for name, text in wanted.items()))
        assert {name: values_of(settings, name) for name in wanted} == {name: [text] if name in LISTS else text for name, text in wanted.items()}


@pytest.mark.parametrize("text", ["a=b", "it's", "x,y", "(ab", "{a,b", "~é"])
def test_hydra_alone_takes_them_otherwise(text):
    """The control."""
    with pytest.raises((HydraException, OmegaConfBaseException)):
        assert composed(f"runs_folder={text}").runs_folder != text


def test_what_is_quoted_null_or_names_a_setting_is_not_text_as_it_is():
    settings = typed("runs_folder='/a=b'", "teacher.path=null", "run_name=x_${scoring.criterion}", "export.folder=${oc.env:HOME}/x", "prompt=${seed}")
    assert (settings.runs_folder, settings.teacher.path, settings.run_name, settings.prompt) == ("/a=b", None, "x_iterative_mse", "${seed}")
    assert settings.export.folder.startswith("/") and settings.export.folder.endswith("/x")


def test_choices_are_written_by_their_names():
    assert f"{Criterion.mse} {Stage.all}" == "mse all"


@pytest.mark.parametrize(("argument", "sweep"), [("teacher.path=a=1,b", ["a=1", "b"]), ("teacher.path='a,b',c", ["a,b", "c"]), ("teacher.path=a[1,2]", None),
                                                 ("data.files=a.txt,b.txt", [["a.txt"], ["b.txt"]]), ("evaluate.tasks=[a,b],c", [["a", "b"], ["c"]]),
                                                 ("distill.train.tokens=1e3,2e3", [1000, 2000]), ("search.hidden=96,112", [[96], [112]]),
                                                 ("prompt=a,b", None), ("seed=range(1,4)", [1, 2, 3])])  # fmt: skip
def test_under_m_commas_separate_what_is_tried(argument, sweep):
    (override,) = OverridesParser.create().parse_overrides([word for word in for_hydra(["-m", argument])[1:] if not word.startswith(("hydra.", "experiment="))])
    assert override.is_sweep_override() == (sweep is not None)
    assert sweep is None or [eval(value) if value[:1] in "['" else value for value in override.sweep_string_iterator()] == [  # noqa: S307
        value if isinstance(value, list | str) else str(value) for value in sweep]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ numbers and lists


def test_one_name_is_a_list_of_one_and_exponents_are_whole_numbers():
    settings = typed("data.files=corpus.jsonl", "evaluate.tasks=arc_easy,mmlu", "evaluate.task_folders=[a=b, 'c, d']", "scoring.protect=0,20",
                     "evaluate.needle.lengths=1e2", "distill.train.tokens=1e6", "data.max_train_tokens=2.5e5", "screen.train.tokens=1_000_000",
                     "evaluate.speed={input_tokens: 8, output_tokens: 4, batch: 1}", "evaluate.prompts=[]")  # fmt: skip
    assert settings.evaluate.prompts == []
    assert (settings.data.files, settings.evaluate.tasks, settings.evaluate.task_folders) == (["corpus.jsonl"], ["arc_easy", "mmlu"], ["a=b", "c, d"])
    assert (settings.scoring.protect, settings.evaluate.needle.lengths, settings.evaluate.speed[0].input_tokens) == ([0, 20], [100], 8)
    assert (settings.distill.train.tokens, settings.data.max_train_tokens, settings.screen.train.tokens) == (1_000_000, 250_000, 1_000_000)


@pytest.mark.parametrize("argument", ["data.files=corpus.jsonl", "distill.train.tokens=1e6", "search.hidden=96", "experiment=null", "budget=l4"])
def test_hydra_alone_refuses_them(argument):
    """The control."""
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)):
        budget_of(composed(argument))


def test_a_number_that_is_not_whole_stays_refused():
    with pytest.raises((HydraException, OmegaConfBaseException), match="1.5"):
        typed("distill.train.tokens=1.5")


# ----------------------------------------------------------------------------------------------------------------- axes


def test_sizes_are_an_axiss_values_by_either_of_its_names():
    settings = typed(*(f"search.{name}=3" for name in AXES), "search.hidden=[96,112]")
    assert {name: getattr(settings.search, name).values for name in AXES} == {name: [96, 112] if name == "hidden" else [3] for name in AXES}
    aliases = [axis.field for name, axis in AXES.items() if name != axis.field]
    settings = typed(*(f"search.{alias}=3" for alias in aliases))
    assert len(aliases) > 4 and all(getattr(settings.search, name).values == [3] for name, axis in AXES.items() if axis.field in aliases)


def test_an_axis_keeps_its_bounds_where_they_are_typed_and_null_is_the_teachers_value():
    assert typed("search.num_layers.low=0.5").search.layers.low == 0.5
    settings = typed("search.hidden=null")
    assert settings.search.hidden.low is None and composed().search.hidden.low is not None

    class Teacher:
        hidden, model_type, mixers = 128, "nemotron_h", "M-"

    assert axis_of(settings, "hidden", Teacher) == (128,)


def test_experts_to_protect_are_typed_by_their_layers():
    """Together, one layer alone, and in a file of one's own, where YAML makes numbers of them; Hydra alone refuses a layer that run.yaml does not have."""
    settings = typed("search.protect_experts={1: [0, 5], 3: [2]}", "search.protect_experts.4=[7]", "depth_lap.enabled=false")
    assert settings.search.protect_experts == {"1": [0, 5], "3": [2], "4": [7]}
    with pytest.raises(HydraException, match="Could not override"):
        composed("search.protect_experts.1=[0]")
    merged = OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.create("search: {protect_experts: {1: [0, 5]}}"))
    assert OmegaConf.to_object(merged).search.protect_experts == {"1": [0, 5]}


# --------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(("arguments", "name", "gib"), [(["budget=l4"], "l4", 22.03 * 0.95), (["budget=L4"], "l4", 22.03 * 0.95),
    (["budget=24"], "24 GiB", 24), (["budget=24gb"], "24 GiB", 24), (["budget=0.005"], "0.005 GiB", 0.005), (["budget.name=RTX4090"], "rtx4090", 23.64 * 0.95),
    (["budget=24", "budget.cushion_fraction=0.5"], "24 GiB", 12), (["budget.device_gib=24"], "24 GiB", 24),
    (["budget.name=mine", "budget.device_gib=24", "budget.cushion_fraction=0.5", "budget.set_aside_gib=0"], "mine", 12)])  # fmt: skip
def test_a_budget_is_what_it_is_called(arguments, name, gib):
    """Under the tiny experiment, whose device has 0.0052 GiB, a cushion and something set aside."""
    budget = budget_of(typed(*arguments))
    assert (budget.name, budget.bytes / GIB) == (name, pytest.approx(gib, abs=1e-6))


@pytest.mark.parametrize("name", ["budget", "budget.name", "budget.device_gib"])
def test_a_budget_that_is_taken_away_is_left_to_hydra(name):
    assert for_hydra([f"~{name}"]) == [f"~{name}"] and len(for_hydra([f"{name}=24" if name != "budget.name" else "budget.name=l4"])) > 1


def test_hydra_alone_leaves_a_preset_beside_the_experiments_own_numbers():
    """The control."""
    with pytest.raises(ValueError, match="'rtx4090', a card of 23.64 GiB, but budget.device_gib is 0.0052; give one of them"):
        budget_of(composed("budget.name=rtx4090"))


@pytest.mark.parametrize("argument", ["teacher.path=mine", "teacher.gguf=a.gguf", "teacher.package=a==1", "++teacher.path=mine"])
def test_a_teacher_without_an_experiment_is_ones_own(argument):
    assert "experiment=own" in for_hydra([argument])


@pytest.mark.parametrize("arguments", [["seed=1"], ["teacher.path=null"], ["teacher.path=mine", "experiment=tiny"], ["teacher.path=mine", "~experiment"],
                                       ["teacher.path=mine", "experiment=none"]])  # fmt: skip
def test_without_a_teacher_or_with_an_experiment_it_is_not(arguments):
    assert "experiment=own" not in for_hydra(arguments)


def test_a_modelled_device_brings_its_own_numbers():
    assert typed("throughput.device=l4").throughput.tflops is None
    assert typed("throughput.device=mine", "throughput.tflops=2").throughput.gb_per_second == 20


# -------------------------------------------------------------------------------------------------------- other arguments


def test_options_may_stand_anywhere():
    assert for_hydra(["seed=1", "-m", "stage=score", "--config-dir", "d", "--cfg", "job"])[:5] == ["-m", "--config-dir", "d", "--cfg", "job"]


@pytest.mark.parametrize("name", ["null", "none", "None"])
def test_no_experiment_is_none(name):
    assert typed(f"experiment={name}") == typed("~experiment") != typed()


def test_jobs_are_named_by_what_they_try_alone():
    def left_out(*arguments):
        return for_hydra(["-m", *arguments])[-1].partition("exclude_keys=")[2]

    assert left_out("stage=score", "scoring.criterion=mse,kl") == "[stage]"
    assert left_out("candidate=a,b", "seed=1,2") == "[candidate]"
    assert left_out("run_name=a,b", "seed=1,2") == left_out("run_name=a_${seed}", "seed=1,2") == "[run_name,seed]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distil.train.tokens=3"], "distil.train.tokens is no setting; did you mean distill.train.tokens?"),
        (["distill.train.token=3"], "distill.train.token is no setting; did you mean distill.train.tokens?"),
        (["searh.layers=3"], "searh.layers is no setting; did you mean search.layers?"),
        (["learning_rate=3"], "learning_rate is no setting; did you mean "),
        (["foo=1"], "foo is no setting; --cfg job lists them all"),
        (["teacher=own"], "teacher is 'own', but teacher is a group of settings; did you mean teacher.path=own?"),
        (["scoring=3"], "scoring is '3', but scoring is a group of settings: samples, "),
        (["prun"], "'prun' is no key=value; did you mean stage=prune?"),
        (["seed"], "'seed' is no key=value; it must be given a value: seed=…"),
        (["models/own.gguf"], "did you mean teacher.gguf=models/own.gguf?"),
        (["--multi"], "--multi is no option; did you mean --multirun?"),
        (["--cfg"], "--cfg is ''; it must be job"),
        (["--config-dir"], "--config-dir has no value"),
        (["budget=rtx-4090"], "budget (rtx-4090) must be a number of GiB above 0 or one of a10g, t4, l4, rtx3090, rtx4090, rtx5090,"),
        (["budget.name=rtx-4090"], "budget.name is 'rtx-4090'; without budget.device_gib it must be one of"),
        (["budget=null"], "budget (null) must be a number of GiB"),
        (["search.hidden=0.5"], "search.hidden is '0.5'; it must be one size or several, e.g. search.hidden=96"),
        (["search.hidden=wide"], "search.hidden is 'wide'; it must be one size or several"),
        (["search.layers=3", "search.num_layers=4"], "search.num_layers and search.layers are both given, two names of one axis"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_no_argument_is_refused_with_what_may_be_meant(arguments, said):
    with pytest.raises(ValueError) as refusal:
        for_hydra(arguments)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_every_setting_is_known():
    """The control: none of run.yaml's own names is refused."""
    assert len(for_hydra([f"{name}=null" for name in setting_types() if not name.startswith(("budget.", "throughput."))])) > 200


@pytest.mark.parametrize(("word", "near"), [("eval", "evaluate"), ("prun", "prune"), ("distil", "distill"), ("bogus", None), ("", None)])
def test_the_nearest_of_the_stages(word, near):
    assert nearest(word, Stage.__members__) == near
