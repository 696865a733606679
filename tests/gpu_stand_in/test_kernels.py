"""mamba-ssm's own kernels, interpreted on the CPU, against the project's scan and mixer: the same numbers, plain and packed, forward and backward."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

# Never beside other tests: the interpreter takes the kernels' place in the whole process.
CHOSEN = os.environ.get("GPU_STAND_IN") == "1"
pytestmark = [pytest.mark.gpu_stand_in, pytest.mark.skipif(not CHOSEN, reason="needs a process and an environment of its own: make gpu-stand-in")]

if CHOSEN:
    sys.path.insert(0, str(Path(__file__).parent))
    import kernels_in_interpreter

    kernels_in_interpreter.install()

import torch  # noqa: E402

from distill.batches import mark_start  # noqa: E402
from distill.chunked_loss import chunked_cross_entropy  # noqa: E402
from distill.losses import next_token_labels  # noqa: E402
from distill.objectives import head_of  # noqa: E402
from memory_budget.architecture import Architecture  # noqa: E402
from minitron.families.nemotron_h import FAMILY  # noqa: E402
from minitron.mamba import block_sizes, dispatch, ssd  # noqa: E402
from minitron.mamba.kernel_memory import ScanMemory  # noqa: E402
from minitron.mamba.packed import by_document  # noqa: E402
from minitron.training.tiny_teacher import TINY_CONFIG  # noqa: E402

BATCH, TOKENS, HEADS, HEAD_DIM, GROUPS, STATE, CHUNK = 2, 24, 4, 8, 2, 16, 16  # a chunk and a half: the interpreter takes seconds for each
STARTS = ((0, 7), (0, 21), (1, 16), (1, 17))  # row and token of every document but a row's first: within chunks, at an edge, one of a single token
FORWARD, GRADIENT, MODEL = 1e-6, 1e-5, 1e-5
NAMES = ("x", "dt", "A", "B", "C", "D")
SMALL = Architecture(
    model_type="nemotron_h", pattern="M-*M", hidden=32, vocab=64, ffn=48, num_attention_heads=4, num_key_value_heads=2, attention_head_dim=8,
    mamba_num_heads=8, mamba_head_dim=8, mamba_num_groups=2, mamba_state_size=16, mamba_conv_kernel=4,
)  # fmt: skip


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def document_numbers(starts: tuple) -> torch.Tensor:
    numbers = torch.zeros(BATCH, TOKENS, dtype=torch.int32)
    for row, token in starts:
        numbers[row, token:] += 1
    return numbers


@dataclass(frozen=True)
class Scanned:
    """What a scan gave: its output, and the gradients by name of a random weighting of it."""

    y: torch.Tensor
    gradients: dict[str, torch.Tensor]


def scan_inputs() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(BATCH, TOKENS, *sizes, generator=random) for sizes in ((HEADS, HEAD_DIM), (GROUPS, STATE), (GROUPS, STATE)))
    dt, A, D = torch.rand(BATCH, TOKENS, HEADS, generator=random), -torch.rand(HEADS, generator=random) - 0.1, torch.randn(HEADS, generator=random)
    return [tensor.requires_grad_() for tensor in (x, dt, A, B, C, D)]


def scanned(scan: Callable[..., torch.Tensor]) -> Scanned:
    inputs = scan_inputs()
    y = scan(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return Scanned(y.detach(), dict(zip(NAMES, torch.autograd.grad(y, inputs, weights), strict=True)))


def by_kernels(numbers: torch.Tensor | None) -> Scanned:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return scanned(lambda x, dt, A, B, C, D: mamba_chunk_scan_combined(x, dt, A, B, C, CHUNK, D=D, seq_idx=numbers))


def by_project(numbers: torch.Tensor | None) -> Scanned:
    def scan(x, dt, A, B, C, D):
        def rows(x, dt, B, C):
            return ssd.scan(x, dt, A, B, C, D)[0]

        return rows(x, dt, B, C) if numbers is None else by_document(rows, numbers, x, dt, B, C)

    return scanned(scan)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_the_kernels_scan_is_ours(packed):
    numbers = document_numbers(STARTS) if packed else None
    found, expected = by_kernels(numbers), by_project(numbers)
    assert relative(found.y, expected.y) < FORWARD
    differences = {name: relative(gradient, expected.gradients[name]) for name, gradient in found.gradients.items()}
    assert max(differences.values()) < GRADIENT, differences
    if packed:  # the control: a document that begins one token late
        assert relative(by_project(document_numbers(((0, 8), *STARTS[1:]))).y, found.y) > 1000 * FORWARD


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = FAMILY.build(FAMILY.hf_config({**TINY_CONFIG, "chunk_size": CHUNK}, SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # transformers begins with constants, which would hide an exchange
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def rows() -> dict[str, torch.Tensor]:
    plain = torch.randint(SMALL.vocab, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    packed = plain.clone()
    for row, token in STARTS:
        packed[row, token] = mark_start(packed[row, token])
    return {"plain": plain, "packed": packed}


@dataclass(frozen=True)
class Passed:
    loss: float
    gradients: torch.Tensor
    hidden: torch.Tensor


def passed(model: torch.nn.Module, rows: torch.Tensor, *, training: bool, checkpointing: bool = False) -> Passed:
    model.train(training).zero_grad(set_to_none=True)
    if checkpointing:
        model.activation_checkpointing_enable()
    head = head_of(model, rows)
    loss = chunked_cross_entropy(head, next_token_labels(rows))
    loss.backward()
    if checkpointing:
        model.activation_checkpointing_disable()
    return Passed(loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), head.hidden_BTD.detach())


@pytest.fixture(scope="module")
def expected(model, rows) -> Iterator[dict[str, Passed]]:
    """By the project's own functions; afterwards transformers' stand in their places again, with the kernels behind them."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in dispatch.replacements()]
    dispatch.install()
    try:
        found = {name: passed(model, some, training=True) for name, some in rows.items()}
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
    return found


@pytest.fixture
def blocks_of_eight(monkeypatch):
    """Mixers by blocks of 8 tokens, as dispatch has them on a GPU with rows longer than a block."""
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    def by_blocks(theirs, long):
        return lambda module, hidden, *args, **kwargs: long(partial(theirs, module), hidden, *args, **kwargs)

    convolve = modeling.causal_conv1d_fn

    def prepared(first, *args, **kwargs):
        first, kwargs = dispatch._as_kernels_take(first, **kwargs)
        return convolve(first, *args, **kwargs)

    monkeypatch.setattr(block_sizes, "LONG_TOKENS", 8)
    monkeypatch.setattr(block_sizes, "BLOCK_TOKENS", 8)
    monkeypatch.setattr(modeling, "causal_conv1d_fn", prepared)
    monkeypatch.setattr(modeling.NemotronHMamba2Mixer, "forward", by_blocks(modeling.NemotronHMamba2Mixer.forward, dispatch._mix_long))
    monkeypatch.setattr(modeling.NemotronHMLP, "forward", by_blocks(modeling.NemotronHMLP.forward, dispatch._feed_long))


@pytest.mark.parametrize(("kind", "checkpointing"), [("plain", False), ("packed", True)])
def test_a_whole_model_by_blocks_of_tokens_is_the_projects(kind, checkpointing, model, rows, expected, blocks_of_eight):
    found, wanted = passed(model, rows[kind], training=True, checkpointing=checkpointing), expected[kind]
    assert found.loss == pytest.approx(wanted.loss, rel=MODEL)
    assert relative(found.gradients, wanted.gradients) < MODEL and relative(found.hidden, wanted.hidden) < MODEL


@pytest.mark.parametrize("mode", ["train", "eval", "checkpointed"])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_a_whole_model_by_kernels_is_the_projects(kind, mode, model, rows, expected, monkeypatch):
    import mamba_ssm.ops.triton.ssd_combined as kernels

    called, scan = [], kernels._mamba_chunk_scan_combined_fwd
    monkeypatch.setattr(kernels, "_mamba_chunk_scan_combined_fwd", lambda *args, **settings: called.append(1) or scan(*args, **settings))
    found, wanted = passed(model, rows[kind], training=mode != "eval", checkpointing=mode == "checkpointed"), expected[kind]
    assert called, "the kernels were not what the model ran"
    assert found.loss == pytest.approx(wanted.loss, rel=MODEL)
    assert relative(found.gradients, wanted.gradients) < MODEL and relative(found.hidden, wanted.hidden) < MODEL
    other = expected["packed" if kind == "plain" else "plain"]
    assert relative(found.hidden, other.hidden) > 100 * MODEL  # the control: documents make a difference


def test_the_kernels_take_as_much_memory_as_is_planned():
    """Forward and backward of the fused mixer and forward of the scan, by the tensors that mamba-ssm's own Python makes."""
    from counted_kernels import counting
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

    inner, hidden, tokens = HEADS * HEAD_DIM, 24, 2 * CHUNK
    channels = inner + 2 * GROUPS * STATE
    random = torch.Generator().manual_seed(0)
    sizes = ((1, tokens, inner + channels + HEADS), (channels, 4), (channels,), (HEADS,), (HEADS,), (HEADS,), (inner,), (hidden, inner))
    projected, weight, bias, dt_bias, A, D, norm, out = inputs = [torch.randn(size, generator=random).requires_grad_() for size in sizes]
    x, dt, B, C = (torch.randn(1, tokens, *size, generator=random) for size in ((HEADS, HEAD_DIM), (HEADS,), (GROUPS, STATE), (GROUPS, STATE)))
    with counting() as counter:
        counter.take([*inputs, x, dt, B, C])
        forward, y = counter.peak_of(lambda: mamba_split_conv1d_scan_combined(
            projected, weight, bias, dt_bias, -A.abs(), D, CHUNK, rmsnorm_weight=norm, outproj_weight=out, headdim=HEAD_DIM, ngroups=GROUPS,
            norm_before_gate=False))  # fmt: skip
        backward, _ = counter.peak_of(lambda: torch.autograd.grad(y, inputs, torch.ones_like(y)))
        scan, scanned_x = counter.peak_of(lambda: mamba_chunk_scan_combined(x, dt, -A.detach().abs(), B, C, CHUNK, D=D.detach()))
    planned = ScanMemory(HEADS, HEAD_DIM, GROUPS, STATE, 1, tokens, 4, CHUNK)
    assert planned.mixer() + planned.mixer_keeps() + y.nbytes == pytest.approx(forward, rel=0.05)
    assert planned.mixer_back() + projected.nbytes + y.nbytes == pytest.approx(backward, rel=0.05)
    assert planned.scan() + scanned_x.nbytes == pytest.approx(scan, rel=0.05)
    stateless = replace(planned, state=1)  # the control: without states
    assert stateless.mixer_back() + projected.nbytes < 0.9 * backward and stateless.scan() < 0.9 * scan


def test_the_pretended_packages_have_the_real_ones_arguments():
    import causal_conv1d
    import pretended_kernels
    from mamba_ssm.ops.triton import selective_state_update, ssd_combined

    real = {name: getattr(module, name) for module, names in (
        (causal_conv1d, ("causal_conv1d_fn", "causal_conv1d_update")),
        (ssd_combined, ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")),
        (selective_state_update, ("selective_state_update",)),
    ) for name in names}  # fmt: skip
    for name, function in real.items():
        assert list(inspect.signature(getattr(pretended_kernels, name)).parameters) == list(inspect.signature(function).parameters), name
