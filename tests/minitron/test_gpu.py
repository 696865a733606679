"""What a GPU must have, the GPU benchmark's rows on toys, and on a GPU itself: numbers and bytes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
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
from minitron.mamba.kernels import KERNELS, check_bf16, check_gpu, check_kernels, check_numbers
from minitron.training.tiny_teacher import TINY_CONFIG

CPU, VERSIONS = torch.device("cpu"), {"mamba-ssm": "2.3.2", "causal-conv1d": "1.7.0"}
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def benchmark(repository, environment, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs benchmarks/gpu.py where no GPU is seen."""
    script = repository / "benchmarks" / "gpu.py"

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(script), "--out", str(tmp_path / "results"), *arguments]
        return subprocess.run(command, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, text=True, capture_output=True)

    return run


def error_line(finished: subprocess.CompletedProcess) -> str:
    (line,) = [line for line in finished.stderr.splitlines() if not line.startswith("[transformers]")]
    return line


def test_every_row_of_the_gpu_benchmark_runs_on_toys(benchmark, tmp_path):
    finished = benchmark("--device", "cpu", "--tiny")
    assert finished.returncode == 0, finished.stderr
    (path,) = (tmp_path / "results").iterdir()
    result = json.loads(path.read_text())
    assert result == json.loads(finished.stdout.splitlines()[-1]) and path.name == f"gpu-cpu-{result['date']}.json"
    assert list(result["rows"]) == ["memory report", "width scoring", "depth scoring", "zero-shot screening", "distillation loss",
                                    "distillation, about 1B", "distillation, largest pair"]  # fmt: skip
    assert all(0 < value < float("inf") for row in result["rows"].values() for value in row.values())
    assert result["rows"]["memory report"] == {"weights_over_report": 1.0, "kv_and_ssm_over_report": 1.0}


@pytest.mark.parametrize("arguments", [(), ("--device", "cpu")], ids=["no GPU", "12B on a CPU"])
def test_what_the_gpu_benchmark_cannot_do_is_refused_in_one_line(arguments, benchmark, tmp_path):
    finished = benchmark(*arguments)
    assert finished.returncode == 2 and error_line(finished).startswith("error: --device is ") and not (tmp_path / "results").exists()


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
        (folder / f"{module.split('.')[-1]}.py").write_text(text)
        for name in [name for name in sys.modules if name.split(".")[0] == module.split(".")[0]]:
            monkeypatch.delitem(sys.modules, name)

    yield install
    for name in set(sys.modules) - set(before):  # else whatever is imported later would find them
        if name.split(".")[0] in {module.split(".")[0] for _, module, _ in KERNELS}:
            del sys.modules[name]


def test_a_missing_kernel_package_is_named():
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU may have them")
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


def test_whole_kernel_packages_are_taken(installed):
    """The control: the same packages with their functions in them. What a model calls without a GPU is transformers' own."""
    for package, module, function in KERNELS:
        installed(package, "9.9", module, f"def {function}(): ...")
    check_kernels(CPU)


def test_kernels_that_give_other_numbers_are_named_with_their_version(monkeypatch):
    check_numbers(CPU, VERSIONS)
    own = modeling.mamba2_chunk_scan
    monkeypatch.setattr(modeling, "mamba2_chunk_scan", lambda x, dt, *others, **settings: own(x, 1.05 * dt, *others, **settings))
    with pytest.raises(ValueError, match=r"^mamba-ssm 2\.3\.2 differs from the definition by \d+\.\d% on cpu; at most 2% is rounding$"):
        check_numbers(CPU, VERSIONS)


def test_kernels_that_fail_are_named_with_their_version(monkeypatch):
    def fail(*_arguments, **_settings):
        raise RuntimeError("Triton Error [CUDA]:\n device kernel image is invalid")

    monkeypatch.setattr(modeling, "causal_conv1d_fn", fail)
    with pytest.raises(ValueError, match=r"^causal-conv1d 1\.7\.0 fails on cpu: RuntimeError: Triton Error \[CUDA\]: device kernel image is invalid$"):
        check_numbers(CPU, VERSIONS)


# On a GPU itself. Sizes that the kernels take: heads of 64, states of 64, channels in eights.

MEDIUM = Architecture(
    model_type="nemotron_h", pattern="M-M*-M-*-", hidden=512, vocab=4096, ffn=2048, num_attention_heads=8, num_key_value_heads=2, attention_head_dim=64,
    mamba_num_heads=16, mamba_head_dim=64, mamba_num_groups=2, mamba_state_size=64, mamba_conv_kernel=4,
)  # fmt: skip
ROWS, TOKENS = 2, 1024


@pytest.fixture
def medium() -> torch.nn.Module:
    torch.manual_seed(0)
    return FAMILY.build(FAMILY.hf_config(TINY_CONFIG, MEDIUM)).eval().requires_grad_(False)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.cpu().double() - expected.double()).norm() / expected.double().norm()).item()


def requested_bytes() -> int:
    """What was asked of torch's allocator and not given back; it rounds each up."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


class TestOnGpu:
    pytestmark = on_gpu

    def test_bf16_and_the_kernels_are_there(self):
        check_gpu(torch.device("cuda"))

    def test_logits_and_gradients_are_those_of_the_cpu(self, medium):
        ids = torch.randint(MEDIUM.vocab, (ROWS, 256))

        def run(model, ids):
            model.requires_grad_(True).zero_grad(set_to_none=True)
            logits = model(ids, use_cache=False).logits.float()
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            return logits.detach(), torch.cat([parameter.grad.float().flatten().cpu() for parameter in model.parameters()])

        expected, expected_gradients = run(medium, ids)
        for training in (False, True):  # with train() one kernel does the whole mixer
            logits, gradients = run(medium.bfloat16().cuda().train(training), ids.cuda())
            assert relative(logits, expected) < 0.05 and relative(gradients, expected_gradients) < 0.1
        other, _ = run(medium, ids.cuda().flip(1))
        assert relative(other, expected) > 0.5  # the control

    def test_allocated_bytes_of_weights_and_caches_are_the_reports(self, medium):
        ids = torch.randint(MEDIUM.vocab, (ROWS, TOKENS)).cuda()
        report = memory_report(MEDIUM, Workload(TOKENS, ROWS))
        before = requested_bytes()
        model = medium.bfloat16().cuda()
        assert requested_bytes() - before == report.weights
        model(ids, use_cache=False)  # libraries take their workspaces
        before = requested_bytes()
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        kernel = MEDIUM.mamba_conv_kernel  # transformers keeps one column more of the convolution's inputs than is read
        assert requested_bytes() - before == report.kv_cache + report.ssm_state + report.conv_state * kernel // (kernel - 1)
        assert cache is not None

    def test_the_peak_of_a_prompt_is_within_5_percent_of_the_report(self, medium):
        ids, model = torch.randint(MEDIUM.vocab, (ROWS, TOKENS)).cuda(), medium.bfloat16().cuda()
        model(ids[:, :64], use_cache=True, logits_to_keep=1)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated() - sum(parameter.nbytes for parameter in model.parameters())
        torch.cuda.reset_peak_memory_stats()
        model(ids, use_cache=True, logits_to_keep=1)
        report = memory_report(MEDIUM, Workload(TOKENS, ROWS, activation_tokens=ROWS * TOKENS))
        assert torch.cuda.max_memory_allocated() - before == pytest.approx(report.total, rel=0.05)
