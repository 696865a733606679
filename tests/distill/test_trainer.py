"""The training loop: resuming is exact, and what it refuses."""

import json
import signal
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import NemotronHConfig, NemotronHForCausalLM

from distill import trainer
from distill.batches import PADDING, RowBatches
from distill.chunked_loss import LossRecipe
from distill.losses import next_token_loss
from distill.optimizers import build_optimizers
from distill.plan import Phase, TrainPlan
from distill.states import FACTS_FILE, TENSORS_FILE, newest_state
from distill.trainer import distill, train, train_phases

PLAN = TrainPlan(tokens=8 * 64, optimizer="adamw", learning_rate=1e-2, final_learning_rate_share=0.1, warmup_share=0.2, weight_decay=0.1, clip_norm=1.0)


def build_model(seed: int, hidden: int = 16) -> NemotronHForCausalLM:
    torch.manual_seed(seed)
    config = NemotronHConfig(
        vocab_size=64, hidden_size=hidden, layers_block_type=["linear_attention", "mlp", "full_attention"], intermediate_size=24,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, mamba_num_heads=4, mamba_head_dim=4, n_groups=2, ssm_state_size=8, chunk_size=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    return NemotronHForCausalLM(config).float()


@pytest.fixture(scope="module")
def batches() -> RowBatches:
    return RowBatches(np.random.default_rng(0).integers(64, size=(12, 16), dtype=np.int32), 4, seed=1)


def loss_of(model, ids):
    return next_token_loss(model(ids, use_cache=False).logits, ids)


def run(model, batches, plan, folder, on_step=lambda record: None):
    """Weights and last record after a sitting to the end."""
    folder.mkdir(exist_ok=True)
    record = train(model, batches, plan, loss_of, folder=folder, on_step=on_step)
    return {name: value.clone() for name, value in model.state_dict().items()}, record


def interrupt_at(step: int):
    def on_step(record):
        if record.step == step:
            raise KeyboardInterrupt

    return on_step


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def uninterrupted(batches, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {name: run(build_model(0), batches, replace(PLAN, optimizer=name), folder / name)[0] for name in ("adamw", "muon")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_interrupted_and_resumed_ends_in_the_same_bits(batches, uninterrupted, tmp_path, optimizer):
    plan, steps = replace(PLAN, optimizer=optimizer), []
    with pytest.raises(KeyboardInterrupt):
        run(build_model(0), batches, plan, tmp_path, interrupt_at(3))
    weights, record = run(build_model(5), batches, plan, tmp_path, lambda record: steps.append(record.step))
    assert steps == [4, 5, 6, 7] and record.tokens == 8 * 64
    assert same(weights, uninterrupted[optimizer])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_saved_by_time_resumes_to_the_same_bits(batches, uninterrupted, tmp_path, optimizer):
    plan = replace(PLAN, optimizer=optimizer, save_every_seconds=0.0)

    def die(record):
        if record.step == 5:
            raise RuntimeError("as if killed")

    with pytest.raises(RuntimeError):
        run(build_model(0), batches, plan, tmp_path, die)
    assert newest_state(tmp_path).facts["record"]["step"] == 4
    steps = []
    weights, _ = run(build_model(5), batches, plan, tmp_path, lambda record: steps.append(record.step))
    assert steps == [5, 6, 7] and same(weights, uninterrupted[optimizer])


def test_8_bit_moments_are_saved_and_taken_up_again_to_the_bit(tmp_path):
    """A vocabulary wide enough that its tables' moments are in 8 bits."""
    pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64))
    model.get_input_embeddings, model.get_output_embeddings = (lambda: model[0]), (lambda: model[1])
    batches = RowBatches(np.random.default_rng(1).integers(64, size=(8, 12), dtype=np.int32), 2, seed=5)
    plan, start = replace(PLAN, tokens=8 * 24, optimizer="adamw_8bit"), deepcopy(model.state_dict())

    def loss(model, rows):
        return torch.nn.functional.cross_entropy(model(rows).flatten(0, 1), rows.flatten())

    def finish(folder, on_step=lambda record: None):
        model.load_state_dict(start)
        train(model, batches, plan, loss, folder=folder, on_step=on_step)
        return load_file(newest_state(folder).folder / TENSORS_FILE)

    whole = finish(tmp_path / "whole")
    assert whole["optimizer.0.weight.state1"].dtype == torch.uint8
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "parts", interrupt_at(3))
    assert same(whole, finish(tmp_path / "parts"))


def test_a_resumed_run_without_the_optimizers_state_ends_elsewhere(batches, uninterrupted, tmp_path):
    """The control: the comparison of bits sees a resume that is nearly right."""
    with pytest.raises(KeyboardInterrupt):
        run(build_model(0), batches, PLAN, tmp_path, interrupt_at(3))
    path = newest_state(tmp_path).folder / TENSORS_FILE
    tensors = load_file(path)
    assert len(tensors) == 4 * len(build_model(0).state_dict())  # the weight, two moments and the count of steps
    save_file({name: tensor for name, tensor in tensors.items() if name.startswith("model.")}, path)
    weights, _ = run(build_model(5), batches, PLAN, tmp_path)
    assert not same(weights, uninterrupted["adamw"])


def test_a_second_interrupt_while_the_first_ones_state_is_written_waits(batches, tmp_path, monkeypatch):
    save, saved = trainer.save_state, []

    def asked_twice(*args, **settings):
        signal.raise_signal(signal.SIGINT)
        save(*args, **settings)
        saved.append(args)

    monkeypatch.setattr(trainer, "save_state", asked_twice)
    with pytest.raises(KeyboardInterrupt):
        run(build_model(0), batches, PLAN, tmp_path, interrupt_at(3))
    assert len(saved) == 1 and newest_state(tmp_path).folder.name == "step-000000004"


def test_an_interrupt_in_the_middle_of_an_update_leaves_no_half_step(batches, uninterrupted, tmp_path):
    """SIGINT between AdamW's and Muon's half of a step: what is saved must be one step or the next, whole."""
    plan, calls = replace(PLAN, optimizer="muon"), []

    def send_interrupt(*_):
        calls.append(1)
        if len(calls) == 7:  # the first of two optimisers, in step 3
            signal.raise_signal(signal.SIGINT)

    hook = register_optimizer_step_post_hook(send_interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(build_model(0), batches, plan, tmp_path)
    finally:
        hook.remove()
    weights, _ = run(build_model(5), batches, plan, tmp_path)
    assert same(weights, uninterrupted["muon"])


def test_seconds_of_earlier_sittings_are_counted(batches, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(build_model(0), batches, PLAN, tmp_path, interrupt_at(3))
    state = newest_state(tmp_path)
    state.facts["record"]["seconds"] = 1000.0
    (state.folder / FACTS_FILE).write_text(json.dumps(state.facts))
    _, record = run(build_model(5), batches, PLAN, tmp_path)
    assert 1000 < record.seconds < 1100


def test_a_loss_that_is_not_finite_raises_and_leaves_the_saved_state(batches, tmp_path):
    def poisoned(model, ids):
        return loss_of(model, ids) * (float("nan") if len(steps) == 4 else 1.0)

    steps = []
    with pytest.raises(FloatingPointError, match="loss is nan at step 4"):
        train(build_model(0), batches, replace(PLAN, save_every_seconds=0.0), poisoned, folder=tmp_path, on_step=lambda record: steps.append(record.step))
    state = newest_state(tmp_path)
    assert state.facts["record"]["step"] == 3 and all(torch.isfinite(value).all() for value in load_file(state.folder / TENSORS_FILE).values())


def test_fewer_tokens_than_a_batch_are_refused(batches, tmp_path):
    with pytest.raises(ValueError, match="train.tokens is 63; it must be at least one batch, 64 tokens"):
        run(build_model(0), batches, replace(PLAN, tokens=63), tmp_path)
    assert run(build_model(0), batches, replace(PLAN, tokens=64), tmp_path / "one")[1].total_steps == 1


def test_distillation_brings_the_student_to_the_teacher(batches, tmp_path):
    teacher, student, losses = build_model(1, hidden=32), build_model(2), []
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    plan = replace(PLAN, tokens=60 * 64, optimizer="muon", weight_decay=0.0)
    distill(teacher, student, batches, plan, folder=tmp_path, on_step=lambda record: losses.append(record.loss))
    assert losses[-1] < 0.5 * losses[0]
    assert same(before, teacher.state_dict()) and all(parameter.grad is None for parameter in teacher.parameters())


def test_distilling_a_model_to_itself_starts_at_zero(batches, tmp_path):
    records = []
    distill(build_model(1), build_model(1), batches, replace(PLAN, tokens=64), recipe=LossRecipe(temperature=2.0), folder=tmp_path, on_step=records.append)
    assert [record.loss for record in records] == [0.0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(optimizer):
    model = build_model(0)
    groups = [group for item in build_optimizers(model, replace(PLAN, optimizer=optimizer)) for group in item.param_groups]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    for group in groups:
        assert all((parameter.ndim >= 2) == (group["weight_decay"] > 0) for parameter in group["params"])


def test_muon_gets_the_layers_matrices_and_never_the_vocabulary():
    model = build_model(0)
    muon = build_optimizers(model, replace(PLAN, optimizer="muon"))[1]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muons = {names[id(parameter)] for group in muon.param_groups for parameter in group["params"]}
    assert muons and all(".layers." in name and name.endswith("proj.weight") for name in muons)


def test_an_interrupt_in_the_middle_of_an_update_is_heard_after_the_step_was_told(batches, tmp_path):
    """Else the step is in the saved weights but in nobody's records."""
    steps = []
    hook = register_optimizer_step_post_hook(lambda *_: signal.raise_signal(signal.SIGINT) if len(steps) == 3 else None)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(build_model(0), batches, PLAN, tmp_path, lambda record: steps.append(record.step))
    finally:
        hook.remove()
    assert steps == [0, 1, 2, 3] and newest_state(tmp_path).facts["record"]["step"] == 3


def padded_batches(width: int, padding: int = PADDING) -> RowBatches:
    """The same 8 rows of 2 to 16 tokens, padded to a width."""
    random = np.random.default_rng(3)
    rows = np.full((8, width), padding, dtype=np.int32)
    for row, length in zip(rows, (16, 2, 9, 5, 16, 12, 3, 7), strict=True):
        row[:length] = random.integers(64, size=length)
    return RowBatches(rows, 4, seed=1)


def test_how_far_rows_are_padded_changes_no_step_of_a_distillation(tmp_path):
    def first_step(batches: RowBatches) -> tuple[float, float]:
        steps, plan = [], replace(PLAN, tokens=batches.tokens_per_step)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        distill(build_model(1, hidden=32), build_model(2), batches, plan, folder=folder, on_step=steps.append)
        return steps[0].loss, steps[0].gradient_norm

    narrow, wide, counted = first_step(padded_batches(16)), first_step(padded_batches(29)), first_step(padded_batches(29, padding=0))
    assert wide == pytest.approx(narrow, rel=1e-5)
    assert counted != pytest.approx(narrow, rel=1e-2)  # the control: ids in place of padding are tokens like any other


def records_of(batches, plan, folder) -> list:
    records = []
    run(build_model(0), batches, plan, folder, records.append)
    return records


@pytest.fixture(scope="module")
def plain(batches, tmp_path_factory) -> list:
    return records_of(batches, PLAN, tmp_path_factory.mktemp("plain"))


def test_micro_batches_change_a_step_by_rounding_alone(batches, plain, tmp_path):
    records = records_of(batches, replace(PLAN, micro_batch=1), tmp_path)
    assert [record.loss for record in records] == pytest.approx([record.loss for record in plain], rel=1e-5)
    assert [record.gradient_norm for record in records] == pytest.approx([record.gradient_norm for record in plain], rel=1e-4)


@pytest.mark.parametrize(("settings", "again"), [({"gradient_checkpointing": True}, [True, True, True]), ({"gradient_checkpointing": "host"}, [True] * 3),
                                                 ({"gradient_checkpointing": True, "checkpoint_every": 2}, [True, False, True])], ids=str)  # fmt: skip
def test_computing_activations_again_changes_no_bit(settings, again, batches, uninterrupted, tmp_path):
    model = build_model(0)
    weights, _ = run(model, batches, replace(PLAN, **settings), tmp_path)
    assert [layer.gradient_checkpointing for layer in model.model.layers][:3] == again and same(weights, uninterrupted["adamw"])


def test_bf16_computes_otherwise_and_keeps_float32_weights(batches, plain, tmp_path):
    model, records = build_model(0), []
    run(model, batches, replace(PLAN, precision="bf16"), tmp_path, records.append)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    losses = [record.loss for record in records]
    assert losses == pytest.approx([record.loss for record in plain], rel=1e-2) and losses != pytest.approx([record.loss for record in plain], rel=1e-6)


def poisoned_at(*steps: int):
    """A loss that is nan when it is asked for the so many-th time."""
    calls = []

    def loss(model, ids):
        calls.append(1)
        return loss_of(model, ids) * (float("nan") if len(calls) - 1 in steps else 1.0)

    return loss


def test_a_stop_names_the_rows_and_the_last_good_state(batches, tmp_path):
    plan = replace(PLAN, save_every_steps=2)
    with pytest.raises(FloatingPointError) as stopped:
        train(build_model(0), batches, plan, poisoned_at(5), folder=tmp_path, on_step=lambda record: None)
    assert f"step 5, rows {batches.indices(5).tolist()} of phase 0" in str(stopped.value) and "step-000000004" in str(stopped.value)


def test_a_step_that_is_not_finite_is_passed_over_where_that_is_allowed(batches, plain, tmp_path):
    records, plan = [], replace(PLAN, skip_not_finite=1)
    train(build_model(0), batches, plan, poisoned_at(3), folder=tmp_path / "one", on_step=records.append)
    assert [record.step for record in records] == [0, 1, 2, 4, 5, 6, 7] and records[2].loss == plain[2].loss
    assert all(torch.isfinite(value).all() for value in load_file(newest_state(tmp_path / "one").folder / TENSORS_FILE).values())
    with pytest.raises(FloatingPointError, match="step 4"):
        train(build_model(0), batches, plan, poisoned_at(3, 4), folder=tmp_path / "two", on_step=lambda record: None)


def test_a_gradient_that_is_not_finite_stops_before_it_moves_a_weight(batches, tmp_path):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float("inf")

    model = build_model(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="gradient is not finite at step 0"):
        train(model, batches, PLAN, lambda model, ids: Poison.apply(loss_of(model, ids)), folder=tmp_path, on_step=lambda record: None)
    assert same(before, model.state_dict())


def test_phases_follow_each_other_each_with_its_rows_rate_and_a_fresh_optimiser(tmp_path):
    """The second phase equals a run of its own that begins with the first one's weights."""
    short = RowBatches(np.random.default_rng(1).integers(64, size=(8, 12), dtype=np.int32), 2, seed=5)
    long = RowBatches(np.random.default_rng(2).integers(64, size=(8, 24), dtype=np.int32), 4, seed=6)
    first, second = replace(PLAN, tokens=3 * 24), replace(PLAN, tokens=4 * 96, learning_rate=3e-3, schedule="wsd")
    both, alone, model = [], [], build_model(0)
    train_phases(model, [Phase(short, first), Phase(long, second)], loss_of, folder=tmp_path / "both", on_step=both.append)
    other, _ = run(build_model(0), short, first, tmp_path / "first")
    after = build_model(9)
    after.load_state_dict(other)
    train(after, long, second, loss_of, folder=tmp_path / "second", on_step=alone.append)
    assert [record.phase for record in both] == [0, 0, 0, 1, 1, 1, 1] and both[-1].tokens == 3 * 24 + 4 * 96
    assert [(record.loss, record.gradient_norm, record.learning_rate) for record in both[3:]] == [
        (record.loss, record.gradient_norm, record.learning_rate) for record in alone
    ]
    assert same(model.state_dict(), after.state_dict())


@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_stopped_at_the_end_of_a_phase_or_within_one_ends_in_the_same_bits(stop, batches, tmp_path):
    phases = [Phase(batches, replace(PLAN, tokens=3 * 64)), Phase(batches, replace(PLAN, tokens=4 * 64, learning_rate=3e-3))]
    whole, stopped = build_model(0), build_model(0)
    train_phases(whole, phases, loss_of, folder=tmp_path / "whole", on_step=lambda record: None)
    with pytest.raises(KeyboardInterrupt):
        train_phases(stopped, phases, loss_of, folder=tmp_path / "stopped", on_step=interrupt_at(stop))
    again = build_model(5)
    train_phases(again, phases, loss_of, folder=tmp_path / "stopped", on_step=lambda record: None)
    assert same(whole.state_dict(), again.state_dict())
