"""What compiling for a GPU needs, asked before it starts: `python -m minitron.machine.cuda_check`. docs/gpu.md

One line says what is missing and what to do, exit code 2. Of the two kernel packages only causal-conv1d is compiled: of mamba-ssm a Mamba-2 layer uses
nothing but Triton kernels.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

USUAL_PLACE = Path("/usr/local/cuda")  # where torch looks last
HEADERS = ("include/cuda_runtime_api.h", "targets/*/include/cuda_runtime_api.h")  # the second: conda's toolkit
SOURCES = 4  # of causal-conv1d, so more jobs would have nothing to do
# A job compiles four architectures at once; nvcc 13.0 took 3.2 GiB for one of the largest source, half a GiB for one of the others (sm_90).
LARGEST_GIB, OTHER_GIB = 13, 2


def check_build(cuda: str | None, environment: Mapping[str, str], *, torch_version: str = "torch") -> str:
    """What will compile for CUDA version `cuda` (torch's; None: torch is built without), in one line. Raises ValueError, one line, for what is missing."""
    if cuda is None:
        raise ValueError(f"{torch_version} is built without CUDA; install the CUDA build of the same version: pip install --force-reinstall 'torch==…', "
                         "from the index that pytorch.org names for your driver")  # fmt: skip
    nvcc = find_nvcc(environment)
    major = cuda.partition(".")[0]
    if nvcc is None:
        raise ValueError(f"nvcc is missing (looked in CUDA_HOME, PATH and {USUAL_PLACE}); install the CUDA toolkit, version {major} as torch's, or take an "
                         "image whose name holds devel")  # fmt: skip
    found = nvcc_version(nvcc)
    if found.partition(".")[0] != major:
        raise ValueError(f"{nvcc} is of CUDA {found}, torch is built for {cuda}; the majors must be equal: install toolkit {major} or point CUDA_HOME at one")
    home = nvcc.parent.parent
    if not any(True for pattern in HEADERS for _ in home.glob(pattern)):
        raise ValueError(f"{nvcc} is there, {home}/include/cuda_runtime_api.h is not; point CUDA_HOME at the toolkit's own folder, such as {USUAL_PLACE}")
    compiler = environment.get("CXX", "g++")
    if not shutil.which(compiler, path=environment.get("PATH", "")):
        raise ValueError(f"C++ compiler {compiler} is missing; install g++ or set CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise ValueError(f"Python.h is missing in {sysconfig.get_path('include')}; install Python's headers (python3-dev)")
    return f"{nvcc} of CUDA {found}, {compiler}"


def find_nvcc(environment: Mapping[str, str]) -> Path | None:
    """The nvcc that torch's builds of extensions take: that of CUDA_HOME or CUDA_PATH where set, else the first in PATH, else the usual place's."""
    if home := environment.get("CUDA_HOME") or environment.get("CUDA_PATH"):
        nvcc = Path(home, "bin", "nvcc")
        return nvcc if os.access(nvcc, os.X_OK) else None
    if found := shutil.which("nvcc", path=environment.get("PATH", "")):
        return Path(found)
    nvcc = USUAL_PLACE / "bin" / "nvcc"
    return nvcc if os.access(nvcc, os.X_OK) else None


def nvcc_version(nvcc: Path) -> str:
    """Such as 13.0. Raises ValueError where it does not run or does not say."""
    try:
        said = subprocess.run([nvcc, "--version"], text=True, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{nvcc} does not run: {error}") from None
    if not (release := re.search(r"release (\d+\.\d+)", said)):
        raise ValueError(f"{nvcc} --version does not say its release; is it NVIDIA's?")
    return release[1]


def max_jobs(cores: int, memory_bytes: int) -> int:
    """Compilers at once: no more than there are cores, sources, and memory for."""
    return max(1, min(cores, SOURCES, 1 + (memory_bytes // 2**30 - LARGEST_GIB) // OTHER_GIB))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", help="hold nvcc against this CUDA version instead of torch's, such as 13.0: where torch is not there yet")
    parser.add_argument("--jobs", action="store_true", help="print the number of compilers that this machine has room for (MAX_JOBS), nothing else")
    parser.add_argument("--kernels", action="store_true", help="instead of what compiling needs, check that the kernel packages can be used")
    options = parser.parse_args()
    try:
        if options.jobs:
            from minitron.machine.memory import available_memory_bytes

            print(max_jobs(len(os.sched_getaffinity(0)), available_memory_bytes()))
        elif options.kernels:
            _check_kernels()
        else:
            _check_build(options.cuda)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check_build(cuda: str | None) -> None:
    if cuda is not None:
        print(check_build(cuda, os.environ))
        return
    import torch

    print(check_build(torch.version.cuda, os.environ, torch_version=f"torch {torch.__version__}"))
    if not torch.cuda.is_available():
        print("note: torch sees no CUDA device here; the kernels are built, not tried", file=sys.stderr)


def _check_kernels() -> None:
    from minitron.mamba.kernels import unusable_kernel

    if told := unusable_kernel():
        raise ValueError(told)
    print("mamba-ssm and causal-conv1d can be used")


if __name__ == "__main__":
    sys.exit(main())
