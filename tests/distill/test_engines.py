"""Several processes train as one: the same losses, whichever engine, and states that every engine goes on from."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from distill.batches import count_counted, micro_batches
from distill.engines.launch import Launch, read_launch
from distill.engines.sharing import check_sharing
from distill.optimizers import multiplies_bf16
from distill.states import TENSORS_FILE, newest_state

ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.fixture(scope="module")
def alone(worker, tmp_path_factory):
    """(folder, records) of the uninterrupted run in one process, all states kept."""
    folder, records = tmp_path_factory.mktemp("alone"), []
    worker.run(folder, {"save_every_steps": 1, "keep_states": 99}, on_step=records.append)
    return folder, records


def launched_steps(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def from_step(alone: Path, folder: Path, steps: int) -> Path:
    """A run's folder with the state after so many steps of the run alone."""
    name = f"states/step-{steps:09d}"
    shutil.copytree(alone / name, folder / name)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(newest_state(folder).folder / TENSORS_FILE)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_loss_that_is_not_finite_in_one_process_stops_or_is_passed_over_in_all(engine, launch, tmp_path):
    stopped, passed = (tmp_path / name for name in ("stopped", "passed"))
    stopped.mkdir(), passed.mkdir()
    codes, printed = launch(engine, stopped, plan={"save_every_steps": 2}, poison_at=3)
    assert codes == [1, 1] and printed.count("FloatingPointError: loss is nan at step 3, rows [") == 2 and "step-000000002" in printed
    codes, printed = launch(engine, passed, plan={"skip_not_finite": 1}, poison_at=3)
    assert codes == [0, 0], printed
    steps = [step["step"] for step in launched_steps(passed)]
    assert steps == [step for step in range(steps[-1] + 1) if step != 3] and steps[-1] > 6
    assert all(torch.isfinite(value).all() for value in weights_of(passed).values())


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_go_on_from_one_and_one_from_two_along_the_same_curve(engine, alone, worker, launch, tmp_path):
    """Steps 0 and 1 alone, 2 to 4 in two processes with accumulation, the rest alone again."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    folder, expected = from_step(alone[0], tmp_path, 2), alone[1]
    codes, printed = launch(engine, folder, plan={"micro_batch": 1}, stop_at=3)
    assert codes == [130, 130], printed  # the first was told to stop, and both did after the same step
    steps = launched_steps(folder)
    assert [step["step"] for step in steps] == [2, 3, 4]
    rest = []
    worker.run(folder, {}, seed=9, on_step=rest.append)
    losses = [step["loss"] for step in steps] + [record.loss for record in rest]
    norms = [step["norm"] for step in steps] + [record.gradient_norm for record in rest]
    assert losses == pytest.approx([record.loss for record in expected[2:]], rel=1e-5)
    assert norms == pytest.approx([record.gradient_norm for record in expected[2:]], rel=1e-5)
    last, reference = weights_of(folder), weights_of(alone[0])
    assert last.keys() == reference.keys()
    assert all(torch.allclose(last[name], reference[name], rtol=1e-4, atol=1e-5) for name in reference)


@pytest.fixture(scope="module")
def tied_alone(worker, tmp_path_factory):
    """(folder, losses) of a tied Llama's run in one process."""
    folder, records = tmp_path_factory.mktemp("tied"), []
    worker.run(folder, {"save_every_steps": 1}, model="tied", on_step=records.append)
    return folder, [record.loss for record in records]


def test_a_head_of_its_own_leaves_the_curve_of_tied_embeddings(tied_alone, worker, tmp_path):
    """The control: from the same numbers."""
    records = []
    worker.run(tmp_path, {}, model="untied", on_step=records.append)
    losses = [record.loss for record in records]
    assert losses[0] == pytest.approx(tied_alone[1][0], rel=1e-6) and losses[2:] != pytest.approx(tied_alone[1][2:], rel=1e-3)


def test_rotary_frequencies_stay_exact_where_deepspeed_casts_buffers(worker):
    from distill.engines.zero import _float_buffers_kept

    model = worker.build_llama(2, tied=True)
    exact = model.model.rotary_emb.inv_freq.clone()
    with _float_buffers_kept(model):
        model.bfloat16()
        assert not torch.equal(model.model.rotary_emb.inv_freq.float(), exact)
    assert torch.equal(model.model.rotary_emb.inv_freq, exact) and model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_tied_embeddings_walk_the_curve_of_one_process(engine, tied_alone, worker, launch, tmp_path):
    """One matrix gets the gradients of both its uses, and is stored once."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    codes, printed = launch(engine, tmp_path, plan={"save_every_steps": 1}, model="tied", seed=2)
    assert codes == [0, 0], printed
    assert [step["loss"] for step in launched_steps(tmp_path)] == pytest.approx(tied_alone[1], rel=1e-5)
    ours, reference = weights_of(tmp_path), weights_of(tied_alone[0])
    assert ours.keys() == reference.keys() and not any("lm_head" in name for name in ours)
    assert all(torch.allclose(ours[name], reference[name], rtol=1e-4, atol=1e-5) for name in reference)


@pytest.mark.parametrize("engine", ENGINES)
def test_in_bf16_two_processes_follow_the_curve_as_far_as_it_tells(engine, alone, worker, launch, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    codes, printed = launch(engine, tmp_path, plan={"precision": "bf16"}, seed=2)
    assert codes == [0, 0], printed
    losses, expected = [step["loss"] for step in launched_steps(tmp_path)], [record.loss for record in alone[1]]
    assert losses == pytest.approx(expected, rel=5e-2) and losses != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_muon_walks_the_curve_of_one_process(engine, alone, worker, launch, tmp_path):
    """Each matrix is made orthogonal as a whole, though a process of fsdp2 holds rows of it. AdamW's curve is another."""
    one, two, records = tmp_path / "one", tmp_path / "two", []
    one.mkdir(), two.mkdir()
    worker.run(one, {"optimizer": "muon"}, on_step=records.append)
    codes, printed = launch(engine, two, plan={"optimizer": "muon"}, seed=2)
    assert codes == [0, 0], printed
    losses, tolerance = [step["loss"] for step in launched_steps(two)], 1e-2 if multiplies_bf16(torch.device("cpu")) else 1e-5
    assert losses == pytest.approx([record.loss for record in records], rel=tolerance)
    assert losses != pytest.approx([record.loss for record in alone[1]], rel=tolerance)


def test_a_mean_per_process_would_leave_the_curve(alone, worker, tmp_path):
    """The control: the curve's comparison sees a loss that is normalised by a process's own tokens."""
    from distill import trainer

    batch = torch.from_numpy(worker.padded_rows()[:4]).long()
    halves = [count_counted(rows) for rows in micro_batches(batch, 2, 0, 1)]
    assert abs(halves[0] - halves[1]) / sum(halves) > 0.01
    records = []
    phases = [trainer.Phase(trainer.RowBatches(worker.padded_rows(), 4, seed=1), trainer.TrainPlan(**worker.PLAN, micro_batch=2))]
    loss = trainer.distillation_loss(worker.build_teacher())
    trainer.train_phases(worker.build_model(2), phases, loss, folder=tmp_path, on_step=records.append, counted_of=len)
    assert [record.loss for record in records] != pytest.approx([record.loss for record in alone[1]], rel=1e-5)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_on_answers_alone_two_processes_walk_the_curve_of_one(engine, alone, worker, launch, tmp_path):
    """Micro-batches of one row with all, few or none of their positions counted; in some steps a process has none. The control is the curve of all tokens."""
    shares = [[count_counted(rows) for rows in micro_batches(worker.RowBatches(worker.marked_rows(), 2, seed=1).at(step), 1, 0, 1)] for step in range(12)]
    assert any(0 in share and max(share) > 0 for share in shares)
    one, two, records = tmp_path / "one", tmp_path / "two", []
    one.mkdir(), two.mkdir()
    worker.run(one, {"batch": 2}, marked=True, on_step=records.append)
    codes, printed = launch(engine, two, plan={"batch": 2, "micro_batch": 1}, marked=True, seed=2)
    assert codes == [0, 0], printed
    steps = launched_steps(two)
    assert [step["loss"] for step in steps] == pytest.approx([record.loss for record in records], rel=1e-5)
    assert [step["norm"] for step in steps] == pytest.approx([record.gradient_norm for record in records], rel=1e-5)
    unmarked = []
    worker.run(tmp_path / "unmarked", {"batch": 2}, on_step=unmarked.append)
    assert [step["loss"] for step in steps[:4]] != pytest.approx([record.loss for record in unmarked[:4]], rel=1e-2)


def test_two_processes_killed_and_launched_again_end_in_the_same_bits(launch, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert launch("ddp", whole)[0] == [0, 0]
    codes, _ = launch("ddp", killed, plan={"save_every_steps": 2}, kill_at=5)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
    assert newest_state(killed).folder.name == "step-000000004"
    assert launch("ddp", killed)[0] == [0, 0]
    first, second = weights_of(whole), weights_of(killed)
    assert all(torch.equal(first[name], second[name]) for name in first) and len(first) > 40


@pytest.mark.parametrize("name", [f"{engine}{device}" for engine in ENGINES for device in ("", "_cpu")])
def test_accelerate_tells_its_processes_of_the_engine_that_the_config_names(name, repository):
    arguments = launch_command_parser().parse_args(["--config_file", str(repository / "conf" / "accelerate" / f"{name}.yaml"), "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""  # set by its launch_command, of no interest here
    told = prepare_deepspeed_cmd_env(arguments)[1] if name.startswith("zero") else prepare_multi_gpu_env(arguments)
    assert arguments.multi_gpu or arguments.use_fsdp or arguments.use_deepspeed  # else it starts one process
    assert read_launch(told | {"RANK": "1", "WORLD_SIZE": "2"}) == Launch(name.removesuffix("_cpu"), 1, 2)


FSDP = {"ACCELERATE_MIXED_PRECISION": "no", "RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_MIXED_PRECISION": "no", "RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def test_a_launch_is_what_the_environment_says():
    assert read_launch({}) == Launch("single", 0, 1)
    assert read_launch({"RANK": "3", "WORLD_SIZE": "4"}) == Launch("ddp", 3, 4)
    assert read_launch({"RANK": "0", "WORLD_SIZE": "1"}) == Launch("single", 0, 1)
    assert read_launch(FSDP) == Launch("fsdp2", 1, 2) and read_launch(ZERO) == Launch("zero3", 0, 2)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "asked for several processes and started one"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "asked for several processes and started one"),
        (FSDP | {"FSDP_VERSION": "1"}, "fsdp_version is 1; it must be 2"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is true; it must be false"),
        (FSDP | {"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision is 'bf16'; it must be 'no'"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage 1; it must be 2 or 3"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device is cpu; it must be none"),
    ],
)
def test_a_launch_that_would_train_something_else_is_refused(environment, says):
    with pytest.raises(ValueError, match=says):
        read_launch(environment)


@pytest.mark.parametrize(("batch", "micro_batch", "processes", "nearest"), [(6, None, 4, 8), (6, 4, 1, 8), (20, 3, 2, 18), (1, None, 8, 8)])
def test_a_batch_that_cannot_be_shared_evenly_is_refused_with_the_nearest(batch, micro_batch, processes, nearest):
    with pytest.raises(ValueError, match=f"train.batch is {batch}; .* nearest: {nearest}"):
        check_sharing(batch, micro_batch, processes)
    check_sharing(nearest, micro_batch, processes)


def test_single_rows_need_not_fall_evenly_unless_they_come_from_a_cache():
    check_sharing(12, 1, 8)
    with pytest.raises(ValueError, match="train.batch is 12; .* nearest: 16"):
        check_sharing(12, 1, 8, cached=True)


def test_three_rows_in_two_processes_walk_the_curve_of_one(worker, launch, tmp_path):
    """The control is the curve of the first two rows of each batch alone, which a process too few would walk."""
    one, two, records, fewer = tmp_path / "one", tmp_path / "two", [], []
    one.mkdir(), two.mkdir()
    worker.run(one, {"batch": 3}, on_step=records.append)
    codes, printed = launch("fsdp2", two, plan={"batch": 3, "micro_batch": 1}, seed=2)
    assert codes == [0, 0], printed
    losses = [step["loss"] for step in launched_steps(two)]
    assert losses == pytest.approx([record.loss for record in records], rel=1e-5)
    worker.run(tmp_path / "fewer", {"batch": 2}, on_step=fewer.append)
    assert losses[: len(fewer)] != pytest.approx([record.loss for record in fewer][: len(losses)], rel=1e-3)


MOE = {"frozen": ".gate.weight", "balance_rate": 0.05}
ROUTER = "model.model.layers.1.mixer.gate"


@pytest.fixture(scope="module")
def moe_alone(worker, tmp_path_factory):
    """(folder, records) of a mixture of experts in one process, its router frozen, its load balanced."""
    folder, records = tmp_path_factory.mktemp("moe"), []
    worker.run(folder, {"save_every_steps": 1, "keep_states": 99, **MOE}, model="moe", on_step=records.append)
    return folder, records


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_experts_walk_the_curve_of_one_process(engine, moe_alone, worker, launch, tmp_path):
    """Though the tokens of a process go to others of them than those of the other, and to one none at all. The rest alone from their state."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    folder, expected, rest = from_step(moe_alone[0], tmp_path, 2), moe_alone[1], []
    codes, printed = launch(engine, folder, plan={"micro_batch": 1, **MOE}, stop_at=3, model="moe")
    assert codes == [130, 130], printed
    steps = launched_steps(folder)
    worker.run(folder, MOE, seed=9, model="moe", on_step=rest.append)
    losses, norms = (steps_of + [getattr(record, name) for record in rest] for steps_of, name in
                     (([step["loss"] for step in steps], "loss"), ([step["norm"] for step in steps], "gradient_norm")))  # fmt: skip
    assert losses == pytest.approx([record.loss for record in expected[2:]], rel=1e-5)
    assert norms == pytest.approx([record.gradient_norm for record in expected[2:]], rel=1e-5)
    last, reference = weights_of(folder), weights_of(moe_alone[0])
    assert last.keys() == reference.keys()
    assert all(torch.allclose(last[name], reference[name], rtol=1e-4, atol=1e-5) for name in reference)


def test_a_mixture_goes_on_to_the_bit_and_a_frozen_router_stays(moe_alone, worker, tmp_path):
    """The biases move; the router does not, nor has the optimiser a state of it."""
    folder = from_step(moe_alone[0], tmp_path, 4)
    worker.run(folder, MOE, seed=9, model="moe")
    last, whole, start = weights_of(folder), weights_of(moe_alone[0]), worker.build_moe(2).state_dict()
    assert all(torch.equal(last[name], whole[name]) for name in whole)
    name = ROUTER.removeprefix("model.")
    assert torch.equal(whole[f"{ROUTER}.weight"], start[f"{name}.weight"]) and not any(name in key for key in whole if key.startswith("optimizer."))
    moved = whole[f"{ROUTER}.e_score_correction_bias"] - start[f"{name}.e_score_correction_bias"]
    assert moved.abs().min() > 0 and moved[3] == moved.max()  # the one that no token goes to
