"""Which settings make a key, and what they refuse."""

import pytest

from memory_budget.architecture import Architecture
from minitron.settings.data import DataSettings
from minitron.settings.derived import axis_of
from minitron.settings.rules import key_settings
from minitron.settings.run import DepthLapSettings, EvaluateSettings, PruneSettings, ScoringSettings, Settings, Stage, TeacherSettings
from minitron.settings.search import AxisSettings, FixedSettings, SearchSettings
from minitron.settings.training import DistillSettings, Optimizer, TrainSettings


def test_a_how_setting_leaves_the_key_settings_as_they_are():
    assert key_settings(ScoringSettings(batch=1)) == key_settings(ScoringSettings(batch=64))
    assert key_settings(TrainSettings(save_every_seconds=1)) == key_settings(TrainSettings(save_every_seconds=99))
    assert key_settings(PruneSettings(max_shard_gib=1)) == key_settings(PruneSettings(max_shard_gib=2))


def test_a_what_setting_changes_the_key_settings():
    assert key_settings(ScoringSettings(samples=1)) != key_settings(ScoringSettings(samples=2))
    assert key_settings(TrainSettings(batch=1)) != key_settings(TrainSettings(batch=2))


def test_how_settings_are_left_out_at_every_depth():
    assert "save_every_seconds" not in key_settings(Settings())["distill"]["train"]
    assert "tokens" in key_settings(Settings())["distill"]["train"]


def test_key_settings_are_plain_values():
    assert key_settings(TrainSettings(optimizer=Optimizer.muon))["optimizer"] == "muon"
    assert key_settings({"stages": (Stage.prune, [Stage.all])}) == {"stages": ["prune", ["all"]]}


def test_fixed_settings_give_only_what_is_set():
    assert FixedSettings(hidden=96).given() == {"hidden": 96}
    assert FixedSettings().given() == {}


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: TeacherSettings(train=TrainSettings(tokens=0)), "teacher.train.tokens is 0"),
        (lambda: TeacherSettings(train=TrainSettings(learning_rate=-1.0)), "teacher.train.learning_rate is -1.0"),
        (lambda: DistillSettings(train=TrainSettings(clip_norm=0.0)), "distill.train.clip_norm is 0.0"),
        (lambda: DistillSettings(train=TrainSettings(batch=0)), "distill.train.batch is 0"),
        (lambda: DistillSettings(temperature=0.0), "distill.temperature is 0.0"),
        (lambda: DataSettings(sequence_length=1), "data.sequence_length is 1"),
        (lambda: DataSettings(vocab=256), "data.vocab is 256"),
        (lambda: DataSettings(max_train_tokens=0), "data.max_train_tokens is 0"),
        (lambda: DataSettings(sequence_length=64, max_heldout_tokens=63), "data.max_heldout_tokens is 63; it must be at least 64"),
        (lambda: DataSettings(max_documents=0), "data.max_documents is 0"),
        (lambda: DataSettings(files=["a.txt"], dataset="owner/name"), "data.files and data.dataset ('owner/name') are both given"),
        (lambda: DataSettings(dataset_revision="main"), "data.dataset_revision is 'main', but data.dataset is not given"),
        (lambda: ScoringSettings(layer_samples=0), "scoring.layer_samples is 0"),
        (lambda: SearchSettings(shortlist_size=0), "search.shortlist_size is 0"),
        (lambda: SearchSettings(floors={"attn": 1}), "search.floors names the kind 'attn'"),
        (lambda: SearchSettings(floors={"mamba": -1}), "search.floors.mamba is -1"),
        (lambda: PruneSettings(max_shard_gib=0.0), "prune.max_shard_gib is 0.0"),
        (lambda: EvaluateSettings(samples=0), "evaluate.samples is 0"),
        (lambda: Settings(run_name="../elsewhere"), "run_name is '../elsewhere'"),
        (lambda: Settings(run_name="store"), "run_name is 'store'"),
        (lambda: Settings(device="tpu"), "device is 'tpu'"),
        (lambda: SearchSettings(protect_experts={"first": [1]}), "search.protect_experts has first: [1]; it must be experts of a layer by its number"),
        (lambda: SearchSettings(protect_experts={1: [2, 2]}), "search.protect_experts has 1: [2, 2]; it must be experts of a layer by its number, each once"),
        (lambda: SearchSettings(max_active_parameters=0), "search.max_active_parameters is 0; it must be at least 1"),
        (lambda: Settings(search=SearchSettings(protect_experts={1: [2]}), depth_lap=DepthLapSettings(enabled=True)),
         "search.protect_experts is {'1': [2]}, but depth_lap.enabled is true"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_settings_name(build, name):
    with pytest.raises(ValueError, match="must be") as refusal:
        build()
    assert str(refusal.value).startswith(name)


def test_values_at_the_edge_of_their_range_are_taken():
    DataSettings(sequence_length=2, vocab=300, max_train_tokens=2, max_documents=1)
    DistillSettings(temperature=0.01, train=TrainSettings(tokens=1, batch=1, weight_decay=0.0, save_every_seconds=0.0))
    SearchSettings(shortlist_size=1, screen_samples=1, floors={"ffn": 0})


TEACHER = Architecture(model_type="nemotron_h", pattern="M-M-M*-M-M*-M-M*-M-M-", hidden=128, vocab=2048, ffn=512, mamba_num_heads=16, mamba_num_groups=2)


@pytest.mark.parametrize(
    ("axis", "low", "options"),
    [
        ("layers", 0.75, (16, 17, 18, 19, 20, 21)),
        ("hidden", 0.75, (96, 112, 128)),
        ("hidden", 0.8, (112, 128)),
        ("ffn", 0.625, (320, 384, 448, 512)),
        ("mamba_heads", 0.75, (12, 14, 16)),
        ("mamba_heads", 1.0, (16,)),
        ("mamba_heads", 12.0, (12, 14, 16)),
    ],
)
def test_a_bound_up_to_1_is_a_share_of_the_teachers_in_whole_steps(axis, low, options):
    settings = Settings(search=SearchSettings(**{axis: AxisSettings(low=low)}))
    assert axis_of(settings, axis, TEACHER) == options


def test_an_axis_without_bounds_keeps_the_teachers_value():
    assert axis_of(Settings(), "hidden", TEACHER) == (128,)


def test_a_bound_of_zero_is_refused():
    with pytest.raises(ValueError, match="search.hidden has the option 0; it must be at least 1"):
        axis_of(Settings(search=SearchSettings(hidden=AxisSettings(low=0.0))), "hidden", TEACHER)
