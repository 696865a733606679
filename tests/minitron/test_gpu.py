"""What a GPU must have, and on a GPU itself: numbers and bytes."""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers.models.nemotron_h import modeling_nemotron_h as modeling

from memory_budget.architecture import Architecture
from memory_budget.calculator import memory_report
from memory_budget.workload import Workload
from minitron.families.nemotron_h import FAMILY
from minitron.machine.device import _say_once
from minitron.mamba import dispatch
from minitron.mamba.kernels import KERNELS, check_bf16, check_gpu, check_kernels, check_numbers
from minitron.measures.speed import _peak_bytes as peak_bytes
from minitron.training.tiny_teacher import TINY_CONFIG

CPU, VERSIONS = torch.device("cpu"), {"mamba-ssm": "2.3.2", "causal-conv1d": "1.7.0"}
PACKAGES_FUNCTIONS = ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_split_conv1d_scan_combined", "mamba2_selective_state_update", "mamba2_chunk_scan")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def in_plain_torch(monkeypatch) -> Callable[[], AbstractContextManager[pytest.MonkeyPatch]]:
    """While entered, transformers' own functions are called, not the packages': those take tensors on a GPU alone, yet are chosen once for all devices."""

    @contextmanager
    def enter() -> Iterator[pytest.MonkeyPatch]:
        with monkeypatch.context() as patched:
            for owner, name, _ in dispatch.replacements():  # another test of this process may have put ours there
                patched.setattr(owner, name, getattr(getattr(owner, name), "in_place_of", getattr(owner, name)))
            for name in PACKAGES_FUNCTIONS:
                patched.setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))
            yield patched

    return enter


def test_a_gpu_without_bf16_is_refused_by_name_and_the_first_with_it_is_not():
    with pytest.raises(ValueError, match="^device Tesla V100 has compute capability 7.0; bf16 needs at least 8.0$"):
        check_bf16("Tesla V100", (7, 0))
    check_bf16("A100", (8, 0))


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Iterator[Callable[..., None]]:
    """Puts packages of these names, versions and contents where Python finds them first, for one test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(sys.modules)

    def install(package: str, version: str, module: str, text: str) -> None:
        information = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        folder = Path(tmp_path, *module.split(".")[:-1])
        folder.mkdir(parents=True, exist_ok=True)
        for package_folder in (folder, *folder.parents)[: len(module.split(".")) - 1]:
            (package_folder / "__init__.py").touch()  # else a real package, if there is one, goes first
        (folder / f"{module.split('.')[-1]}.py").write_text(text)
        for name in [name for name in sys.modules if name.split(".")[0] == module.split(".")[0]]:
            monkeypatch.delitem(sys.modules, name)

    yield install
    for name in set(sys.modules) - set(before):  # else whatever is imported later would find them
        if name.split(".")[0] in {module.split(".")[0] for _, module, _ in KERNELS}:
            del sys.modules[name]


def test_a_missing_kernel_package_is_named():
    if importlib.util.find_spec("mamba_ssm"):
        pytest.skip("it is there")
    with pytest.raises(ValueError, match="^mamba-ssm is not installed; "):
        check_kernels(CPU)


@pytest.mark.parametrize("text", ["raise ImportError('undefined symbol: _ZN3c104cuda')", "other = 1"], ids=["built for another torch", "without the function"])
def test_a_kernel_package_that_cannot_be_used_is_named_with_its_version(text, installed):
    installed("mamba-ssm", "2.9.1", KERNELS[0][1], text)
    with pytest.raises(ValueError, match=r"^mamba-ssm 2\.9\.1 cannot be used: (ImportError: undefined symbol|AttributeError: )") as raised:
        check_kernels(CPU)
    assert "\n" not in str(raised.value)


def test_a_process_says_once_that_kernels_are_missing(capsys):
    for _ in range(2):
        _say_once("mamba-ssm 2.9.1 cannot be used: ImportError: no symbol")
        _say_once(None)
    assert capsys.readouterr().err == "note: mamba-ssm 2.9.1 cannot be used: ImportError: no symbol; going on without it, much slower\n"


def test_whole_kernel_packages_are_taken(installed, in_plain_torch):
    """The control: the same packages with their functions in them. What a model calls without a GPU is transformers' own."""
    for package, module, function in KERNELS:
        installed(package, "9.9", module, f"def {function}(): ...")
    with in_plain_torch():
        check_kernels(CPU)


def test_kernels_that_give_other_numbers_are_named_with_their_version(in_plain_torch):
    with in_plain_torch() as patched:
        check_numbers(CPU, VERSIONS)
        own = modeling.mamba2_chunk_scan
        patched.setattr(modeling, "mamba2_chunk_scan", lambda x, dt, *others, **settings: own(x, 1.05 * dt, *others, **settings))
        with pytest.raises(ValueError, match=r"^mamba-ssm 2\.3\.2 differs from the definition by \d+\.\d% on cpu; at most 2% is rounding$"):
            check_numbers(CPU, VERSIONS)


def test_kernels_that_fail_are_named_with_their_version(in_plain_torch):
    def fail(*_arguments, **_settings):
        raise RuntimeError("Triton Error [CUDA]:\n device kernel image is invalid")

    told = r"^causal-conv1d 1\.7\.0 fails on cpu: RuntimeError: Triton Error \[CUDA\]: device kernel image is invalid$"
    with in_plain_torch() as patched, pytest.raises(ValueError, match=told):
        patched.setattr(modeling, "causal_conv1d_fn", fail)
        check_numbers(CPU, VERSIONS)


# On a GPU itself, and what of it can be held without one. Sizes that the kernels take: heads of 64, states of 64, channels in eights.

MEDIUM = Architecture(
    model_type="nemotron_h", pattern="M-M*-M-*-", hidden=512, vocab=4096, ffn=2048, num_attention_heads=8, num_key_value_heads=2, attention_head_dim=64,
    mamba_num_heads=16, mamba_head_dim=64, mamba_num_groups=2, mamba_state_size=64, mamba_conv_kernel=4,
)  # fmt: skip
BATCH, TOKENS = 2, 1024


@pytest.fixture
def medium() -> torch.nn.Module:
    """Chunks of 128 tokens, as in every published config, and as the memory report counts."""
    torch.manual_seed(0)
    return FAMILY.build(FAMILY.hf_config(TINY_CONFIG | {"chunk_size": 128}, MEDIUM)).eval().requires_grad_(False)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.cpu().double() - expected.double()).norm() / expected.double().norm()).item()


def requested_bytes() -> int:
    """What was asked of torch's allocator and not given back; it rounds each up."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def test_a_reference_on_the_cpu_does_not_call_the_packages(medium, in_plain_torch, monkeypatch):
    ids = torch.randint(MEDIUM.vocab, (1, 160))
    with in_plain_torch():
        expected = medium(ids, use_cache=False).logits

    @functools.wraps(inspect.unwrap(modeling.mamba2_chunk_scan))
    def package(hidden_states, *_arguments, **_settings):
        raise RuntimeError(f"Expected x.is_cuda() to be true, is on {hidden_states.device}")

    monkeypatch.setattr(modeling, "mamba2_chunk_scan", package)
    with in_plain_torch():
        assert torch.equal(medium(ids, use_cache=False).logits, expected)
    with in_plain_torch() as patched, pytest.raises(RuntimeError, match="x.is_cuda"):  # the control
        patched.setattr(modeling, "mamba2_chunk_scan", package)
        medium(ids, use_cache=False)


def prompt_peak(*, float32_copies: int = 3) -> int:
    """Bytes that a prompt's pass of MEDIUM holds at most, beside the weights: in the gated norm of the last Mamba layer, in bf16 if not said otherwise.

    The memory report counts what an engine needs that fuses the norm; this is what transformers and the packages hold, term by term.
    """
    tokens, inner, channels = BATCH * TOKENS, MEDIUM.mamba_inner, MEDIUM.mamba_conv_channels
    stream = 3 * tokens * MEDIUM.hidden * 2  # the embedded tokens (the model keeps them), the residual stream, the layer's normed input
    projected = tokens * (inner + channels + MEDIUM.mamba_num_heads) * 2  # out of in_proj: z and dt are views of it
    convolved = tokens * channels * 2  # out of causal_conv1d_fn: x, B and C are views of it
    scanned = tokens * inner * 2  # out of mamba_chunk_scan_combined
    norm = float32_copies * tokens * inner * 4  # NemotronHRMSNormGated: x, z and silu(z) in float32
    report = memory_report(MEDIUM, Workload(TOKENS, BATCH))
    kernel = MEDIUM.mamba_conv_kernel  # transformers keeps one column more of the convolution's inputs than is read
    caches = report.ssm_state + report.conv_state * kernel // (kernel - 1)
    caches += report.ssm_state // MEDIUM.num_layers_of("M")  # the scan's last state, copied to the cache, is still there
    caches += report.kv_cache * MEDIUM.pattern[: MEDIUM.pattern.rindex("M")].count("*") // MEDIUM.num_layers_of("*")  # of attention layers before it
    return stream + projected + convolved + scanned + norm + caches


def empty_convolution(rows: torch.Tensor, *_arguments, **_settings) -> torch.Tensor:
    """Allocates what causal-conv1d does: an output as the input lies."""
    return torch.empty_like(rows.transpose(1, 2).contiguous()).transpose(1, 2).zero_()


def empty_scan(x: torch.Tensor, _dt, _A, B: torch.Tensor, _C, *, chunk_size: int, return_final_states: bool, **_settings):
    """Allocates what mamba_chunk_scan_combined does: time steps and decays, states, the products of C and B, the output."""
    batch, tokens, heads, head_dim = x.shape
    chunks, state = -(-tokens // chunk_size), B.shape[3]
    steps = torch.empty(2, batch, heads, chunks, chunk_size)
    states = torch.empty(batch, chunks, heads, head_dim, state)
    passed, last = states.to(x.dtype), torch.zeros(batch, heads, head_dim, state)
    del states
    products, out = torch.empty(batch, chunks, B.shape[2], chunk_size, chunk_size), torch.zeros_like(x)
    assert return_final_states and all(tensor.numel() for tensor in (steps, passed, products))
    return out, last


@torch.no_grad()
def test_the_peak_of_a_prompt_is_counted_term_by_term(medium, monkeypatch):
    """With stand-ins that allocate what the kernels do: without a GPU the count is held to transformers' own part of it."""
    monkeypatch.setattr(modeling, "causal_conv1d_fn", empty_convolution)
    monkeypatch.setattr(modeling, "mamba2_chunk_scan", empty_scan)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, *_arguments, **_settings: torch.empty_like(query))  # as flash attention's
    model, ids = medium.bfloat16(), torch.randint(MEDIUM.vocab, (BATCH, TOKENS))
    with peak_bytes(CPU) as peak:
        model(ids, use_cache=True, logits_to_keep=1)
    assert peak() == pytest.approx(prompt_peak(), rel=0.001)
    assert abs(peak() - prompt_peak(float32_copies=2)) > 0.1 * peak()  # the control


class TestOnGpu:
    pytestmark = on_gpu

    def test_bf16_and_the_kernels_are_there(self):
        check_gpu(torch.device("cuda"))

    def test_logits_and_gradients_are_those_of_the_cpu(self, medium, in_plain_torch):
        ids = torch.randint(MEDIUM.vocab, (BATCH, 256))

        def run(model, ids):
            model.requires_grad_(True).zero_grad(set_to_none=True)
            logits = model(ids, use_cache=False).logits.float()
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            return logits.detach(), torch.cat([parameter.grad.float().flatten().cpu() for parameter in model.parameters()])

        with in_plain_torch():
            expected, expected_gradients = run(medium, ids)
        for training in (False, True):  # with train() one kernel does the whole mixer
            logits, gradients = run(medium.bfloat16().cuda().train(training), ids.cuda())
            assert relative(logits, expected) < 0.05 and relative(gradients, expected_gradients) < 0.1
        other, _ = run(medium, ids.cuda().flip(1))
        assert relative(other, expected) > 0.5  # the control

    def test_allocated_bytes_of_weights_and_caches_are_the_reports(self, medium):
        ids = torch.randint(MEDIUM.vocab, (BATCH, TOKENS)).cuda()
        report = memory_report(MEDIUM, Workload(TOKENS, BATCH))
        before = requested_bytes()
        model = medium.bfloat16().cuda()
        assert requested_bytes() - before == report.weights
        model(ids, use_cache=False)  # libraries take their workspaces
        before = requested_bytes()
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        kernel = MEDIUM.mamba_conv_kernel  # transformers keeps one column more of the convolution's inputs than is read
        assert requested_bytes() - before == report.kv_cache + report.ssm_state + report.conv_state * kernel // (kernel - 1)
        assert cache is not None

    def test_the_peak_of_a_prompt_is_the_one_counted(self, medium):
        ids, model = torch.randint(MEDIUM.vocab, (BATCH, TOKENS)).cuda(), medium.bfloat16().cuda()
        model(ids, use_cache=True, logits_to_keep=1)  # libraries take their workspaces
        with peak_bytes(torch.device("cuda")) as peak:
            model(ids, use_cache=True, logits_to_keep=1)
        assert peak() == pytest.approx(prompt_peak(), rel=0.05)
        report = memory_report(MEDIUM, Workload(TOKENS, BATCH, activation_tokens=BATCH * TOKENS))
        assert peak() > 1.05 * (report.total - report.weights)  # the control: an engine that fuses the norm would need less
