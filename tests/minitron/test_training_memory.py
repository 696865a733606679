"""The memory plan against what is really held."""

from dataclasses import replace

import pytest
import torch

from distill.engine import open_engine
from distill.launch import Launch
from memory_budget.units import GIB
from minitron.families import ssd
from minitron.settings import Optimizer, TrainSettings
from minitron.stages.training import train_plan
from minitron.training_memory import activation_bytes_per_token, check_fits, training_memory

LENGTH = 64


def plan(tiny, launch=Launch(), **settings):  # noqa: B008
    train = TrainSettings(**{"batch": 4, **settings})
    return training_memory(tiny, tiny, train, launch, sequence_length=LENGTH, teacher_bytes_per_number=2)


def num_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("optimizer", list(Optimizer))
def test_weights_gradients_and_optimiser_are_counted_to_the_byte(optimizer, tiny, build_model, token_ids):
    model = build_model()
    engine = open_engine(Launch(), model, train_plan(TrainSettings(optimizer=optimizer)))
    model(token_ids(), use_cache=False).logits.mean().backward()
    gradients = num_bytes(parameter.grad for parameter in model.parameters())
    engine.update(1e-3)
    moments = num_bytes(value for item in engine.optimizers for state in item.state.values() for key, value in state.items() if key != "step")
    planned = plan(tiny, optimizer=optimizer)
    assert (planned.weights, planned.gradients, planned.optimizer) == (num_bytes(model.parameters()), gradients, moments)
    assert planned.teacher * 2 == planned.weights


@pytest.fixture
def own_scan(monkeypatch):
    """Training's own scan and convolution on CPU, for one test: transformers' keep [L × L] tensors."""
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    for name, value in list(vars(modeling).items()):
        monkeypatch.setattr(modeling, name, value)
    ssd.install()


@pytest.mark.parametrize("pattern", ["M-M*-M-*-", "MMMM", "----", "**"])
def test_activations_are_estimated_within_a_third(pattern, own_scan, tiny, build_model, token_ids):
    """Against every tensor that autograd keeps, each storage once, without the parameters. 32 wide heads' worth of logits are left out."""
    model = build_model(pattern=pattern, vocab=97)
    held, own = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(token_ids(4, LENGTH), use_cache=False).logits
    estimate = activation_bytes_per_token(replace(tiny, pattern=pattern, vocab=0), TrainSettings()) * 4 * LENGTH
    assert output.requires_grad and 2 / 3 < sum(held.values()) / estimate < 3 / 2


def test_slices_divide_what_the_engine_slices(tiny):
    alone = plan(tiny)
    for engine, divided in (("ddp", ()), ("zero2", ("gradients", "optimizer")), ("fsdp2", ("weights", "gradients", "optimizer", "teacher"))):
        shared = plan(tiny, Launch(engine, 0, 2))
        assert all(getattr(shared, name) == getattr(alone, name) // (2 if name in divided else 1) for name in ("gradients", "optimizer", "teacher")), engine
        assert shared.activations == alone.activations // 2  # half of the rows
        assert (shared.gathered > 0) == (engine == "fsdp2")
    assert plan(tiny, Launch("zero3", 0, 4), micro_batch=1).activations == alone.activations // 4


def test_what_cannot_fit_is_refused_with_what_to_do(tiny):
    memory = plan(tiny)
    check_fits(memory, memory.total, "a GPU")
    with pytest.raises(ValueError, match=r"distill: each process will hold about 0\.00.* GiB: weights .*; a GPU has .* GiB. Lower distill.train.micro_batch"):
        check_fits(memory, memory.total - 1, "a GPU")


def test_the_published_student_needs_slices(tiny):
    """9B float32 with AdamW and a 12B teacher in bf16: 165 GiB in one process, about an eighth of it in eight."""
    from memory_budget.hf_config import architecture_from_config, read_config
    from minitron.teachers import CONF_FOLDER

    teacher = architecture_from_config(read_config(CONF_FOLDER / "architectures" / "nemotron-nano-12b-v2-base.json"))
    student = replace(teacher, pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", hidden=4480, ffn=15680)
    train = TrainSettings(batch=8, gradient_checkpointing=True)
    one, eight = (training_memory(student, teacher, train, launch, sequence_length=8192, teacher_bytes_per_number=2)
                  for launch in (Launch(), Launch("fsdp2", 0, 8)))  # fmt: skip
    held = one.weights + one.gradients + one.optimizer + one.teacher
    assert held == 16 * 8_888_227_328 + 2 * 12_310_001_152 and round(held / GIB, 1) == 155.4
    assert eight.weights + eight.gradients + eight.optimizer + eight.teacher == pytest.approx(held / 8, rel=1e-6)
