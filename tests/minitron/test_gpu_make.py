"""The Makefile's GPU targets, with a small program in Python's place that writes down what it is asked: what is run, in which order, and when it stops.

And of the carried check what can be held without a GPU: the cut of causal-conv1d's setup.py to one architecture.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
ANSWERS = '#!/bin/sh\necho "${{0##*/}} $*" >> "{log}"\ncase "$*" in {cases} *) exit 0;; esac\n'


@pytest.fixture
def make(repository, environment, tmp_path) -> Callable[..., tuple[int, list[str], str]]:
    """Runs a target with a .venv whose python and pip exit with these codes where these words are among their arguments: make's code, the calls, its output."""
    log, programs = tmp_path / "calls", tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)

    def run(target: str, *done: str, **fails: int) -> tuple[int, list[str], str]:
        cases = " ".join(f"*{word}*) exit {code};;" for word, code in fails.items())
        for name in ("python", "pip"):
            (programs / name).write_text(ANSWERS.format(log=log, cases=cases))
            (programs / name).chmod(0o755)
        for name in ("installed", "installed-test", *done):
            (programs.parent / name).touch()
        command = ["make", "-C", repository, target, f"VENV={programs.parent}", f"PYTHON={programs / 'python'}"]
        own = {name: value for name, value in environment.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}  # of a make around the tests
        finished = subprocess.run(command, text=True, capture_output=True, env=own | {"MAX_JOBS": "2"})
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return finished.returncode, calls, finished.stdout + finished.stderr

    return run


def test_the_gpu_benchmark_is_run_also_where_a_gpu_test_fails_and_make_says_so(make):
    for fails, succeeds in (({}, True), ({"pytest": 1}, False), ({"benchmarks": 1}, False)):
        code, calls, _ = make("gpu-check", "installed-cuda", **fails)
        assert [call.split(" ")[1] for call in calls] == ["-m", "benchmarks/gpu.py"] and (code == 0) is succeeds


def test_nothing_is_installed_for_cuda_where_something_is_missing(make):
    code, calls, _ = make("install-cuda", cuda_check=2)
    assert code == 2 and calls == ["python -m minitron.machine.cuda_check"]


def test_causal_conv1d_alone_is_compiled_and_both_packages_are_tried(make):
    """The control of the test above."""
    code, calls, output = make("install-cuda")
    packages = [call for call in calls if call.startswith("pip") and "==" in call.split(" ")[-1]]
    assert code == 0 and calls[-1] == "python -m minitron.machine.cuda_check --kernels" and len(packages) == 2
    assert all("--no-deps" in call and "--no-build-isolation" in call and "--no-cache-dir" in call for call in packages)
    lines = [line for line in output.splitlines() if "pip" in line]
    (mamba,), (convolution,) = ([line for line in lines if name in line] for name in ("mamba-ssm==", "causal-conv1d=="))
    assert "MAMBA_SKIP_CUDA_BUILD=TRUE" in mamba and "SKIP_CUDA_BUILD" not in convolution


def test_a_carried_check_stops_where_the_machine_has_no_gpu(make):
    code, calls, _ = make("gpu-check-carried", **{"gpu_carried": 2})
    assert code == 2 and calls == ["python benchmarks/gpu_carried.py set-up"]
    code, calls, _ = make("gpu-check-carried")  # the control
    assert code == 0 and [call.split(" ")[1] for call in calls] == ["benchmarks/gpu_carried.py", "-m", "benchmarks/gpu.py"]


SETUP = """
        cc_flag.append("-gencode")
        cc_flag.append("arch=compute_80,code=sm_80")
        if bare_metal_version >= Version("11.8"):
            cc_flag.append("-gencode")
            cc_flag.append("arch=compute_90,code=sm_90")
        if bare_metal_version >= Version("13.0"):
            cc_flag.append("-gencode")
            cc_flag.append("arch=compute_110,code=sm_110")
            cc_flag.append("-gencode")
            cc_flag.append("arch=compute_121,code=sm_121")
"""


@pytest.fixture
def carried(repository) -> ModuleType:
    sys.path.insert(0, str(repository))
    import benchmarks.gpu_carried

    return benchmarks.gpu_carried


def flags(setup: str) -> list[str]:
    """What the lines of setup.py, run, hand to nvcc."""
    found: list[str] = []
    exec("if True:\n" + setup, {"cc_flag": found, "bare_metal_version": (13, 0), "Version": lambda text: tuple(map(int, text.split(".")))})
    return found


def test_causal_conv1d_is_cut_to_the_one_architecture_there_is(carried):
    assert flags(carried.one_architecture(SETUP, (9, 0))) == ["-gencode", "arch=compute_90,code=sm_90"]
    assert flags(carried.one_architecture(SETUP, (12, 1))) == ["-gencode", "arch=compute_121,code=sm_121"]
    assert len(flags(SETUP)) == 8  # the control
    with pytest.raises(ValueError, match=r"^this GPU's compute capability is 8\.9; causal-conv1d compiles for 80, 90, 110, 121$"):
        carried.one_architecture(SETUP, (8, 9))


KERNELS_SOURCE = """
    if (params.width == 2) {
        launch<128, 2, input_t>(params);
    } else if (params.width == 3) {
        launch<128, 3, input_t>(params);
    } else if (params.width == 4) {
        launch<128, 4, input_t>(params);
    }
template void run<float, float>(Params &params);
template void run<at::Half, float>(Params &params);
template void run<at::BFloat16, at::Half>(Params &params);
"""
CALLING_SOURCE = """
    if (ITYPE == at::ScalarType::Half) {
        using input_t = at::Half;
    } else if (ITYPE == at::ScalarType::BFloat16) {
        using input_t = at::BFloat16;
    TORCH_CHECK(width >= 2 && width <= 4, "only supports width between 2 and 4");
"""


def test_what_nemotron_h_does_not_call_is_neither_compiled_nor_called(carried):
    cut = carried.without_spare_kernels(KERNELS_SOURCE)
    assert cut.split("\n")[1:] == ["    if (params.width == 4) {", "        launch<128, 4, input_t>(params);", "    }",
                                  "template void run<float, float>(Params &params);", ""]  # fmt: skip
    cut = carried.without_spare_kernels(CALLING_SOURCE)
    assert "Half" not in cut and "    if (ITYPE == at::ScalarType::BFloat16) {" in cut and "TORCH_CHECK(width == 4," in cut


def test_a_folder_that_was_not_carried_is_named(carried, monkeypatch, tmp_path):
    monkeypatch.setattr(carried, "CARRIED", tmp_path / "gpu-carried")
    with pytest.raises(ValueError, match=r"gpu-carried is not there; make gpu-carry makes it "):
        carried.set_up()
