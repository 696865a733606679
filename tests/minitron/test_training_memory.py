"""The memory plan against what is really held."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.engines.launch import Launch
from distill.engines.opening import open_engine
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.units import GIB
from minitron.families.known import family_of
from minitron.mamba import dispatch
from minitron.settings.teachers import CONF_FOLDER
from minitron.settings.training import Optimizer, Precision, Router, TrainSettings
from minitron.training.memory import FLOAT32, PhaseMemory, activation_bytes_per_token, check_fits, check_host, loss_bytes, training_memory
from minitron.training.steps import train_plan

LENGTH = 64


def plan(tiny, launch=Launch(), **settings):  # noqa: B008
    train = TrainSettings(**{"batch": 4, **settings})
    return training_memory(tiny, tiny, train, launch, sequence_length=LENGTH, teacher_bytes_per_number=2, on_gpu=False)


def num_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


EXPERTS = {"pattern": "ME*E-", "moe_num_experts": 8, "moe_experts_per_token": 2, "moe_ffn": 12, "moe_shared_ffn": 20}


@pytest.mark.parametrize("optimizer", [Optimizer.adamw, Optimizer.muon])
@pytest.mark.parametrize(("sizes", "router"), [({}, Router.trained), (EXPERTS, Router.trained), (EXPERTS, Router.frozen)], ids=["dense", "experts", "frozen"])
def test_weights_gradients_and_optimiser_are_counted_to_the_byte(sizes, router, optimizer, tiny, build_model, token_ids):
    tiny, model = replace(tiny, **sizes), build_model(**sizes)
    engine = open_engine(Launch(), model, train_plan(TrainSettings(optimizer=optimizer, router=router)))
    model(token_ids(), use_cache=False).logits.mean().backward()
    gradients = num_bytes(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    engine.update(1e-3)
    moments = num_bytes(value for item in engine.optimizers for state in item.state.values() for key, value in state.items() if key != "step")
    planned = plan(tiny, optimizer=optimizer, router=router)
    assert (planned.weights, planned.gradients, planned.optimizer) == (num_bytes(model.parameters()), gradients, moments)
    assert planned.teacher * 2 == planned.weights


def test_8_bit_moments_of_large_tensors_are_planned_to_a_few_per_cent():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = torch.nn.Linear(512, 512, bias=False)
    optimizer = bitsandbytes.optim.AdamW8bit(layer.parameters())
    layer(torch.ones(512)).sum().backward()
    optimizer.step()
    held = num_bytes(value for key, value in optimizer.state[layer.weight].items() if key.startswith(("state", "absmax")))
    assert held / layer.weight.numel() == pytest.approx(2 * (1 + 4 / 256), rel=1e-3)


@pytest.fixture
def own_scan(monkeypatch):
    """Training's own scan and convolution on CPU, for one test: transformers' keep [L × L] tensors."""
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    for name, value in list(vars(modeling).items()):
        monkeypatch.setattr(modeling, name, value)
    dispatch.install()


@pytest.mark.parametrize("pattern", ["M-M*-M-*-", "MMMM", "----", "**"])
def test_activations_are_estimated_within_a_third(pattern, own_scan, tiny, build_model, token_ids):
    """Against every tensor that autograd keeps, each storage once, without the parameters."""
    held = kept_bytes(build_model(pattern=pattern, vocab=97), token_ids(4, LENGTH))
    assert 2 / 3 < held / (activation_bytes_per_token(replace(tiny, pattern=pattern), TrainSettings(), LENGTH) * 4 * LENGTH) < 3 / 2


@pytest.mark.parametrize("model_type", ["nemotron_h", "qwen3_moe"])
def test_activations_of_experts_are_estimated_as_well(model_type, own_scan, token_ids):
    """The control is the estimate of twice as many experts a token."""
    experts = {"num_experts_per_tok": 4, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64, "n_group": 1, "topk_group": 1}
    config = {"model_type": model_type, **SMALL_BLOCKS, **experts, "n_routed_experts": 16, "num_experts": 16, "layers_block_type": ["moe"] * 6}
    model, architecture = family_of(config).build(config), architecture_from_config(config)
    held = kept_bytes(model.train(), token_ids(4, LENGTH))
    estimates = [activation_bytes_per_token(replace(architecture, moe_experts_per_token=number), TrainSettings(), LENGTH) * 4 * LENGTH for number in (4, 8)]
    assert 2 / 3 < held / estimates[0] < 3 / 2 and held < 0.8 * estimates[1]


SMALL_BLOCKS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 97, "head_dim": 8,
                "num_hidden_layers": 6}  # fmt: skip


@pytest.mark.parametrize(("model_type", "window"), [("mistral", None), ("mistral", LENGTH), ("gemma3_text", LENGTH + 1), ("gemma3_text", 16)])
def test_activations_of_windows_and_of_second_norms_are_estimated_as_well(model_type, window, token_ids):
    """A row of four times LENGTH, where a layer within a window keeps its mask; the control is the estimate of the same blocks without either."""
    config, length = {"model_type": model_type, "sliding_window": window, **SMALL_BLOCKS}, 4 * LENGTH
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")
    architecture = architecture_from_config(config)
    plain = replace(architecture, pattern=architecture.mixers, post_norms=False)
    held = kept_bytes(model.train(), token_ids(4, length))
    estimate, without = (activation_bytes_per_token(one, TrainSettings(), length) * 4 * length for one in (architecture, plain))
    assert 2 / 3 < held / estimate < 3 / 2 and (plain == architecture or held > 3 / 2 * without)


def kept_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """What autograd keeps of a forward pass, but parameters."""
    held, own = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert model.base_model(ids, use_cache=False).last_hidden_state.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("tokens", [1024, 1500])
def test_the_loss_holds_what_is_planned_and_not_the_logits_of_all_tokens(tokens, tiny, snippet, tmp_path):
    """In a process of its own: the largest resident set above what it held with its inputs built. A chunk is 256 tokens.

    Read as VmHWM: ru_maxrss begins with what the process that started it held.
    """
    vocabulary, student, teacher = 32768, replace(tiny, vocab=32768, hidden=64), replace(tiny, vocab=32768, hidden=96)
    code = f"""
import re, torch
from pathlib import Path
from distill.chunked_loss import Head, chunked_loss
torch.set_num_threads(1)
student, teacher = (Head(torch.randn({tokens}, width), torch.randn({vocabulary}, width)) for width in (64, 96))
student.hidden_BTD.requires_grad_(), student.weight_VD.requires_grad_()
student.weight_VD.grad = torch.zeros({vocabulary}, 64)
labels, mask = torch.zeros({tokens}, dtype=torch.long), torch.ones({tokens}, dtype=torch.bool)
chunked_loss(Head(*(value[:8].detach() for value in (student.hidden_BTD, student.weight_VD))), Head(teacher.hidden_BTD[:8], teacher.weight_VD[:8]))
peak_kib = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak_kib()
chunked_loss(student, teacher, mask_BT=mask, labels_BT=labels, count_agreement=True).loss.backward()
print(1024 * (peak_kib() - before))
"""
    finished = snippet(tmp_path, code)
    assert finished.returncode == 0, finished.stderr
    held = int(finished.stdout)
    planned = loss_bytes(student, teacher, tokens)
    assert 2 / 3 < held / planned < 3 / 2
    assert planned < loss_bytes(student, teacher, 1024) * 1.01 < 5 * FLOAT32 * 1024 * vocabulary  # five is what whole logits took


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
    check_fits(memory, memory.total, "a GPU", "distill")
    with pytest.raises(ValueError, match=r"distill: each process will hold about 0\.00.* GiB: weights .*; a GPU has .* GiB. Lower distill.train.micro_batch"):
        check_fits(memory, memory.total - 1, "a GPU", "distill")


@pytest.fixture(scope="module")
def published(published_patterns):
    """The published teacher and student."""
    teacher = architecture_from_config(read_config(CONF_FOLDER / "architectures" / "nemotron-nano-12b-v2-base.json"))
    return teacher, replace(teacher, pattern=published_patterns[1], hidden=4480, ffn=15680)


def test_checkpointing_by_itself_takes_the_way_that_computes_least_again_and_fits(published):
    teacher, student = published
    need = PhaseMemory(student, teacher, Launch("fsdp2", 0, 8), 8192, 2, on_gpu=True)
    train = TrainSettings(batch=8, micro_batch=1, precision=Precision.bf16, gradient_checkpointing="auto")
    chosen = [need.with_checkpointing(train, int(gib * GIB)) for gib in (400, 100, 80, 45, 30)]
    plans = [need.of(one) for one in chosen]
    assert [(one.gradient_checkpointing, one.checkpoint_every) for one in (chosen[0], chosen[-1])] == [(False, 1), ("host", 1)]
    assert {one.gradient_checkpointing for one in chosen[2:-1]} == {True} and chosen[2].checkpoint_every > 1 and plans[2].total <= 0.9 * 80 * GIB
    assert [plan.total for plan in plans] == sorted((plan.total for plan in plans), reverse=True)
    assert need.with_checkpointing(replace(train, gradient_checkpointing=True), GIB).gradient_checkpointing is True  # what is given stays


@pytest.mark.parametrize("length", [262_144, 524_288])
def test_long_rows_keep_as_much_on_a_gpu_whatever_the_number_of_layers(length, published):
    teacher, student = published
    train = TrainSettings(batch=8, micro_batch=1, precision=Precision.bf16, gradient_checkpointing="host")
    deep, shallow = (PhaseMemory(replace(student, pattern=pattern), teacher, Launch("fsdp2", 0, 8), length, 2, on_gpu=True)
                     for pattern in (student.pattern, student.pattern[:15]))  # fmt: skip
    from_host, from_few, on_device = (need.of(settings) for need, settings in
                                      ((deep, train), (shallow, train), (deep, replace(train, gradient_checkpointing=True))))  # fmt: skip
    assert from_host.micro_step == from_few.micro_step and on_device.micro_step - from_host.micro_step > 50 * 4480 * 2 * length
    assert deep.host_bytes(train) == 56 * 4480 * 2 * length  # every layer's input, bf16


def test_more_than_the_host_holds_is_refused_with_what_would_fit(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    check_host(0, "distill")
    with pytest.raises(ValueError, match=r"distill: gradient_checkpointing=host keeps 1,?024.* GiB of each of 8 processes .* 0 processes on each machine"):
        check_host(1024 * GIB, "distill")


def test_the_published_student_needs_slices(published):
    """9B float32 with AdamW and a 12B teacher in bf16: 165 GiB in one process, about an eighth of it in eight."""
    teacher, student = published
    train = TrainSettings(batch=8, gradient_checkpointing=True)
    one, eight = (training_memory(student, teacher, train, launch, sequence_length=8192, teacher_bytes_per_number=2, on_gpu=True)
                  for launch in (Launch(), Launch("fsdp2", 0, 8)))  # fmt: skip
    held = one.weights + one.gradients + one.optimizer + one.teacher
    assert held == 16 * 8_888_227_328 + 2 * 12_310_001_152 and round(held / GIB, 1) == 155.4
    assert eight.weights + eight.gradients + eight.optimizer + eight.teacher == pytest.approx(held / 8, rel=1e-6)
