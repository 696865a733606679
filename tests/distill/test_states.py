"""Saved states: whole or absent, exact to go on from, and of this run alone."""

import json
import random
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from distill.batches import RowBatches
from distill.plan import Phase, TrainPlan
from distill.states import BEST, FACTS_FILE, STATES_FOLDER, TENSORS_FILE, best_state, drop_damaged, load_weights, newest_state, remove_states
from distill.trainer import HeldOut, distillation_loss, train_phases

LONG = {"tokens": 40 * 54, "optimizer": "muon"}


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(newest_state(folder).folder / TENSORS_FILE)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(worker, tmp_path_factory):
    """The end of the long run, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    last = worker.run(folder, LONG, seed=7)
    assert newest_state(folder).facts["record"]["step"] == last.step == last.total_steps - 1 > 40
    return weights_of(folder)


def test_killed_at_random_moments_it_ends_in_the_same_bits(whole, launch, tmp_path):
    moments, codes = random.Random(5), []
    while not codes or codes[-1] == -signal.SIGKILL:
        after = (moments.randint(1, 12), moments.uniform(0, 0.03)) if len(codes) < 3 else None
        codes += launch("ddp", tmp_path, processes=1, plan=LONG | {"save_every_steps": 1}, kill_after=after)[0]
    assert codes == [-signal.SIGKILL] * 3 + [0]
    assert same(weights_of(tmp_path), whole)
    assert [path.name for path in (tmp_path / STATES_FOLDER).iterdir()] == [newest_state(tmp_path).folder.name]


def test_a_run_of_another_seed_ends_elsewhere(whole, worker, tmp_path):
    """The control: equality of bits sees where a run began."""
    worker.run(tmp_path, LONG, seed=3)
    assert not same(weights_of(tmp_path), whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_leaves_the_state_before_and_says_so(processes, launch, tmp_path):
    plan = {"save_every_steps": 2}
    codes, printed = launch("ddp", tmp_path, processes=processes, plan=plan, full_at=4)
    assert codes == [2] * processes, printed
    assert "ValueError: the state cannot be saved as" in printed and "File too large" in printed and "step-000000004 is as it was" in printed
    assert [path.name for path in (tmp_path / STATES_FOLDER).iterdir()] == ["step-000000004"]
    assert launch("ddp", tmp_path, processes=processes, plan=plan)[0] == [0] * processes  # with room again it goes on from there
    assert json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[-1])["step"] == newest_state(tmp_path).facts["record"]["step"] > 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"learning_rate": 0.02}, "made with learning_rate 0.01, now it is 0.02"),
        ({"schedule": "wsd"}, "made with schedule cosine, now it is wsd"),
        ({"tokens": 9 * 54}, "made with tokens 432, now it is 486"),
    ],
)
def test_a_state_of_other_settings_is_refused_by_name(change, says, worker, tmp_path):
    worker.run(tmp_path, {})
    with pytest.raises(ValueError, match=says):
        worker.run(tmp_path, change)
    worker.run(tmp_path, {"micro_batch": 2, "save_every_steps": 3, "gradient_checkpointing": True})  # how it computes may change


def test_the_newest_states_are_kept(worker, tmp_path):
    worker.run(tmp_path, {"save_every_steps": 2, "keep_states": 3})
    assert sorted(path.name for path in (tmp_path / STATES_FOLDER).iterdir()) == ["step-000000008", "step-000000010", "step-000000011"]


def test_a_state_that_was_never_finished_is_not_seen(worker, tmp_path):
    worker.run(tmp_path, {})
    partial = tmp_path / STATES_FOLDER / "step-000000099.partial"
    partial.mkdir()
    assert newest_state(tmp_path).folder.name == "step-000000011"
    remove_states(tmp_path)
    assert newest_state(tmp_path) is None and not partial.exists()


def test_the_best_weights_by_the_held_out_loss_are_kept_beside_the_last(worker, tmp_path):
    """A learning rate that spoils the student late: the best is not the last, and its loss is the one told."""
    rows = RowBatches(worker.padded_rows(), 4, seed=1)
    plan = replace(TrainPlan(**worker.PLAN), learning_rate=2.0, warmup_share=1.0, tokens=12 * 38)
    loss, records = distillation_loss(worker.build_teacher()), []
    held_out = HeldOut(batches=[torch.from_numpy(worker.padded_rows()[:3]).long()], every_steps=3)
    train_phases(worker.build_model(2), [Phase(rows, plan)], loss, folder=tmp_path, on_step=records.append, held_out=held_out)
    measured = {record.step: record.watched["held_out_loss"] for record in records if "held_out_loss" in record.watched}
    assert list(measured) == [2, 5, 8, 11] and min(measured.values()) < 0.9 * measured[11]
    remove_states(tmp_path)
    best = worker.build_model(7)
    assert newest_state(tmp_path) is None and [path.name for path in (tmp_path / STATES_FOLDER).iterdir()] == [BEST]
    load_weights(best_state(tmp_path), best)
    assert loss(best, held_out.batches[0])["loss"].item() == pytest.approx(min(measured.values()), rel=1e-5)


def flipped(path):
    path.write_bytes(bytes([*path.read_bytes()[:-1], path.read_bytes()[-1] ^ 1]))


def changed(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


DAMAGES = {  # of a state's folder, and what is said of it
    "holds other bytes": lambda state: flipped(state / TENSORS_FILE),
    "is missing": lambda state: (state / TENSORS_FILE).unlink(),
    "cannot be read as what was written": lambda state: (state / FACTS_FILE).write_text(""),
    f"{FACTS_FILE} is not what was written": lambda state: changed(state / FACTS_FILE, '"num_skipped": 0', '"num_skipped": 1'),
    f"{FACTS_FILE} cannot be read": lambda state: (state / FACTS_FILE).unlink(),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_a_state_that_is_not_what_was_written_is_not_gone_on_from(says, worker, tmp_path):
    plan = {"save_every_steps": 4, "keep_states": 3}
    worker.run(tmp_path, plan)
    last = {name: tensor.clone() for name, tensor in weights_of(tmp_path).items()}  # the file's own bytes are about to change
    names = ["step-000000004", "step-000000008", "step-000000011"]
    assert drop_damaged(tmp_path) == [] and [path.name for path in sorted((tmp_path / STATES_FOLDER).iterdir())] == names
    DAMAGES[says](tmp_path / STATES_FOLDER / names[-1])
    (said,) = drop_damaged(tmp_path)
    assert says in said and newest_state(tmp_path).folder.name == names[-2]
    worker.run(tmp_path, plan)
    assert same(weights_of(tmp_path), last)


def test_without_its_best_weights_a_run_begins_anew(worker, tmp_path):
    worker.run(tmp_path, {"save_every_steps": 4})
    (tmp_path / STATES_FOLDER / BEST).mkdir()
    assert len(drop_damaged(tmp_path)) == 1 and list((tmp_path / STATES_FOLDER).iterdir()) == []


def test_a_state_of_before_digests_is_gone_on_from(worker, tmp_path):
    worker.run(tmp_path, {})
    path = newest_state(tmp_path).folder / FACTS_FILE
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name not in ("tensors", "digest")}))
    assert drop_damaged(tmp_path) == [] and newest_state(tmp_path)
