"""The prune stage with prune.method=compensated, by the real command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.units import GIB
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.placement import StreamedModel
from minitron.families.base import FFN
from minitron.families.nemotron_h import FAMILY
from minitron.pruning.basis import Basis
from minitron.pruning.compensate import Recipe
from minitron.pruning.compensated_cut import BASIS_FILE, MadeWeights
from minitron.pruning.cut_cost import CutCost
from minitron.pruning.disk_to_disk import PLAN_FILE, found_before, planned_tensors
from minitron.pruning.plan import PruningPlan
from minitron.settings.run import Directions, PruneMethod, PruneSettings, ScreenSettings, Settings
from minitron.settings.teachers import CONF_FOLDER
from minitron.walk.store import write_json
from minitron.walk.table import stages

COMPENSATED = ("stage=prune", "prune.method=compensated")


@pytest.fixture(scope="module")
def runs(walk, door, tmp_path_factory) -> Path:
    """A runs folder with everything of the walk up to the search and a compensated cut."""
    folder = tmp_path_factory.mktemp("compensated") / "runs"
    for stage in ("data", "teacher", "score", "shortlist", "teacher_cache", "screen", "search"):
        shutil.copytree(walk.runs / "store" / stage, folder / "store" / stage)
    finished = door(folder.parent, f"runs_folder={folder}", *walk.settings[1:], *COMPENSATED)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def stage(runs) -> Path:
    (folder,) = [done.parent for done in runs.glob("store/prune/*/done.json")]
    return folder


def test_the_student_has_the_slices_tensors_and_other_values(walk, stage):
    """The slice of the same plan: screened as they will be cut, candidates compare otherwise, and another may be chosen than in the walk."""
    teacher, told = Checkpoint(walk.checkpoint("teacher")), json.loads((stage / "plan.json").read_text())
    units = {axis: {int(layer): tuple(kept) for layer, kept in layers.items()} for axis, layers in told["units"].items()}
    plan = PruningPlan(Architecture(**told["teacher"]), Architecture(**told["student"]), tuple(told["kept_layers"]), units)
    one, sliced = load_file(stage / "checkpoint" / "model.safetensors"), {tensor.name: tensor for tensor in planned_tensors(FAMILY, plan, teacher)}
    other = {name: torch.cat(list(tensor.pieces())) for name, tensor in sliced.items()}
    assert set(one) == set(other)
    assert all(one[name].shape == other[name].shape and one[name].dtype == other[name].dtype for name in one)
    assert sum(torch.equal(one[name], other[name]) for name in one) < len(one) / 2
    assert read_config(stage / "checkpoint") == FAMILY.hf_config(read_config(teacher.folder), plan.student)


def test_it_loads_in_transformers_and_only_the_checkpoint_stays(stage):
    assert AutoModelForCausalLM.from_pretrained(stage / "checkpoint")(torch.arange(20)[None], use_cache=False).logits.isfinite().all()
    assert {path.name for path in stage.iterdir()} == {"checkpoint", "plan.json", "done.json"}


def test_the_result_says_what_it_cost_beside_the_slice(stage):
    losses = json.loads((stage / "done.json").read_text())["facts"]["held_out_losses"]
    assert set(losses) == {"base", "slice", "compensated"}
    assert losses["compensated"] - losses["base"] < 0.5 * (losses["slice"] - losses["base"])


def test_an_interrupted_run_goes_on_behind_its_whole_shards(walk, runs, stage, door, tmp_path):
    own = shutil.copytree(runs, tmp_path / "runs")
    stage = own / stage.relative_to(runs)
    checkpoint = stage / "checkpoint"
    small = ("prune.max_shard_gib=0.00002", *COMPENSATED)
    shutil.rmtree(checkpoint)
    (stage / "done.json").unlink()
    assert door(tmp_path, f"runs_folder={own}", *walk.settings[1:], *small).returncode == 0
    shards, plan = {path: path.read_bytes() for path in sorted(checkpoint.glob("model-*.safetensors"))}, (stage / "plan.json").read_text()
    first, *_, last = shards
    tensors = load_file(first)
    save_file({name: tensor + 1e-4 for name, tensor in tensors.items()}, first, metadata={"format": "pt"})  # tells that it is kept
    kept = first.read_bytes()
    last.unlink()
    (stage / "done.json").unlink()
    finished = door(tmp_path, f"runs_folder={own}", *walk.settings[1:], *small)
    assert finished.returncode == 0, finished.stderr
    assert len(shards) > 3 and first.read_bytes() == kept and last.exists()
    assert all(path.read_bytes() == shards[path] for path in list(shards)[1:-1])
    assert not (stage / BASIS_FILE).exists()
    assert (stage / "plan.json").read_text() == plan


def test_neurons_chosen_before_an_interruption_stay_in_the_plan(tmp_path, teacher, tiny, config_of, keep_all, token_ids, write_checkpoint):
    folder, ids = write_checkpoint(tmp_path / "base", teacher, config_of(tiny)), token_ids(rows=4, tokens=60, seed=3)
    by_scores = replace(keep_all(**{FFN: {layer: tuple(range(24)) for layer, kind in enumerate(tiny.pattern) if kind == "-"}}), student=replace(tiny, ffn=24))
    base, out, path = StreamedModel(FAMILY, folder, read_config(folder), tiny, torch.device("cpu")), tmp_path / "out", tmp_path / PLAN_FILE
    out.mkdir()

    def cut(plan: PruningPlan) -> PruningPlan:
        weights = MadeWeights(base, plan, [ids], Basis(torch.eye(32)), Recipe(), out, on_plan=lambda plan: write_json(path, plan.to_json()))
        weights.write(planned_tensors(FAMILY, plan, Checkpoint(folder)), max_shard_bytes=20_000)
        return weights.cut.plan

    whole = cut(by_scores)
    shards = {path: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}
    last = list(shards)[-1]
    assert len(shards) > 3 and found_before(by_scores, path) == whole and whole.units[FFN] != by_scores.units[FFN]
    for plan, same in ((found_before(by_scores, path), True), (by_scores, False)):  # the control: as if nothing were known
        last.unlink()
        assert (cut(plan).units == whole.units) is same
        assert all(path.read_bytes() == written for path, written in shards.items())


def test_weights_that_are_not_what_was_made_are_found(tmp_path, teacher, tiny, config_of, keep_all, token_ids, write_checkpoint):
    folder, plan, ids = write_checkpoint(tmp_path / "base", teacher, config_of(tiny)), keep_all(), token_ids(rows=4, tokens=60, seed=3)
    base = StreamedModel(FAMILY, folder, read_config(folder), tiny, torch.device("cpu"))

    def made(name: str) -> MadeWeights:
        (tmp_path / name).mkdir()
        weights = MadeWeights(base, plan, [ids], Basis(torch.eye(32)), Recipe(), tmp_path / name)
        weights.write(planned_tensors(FAMILY, plan, Checkpoint(folder)), max_shard_bytes=2**30)
        write_json(tmp_path / name / "config.json", config_of(tiny))
        return weights

    assert "every tensor equal" in made("whole").check(config_of(tiny))
    broken, path = made("broken"), tmp_path / "broken" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    save_file({**tensors, name: tensors[name] + 1e-3}, path)
    with pytest.raises(RuntimeError, match=f"{name}, read back, is not what was made"):
        broken.check(config_of(tiny))
    broken.checksums.clear()  # as after an interruption: what the layers do tells
    with pytest.raises(RuntimeError, match="residuals that differ"):
        broken.check(config_of(tiny))


def test_only_a_compensated_cut_has_its_settings_in_the_key():
    def key(**values) -> dict:
        return stages()["prune"].what(Settings(prune=PruneSettings(**values)))

    assert key(ridge=0.1) == key(rotate=False) == {}
    compensated = {"method": PruneMethod.compensated}
    assert key(**compensated) != key(**compensated, ridge=0.1) != key(**compensated, rotate=False)
    assert key(**compensated) == key(**compensated, batch=3, max_shard_gib=1)


def test_a_screen_starts_from_the_cut_that_the_prune_stage_makes(walk, runs, stage, door):
    """Seen at a learning rate of 0; where the cut is a plain one, a screen starts from that."""
    inputs, losses = (json.loads((stage / "done.json").read_text())[part] for part in ("inputs", "facts"))
    choices = [json.loads(done.read_text())["facts"]["chosen"] for done in runs.glob("store/search/*/done.json")]
    chosen = next(one["id"] for one in choices if all(one[name] == inputs[name] for name in ("architecture", "kept_layers")))
    screened = {}
    for method in ("compensated", "slice"):
        still = ("screen.train.learning_rate=0", "screen.cut_samples=null", f"prune.method={method}", "screen.new_tokens=3")
        before = set(runs.glob("store/screen/*/done.json"))
        finished = door(runs.parent, f"runs_folder={runs}", *walk.settings[1:], "stage=screen", f"candidate={chosen}", *still)
        assert finished.returncode == 0, finished.stderr
        (done,) = set(runs.glob("store/screen/*/done.json")) - before
        screened[method] = json.loads(done.read_text())["facts"]["short_distill_loss"]
    assert screened == pytest.approx({method: losses["held_out_losses"][method] for method in screened}, abs=1e-5)
    assert screened["slice"] - screened["compensated"] > 1e-2


def test_a_screen_knows_of_the_cut_where_it_is_compensated():
    def key(**values) -> dict:
        return stages()["screen"].what(Settings(prune=PruneSettings(**values)))

    compensated = {"method": PruneMethod.compensated}
    assert key() == key(ridge=0.1, samples=7, rotate=False) != key(**compensated) == key(**compensated, batch=3, max_shard_gib=1)
    others = ({"samples": 7}, {"rotate": False}, {"refit_reading": False}, {"refit_writing": False}, {"ridge": 0.1}, {"directions": Directions.variance},
              {"direction_samples": 3})  # fmt: skip
    assert all(key(**compensated, **other) != key(**compensated) for other in others)


def test_candidates_may_be_cut_on_fewer_rows_than_the_chosen_one():
    def key(stage: str, cut_samples: int | None, method: str = "compensated", **values) -> dict:
        return stages()[stage].what(Settings(prune=PruneSettings(method=PruneMethod[method], **values), screen=ScreenSettings(cut_samples=cut_samples)))

    assert key("screen", 7) == key("screen", 7, samples=99) == key("screen", None, samples=7) != key("screen", None)
    assert key("prune", 7) == key("prune", None) != key("prune", 7, samples=99)
    assert key("screen", 7, "slice") == key("screen", None, "slice")


def test_too_few_calibration_tokens_are_said_with_what_would_do(tiny):
    def note(ffn=tiny.ffn, recipe=None, rows=2):
        return CutCost(wide := replace(tiny, ffn=ffn), wide, recipe or Recipe(), rows, 10 * rows, 4).few_tokens_note()

    said = note(64, Recipe(ridge=0.01))
    assert said == "20 calibration tokens are fewer than the 64 inputs solved for: prune.ridge goes from 0.01 up to 0.032; prune.samples=7 would do"
    assert note(recipe=Recipe(refit_reading=False, refit_writing=False)) is None
    assert note(64, rows=7) is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prune.method=cut", "expected one of [slice, compensated]"),
        ("prune.ridge=-1", "prune.ridge is -1.0; it must be at least 0"),
        ("prune.samples=0", "prune.samples is 0; it must be at least 1"),
        ("prune.direction_samples=0", "prune.direction_samples is 0; it must be at least 1"),
        ("prune.directions=all", "expected one of [loss, variance]"),
        ("screen.cut_samples=0", "screen.cut_samples is 0; it must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(override, said, door, tmp_path):
    finished = door(tmp_path, override)
    assert finished.returncode == 2 and said in finished.stderr and len(finished.error_lines) == 1


def test_memory_that_cannot_hold_the_cut_is_refused_before_it_begins_with_what_would_do():
    teacher = architecture_from_config(read_config(CONF_FOLDER / "architectures" / "nemotron-nano-12b-v2-base.json"))
    student = replace(teacher, hidden=4480, ffn=15680)

    def check(recipe, available, rows=64):
        CutCost(teacher, student, recipe, rows, rows * 8192, 2).check_memory(available, "this machine")

    residuals_and_layers = 4 * 64 * 8192 * (5120 + 4480) + 2 * (2 * 2 * 20480 * 5120 + (22656 + 10240) * 4480)
    check(Recipe("variance", ridge=1e-3, choose_neurons=False), residuals_and_layers + 8 * (15680**2 + 15680 * 4480) + 10**7)
    check(Recipe("variance", choose_neurons=False), residuals_and_layers + 8 * (3 * 15680**2 + 3 * 15680 * 4480) + 10**7)  # the sums of each half, and a copy
    check(Recipe("variance", ridge=1e-3), residuals_and_layers + 8 * 2 * 20480**2 + 10**7)  # of all neurons, to choose from
    check(Recipe(ridge=1e-3, choose_neurons=False), residuals_and_layers + 3 * 8 * 10 * 5120**2 + 10**7)  # ten sums of two moments
    with pytest.raises(ValueError, match=r"64, 524,288 tokens: .* at least 26\.\d+ GiB, and this machine has 24.0+ GiB; prune.samples=\d+ would fit") as said:
        check(Recipe(), 24 * GIB)
    fitting = int(said.value.args[0].rpartition("samples=")[2].split()[0])
    check(Recipe(), 24 * GIB, fitting)
    with pytest.raises(ValueError, match="would fit"):
        check(Recipe(), 24 * GIB, fitting + 1)
    check(Recipe("variance", False, False), 24 * GIB, fitting + 1)  # no Gram matrix
    with pytest.raises(ValueError, match="prune.method must be slice"):
        check(Recipe(), 4 * GIB, 1)
