"""benchmarks/gpu.py on toys: its rows, its result file, its time limit, and what it makes of a row that fails."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from memory_budget.architecture import Architecture

CPU = torch.device("cpu")
ROWS = ["distillation loss", "distillation, about 1B", "distillation, largest pair", "memory report", "width scoring", "depth scoring",
        "zero-shot screening"]  # fmt: skip


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
    assert list(result["rows"]) == list(result["row_seconds"]) == ROWS
    assert all(0 < value < float("inf") for row in result["rows"].values() for value in row.values())
    assert result["rows"]["memory report"] == {"weights_over_report": 1.0, "kv_and_ssm_over_report": 1.0}


@pytest.mark.parametrize("arguments", [(), ("--device", "cpu")], ids=["no GPU", "12B on a CPU"])
def test_what_the_gpu_benchmark_cannot_do_is_refused_in_one_line(arguments, benchmark, tmp_path):
    finished = benchmark(*arguments)
    assert finished.returncode == 2 and error_line(finished).startswith("error: --device is ") and not (tmp_path / "results").exists()


def test_rows_that_would_not_end_in_the_time_given_are_left_out_and_said_so(benchmark, tmp_path):
    finished = benchmark("--device", "cpu", "--tiny", "--minutes", "0")
    assert finished.returncode == 0, finished.stderr
    (path,) = (tmp_path / "results").iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ROWS and rows["distillation loss"] == {"skipped": "0 s are left of the time given, about 15 s are needed"}
    assert finished.stdout.count("skipped: 0 s are left") == len(ROWS)


def test_what_is_measured_stays_when_the_benchmark_is_killed(repository, environment, tmp_path):
    command = [sys.executable, str(repository / "benchmarks" / "gpu.py"), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    with subprocess.Popen(command, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline().startswith(ROWS[0])
        process.kill()
    (path,) = tmp_path.iterdir()
    assert list(json.loads(path.read_text())["rows"]) == ROWS[:1] and path.suffix == ".json"


@pytest.fixture(scope="module")
def gpu(repository) -> ModuleType:
    sys.path.insert(0, str(repository))
    import benchmarks.gpu

    return benchmarks.gpu


def test_a_row_that_fails_says_why_and_the_others_go_on(gpu):
    told = {}
    sizes = replace(gpu.TINY, loss_tokens=2**45)  # 4 PiB: no machine has them
    gpu.measure(sizes, CPU, told.__setitem__, only=[ROWS[0], ROWS[3]])
    assert "allocate" in told[ROWS[0]]["error"] and "\n" not in told[ROWS[0]]["error"] and told[ROWS[3]]["weights_over_report"] == 1.0
    gpu.measure(gpu.TINY, CPU, told.__setitem__, only=[ROWS[0]])  # the control
    assert told[ROWS[0]]["tokens_per_second"] > 0


def test_a_boards_rate_is_its_own(gpu):
    rates = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12,
             "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None, "NVIDIA L4": None}  # fmt: skip
    assert {board: gpu.gpu_rows.bf16_flops(board) for board in rates} == rates


def test_all_models_of_the_benchmark_share_mambas_kernels(gpu):
    def tuned_for(architecture: Architecture) -> tuple[int, ...]:
        return architecture.mamba_head_dim, architecture.mamba_state_size, architecture.mamba_num_heads, architecture.mamba_num_groups

    sizes = gpu.Sizes()
    assert {tuned_for(one) for one in (sizes.teacher, sizes.student, sizes.small_teacher, sizes.small_student)} == {(80, 128, 128, 8)}
    assert tuned_for(replace(sizes.teacher, mamba_num_heads=sizes.fewer_heads)) != tuned_for(sizes.teacher)  # the control
