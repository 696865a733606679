"""What is asked before anything is compiled for a GPU: each thing that can be missing, with a real nvcc of a few lines in a folder of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minitron.machine.cuda_check import find_nvcc, max_jobs
from minitron.mamba.kernels import KERNELS


@pytest.fixture
def toolkit(tmp_path) -> Callable[..., Path]:
    """Makes a CUDA toolkit's folder whose nvcc says this release; gives the folder of its programs."""

    def make(release: str = "13.0", *, says: str | None = None, headers: bool = True) -> Path:
        programs = tmp_path / f"cuda-{release}" / "bin"
        programs.mkdir(parents=True)
        nvcc = programs / "nvcc"
        nvcc.write_text("#!/bin/sh\n" + (says or f'echo "Cuda compilation tools, release {release}, V{release}.88"') + "\n")
        nvcc.chmod(0o755)
        compiler = programs / "g++"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
        if headers:
            (programs.parent / "include").mkdir()
            (programs.parent / "include" / "cuda_runtime_api.h").touch()
        return programs

    return make


@pytest.fixture
def check(repository, environment) -> Callable[..., subprocess.CompletedProcess]:
    """The command, with nothing but these in PATH and no toolkit named."""

    def run(*arguments: str, path: Path, **more: str) -> subprocess.CompletedProcess:
        own = {name: value for name, value in environment.items() if name not in ("CUDA_HOME", "CUDA_PATH", "CXX")}
        command = [sys.executable, "-m", "minitron.machine.cuda_check", *arguments]
        return subprocess.run(command, env=own | {"PATH": str(path)} | more, cwd=repository, text=True, capture_output=True)

    return run


def refused(finished: subprocess.CompletedProcess) -> str:
    """The one line of a refusal."""
    (line,) = finished.stderr.splitlines()
    assert finished.returncode == 2 and finished.stdout == "" and line.startswith("error: ")
    return line.removeprefix("error: ")


def test_a_machine_that_can_compile_passes(check, toolkit):
    """The control of all below."""
    programs = toolkit()
    finished = check("--cuda", "13.2", path=programs)
    assert (finished.returncode, finished.stderr, finished.stdout) == (0, "", f"{programs}/nvcc of CUDA 13.0, g++\n")


def test_a_missing_nvcc_is_named(check, toolkit, tmp_path):
    nowhere = tmp_path / "nothing"
    line = refused(check("--cuda", "13.0", path=nowhere, CUDA_HOME=str(nowhere)))
    assert line.startswith("nvcc is missing ") and "install the CUDA toolkit, version 13 " in line
    assert find_nvcc({"PATH": str(nowhere), "CUDA_HOME": str(toolkit().parent)})  # the control


def test_an_nvcc_of_another_major_is_named(check, toolkit):
    programs = toolkit("12.8")
    assert refused(check("--cuda", "13.0", path=programs)).startswith(f"{programs}/nvcc is of CUDA 12.8, torch is built for 13.0; ")


def test_cuda_home_goes_before_path_as_in_torch(check, toolkit):
    old, new = toolkit("12.8"), toolkit("13.1")
    assert check("--cuda", "13.0", path=old, CUDA_HOME=str(new.parent)).returncode == 0
    assert refused(check("--cuda", "13.0", path=new, CUDA_HOME=str(old.parent)))


@pytest.mark.parametrize(("says", "told"), [("exit 3", " does not run: "), ("echo hello", " does not say its release")])
def test_an_nvcc_that_is_none_is_named(says, told, check, toolkit):
    assert told in refused(check("--cuda", "13.0", path=toolkit(says=says)))


def test_an_nvcc_without_its_toolkit_around_it_is_named(check, toolkit):
    assert "/include/cuda_runtime_api.h is not; point CUDA_HOME" in refused(check("--cuda", "13.0", path=toolkit(headers=False)))


def test_a_missing_compiler_is_named(check, toolkit):
    programs = toolkit()
    assert refused(check("--cuda", "13.0", path=programs, CXX="clang++-99")) == "C++ compiler clang++-99 is missing; install g++ or set CXX"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_a_torch_without_cuda_is_named(check, toolkit):
    assert refused(check(path=toolkit())).startswith(f"torch {torch.__version__} is built without CUDA; ")


def test_a_kernel_package_that_cannot_be_used_is_named(check, tmp_path, repository):
    package, module, function = KERNELS[0]
    information, folder = tmp_path / "mamba_ssm-9.9.dist-info", Path(tmp_path, *module.split(".")[:-1])
    information.mkdir(), folder.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9\n")
    (folder / f"{module.split('.')[-1]}.py").write_text("import selective_scan_cuda_of_another_torch\n")
    path = Path(os.environ["PATH"].split(os.pathsep)[0])
    line = refused(check("--kernels", path=path, PYTHONPATH=os.pathsep.join((str(tmp_path), str(repository)))))
    assert line == "mamba-ssm 9.9 cannot be used: ModuleNotFoundError: No module named 'selective_scan_cuda_of_another_torch'"


def test_compilers_at_once_are_no_more_than_cores_sources_and_memory_allow(check, toolkit):
    assert [max_jobs(cores, gib * 2**30) for cores, gib in ((2, 64), (64, 1000), (16, 15), (16, 1))] == [2, 4, 2, 1]
    assert int(check("--jobs", path=toolkit()).stdout) >= 1
