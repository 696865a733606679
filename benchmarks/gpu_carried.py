"""The GPU check on a machine without a network and with a stack of its own: `prepare` a folder elsewhere, carry it there, `set-up` there. docs/gpu.md

The GPU machine brings Python, torch with its Triton and numpy, nvcc and a C++ compiler. All else comes in build/gpu-carried: wheels, among them
mamba-ssm's Python, and causal-conv1d's source, which is compiled there for the one kind of GPU found. Nothing is installed into the machine's Python:
everything goes to build/gpu-carried-site, for PYTHONPATH. Run by make: `make gpu-carry`, then there `make gpu-check-carried`.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from minitron.machine.cuda_check import check_build  # noqa: E402

CARRIED, SITE, SOURCE = (REPOSITORY / "build" / name for name in ("gpu-carried", "gpu-carried-site", "gpu-carried-source"))
MOST_BYTES = 64 * 2**20
NEEDED = ("transformers", "einops", "psutil", "pytest", "xxhash", "setuptools>=77", "wheel", "ninja", "packaging")
BROUGHT = ("numpy", "torch", "triton")  # by the GPU machine, built for each other
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
UNBUILT = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_FORCE_BUILD": "TRUE"}
GENCODE = re.compile(r'^( *)cc_flag\.append\("-gencode"\)\n *cc_flag\.append\("arch=compute_(\d+),code=sm_\d+"\)\n', re.MULTILINE)

WIDTHS = re.compile(r"if \(params\.width == 2\) \{.*?\} else if \(params\.width == 3\) \{.*?\} else (?=if \(params\.width == 4\))", re.DOTALL)
HALF_BUILT = re.compile(r"^template void .*at::Half.*\n", re.MULTILINE)
HALF_CALLED = re.compile(r"if \([IW]TYPE == at::ScalarType::Half\) \{.*?\} else (?=if)", re.DOTALL)
WIDTHS_ALLOWED = "width >= 2 && width <= 4"


def prepare(python: str) -> None:
    """Fill build/gpu-carried for that version of Python. Needs a network, and torch of any build, which the packages' setup.py import."""
    shutil.rmtree(CARRIED, ignore_errors=True)
    wheels = CARRIED / "wheels"
    wheels.mkdir(parents=True)
    pinned = REPOSITORY / "constraints.txt"
    mamba, convolution = (next(line for line in pinned.read_text().split() if line.startswith(f"{name}==")) for name in ("mamba-ssm", "causal-conv1d"))
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    _pip("download", "--only-binary=:all:", "--python-version", python, *platforms, "--constraint", pinned, "--dest", wheels, *NEEDED)
    for name in BROUGHT:
        for wheel in wheels.glob(f"{name}-*.whl"):
            wheel.unlink()
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--no-binary", "mamba-ssm", "--wheel-dir", wheels, mamba, **UNBUILT)
    _pip("download", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--no-binary", "causal-conv1d", "--dest", CARRIED, convolution, **UNBUILT)
    size = sum(path.stat().st_size for path in CARRIED.rglob("*") if path.is_file())
    print(f"{CARRIED}: {size / 2**20:.1f} MiB for Python {python}")
    if size > MOST_BYTES:
        raise ValueError(f"{CARRIED} is {size / 2**20:.1f} MiB; it is to be carried by hand and may have {MOST_BYTES >> 20} MiB")


def set_up(*, compiles: bool = True) -> None:
    """Fill build/gpu-carried-site from build/gpu-carried; nothing where it is done already. Without `compiles`: all but causal-conv1d, for trying."""
    import torch

    wheels = sorted((CARRIED / "wheels").glob("*.whl"))
    if not wheels:
        raise ValueError(f"{CARRIED} is not there; make gpu-carry makes it on a machine with a network")
    if compiles and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device")
    capability = torch.cuda.get_device_capability() if compiles else ()
    stack = {"python": sys.version, "torch": torch.__version__, "capability": list(capability), "wheels": [wheel.name for wheel in wheels]}
    done = SITE / "done.json"
    if done.is_file() and json.loads(done.read_text()) == stack:
        return
    if compiles:
        print(check_build(torch.version.cuda, os.environ, torch_version=f"torch {torch.__version__}"))
    shutil.rmtree(SITE, ignore_errors=True)
    _pip("install", "--no-index", "--no-deps", "--target", SITE, *wheels)
    (SITE / "selective_scan_cuda.py").write_text('"""Empty: mamba_ssm imports it at its top, and only Mamba-1 calls it."""\n')
    if compiles:
        environment = {"CAUSAL_CONV1D_FORCE_BUILD": "TRUE", "MAX_JOBS": os.environ.get("MAX_JOBS") or _cuda_check("--jobs"), "PYTHONPATH": str(SITE),
                       "PATH": f"{SITE / 'bin'}:{os.environ['PATH']}",
                       "NVCC_APPEND_FLAGS": os.environ.get("NVCC_APPEND_FLAGS", "--split-compile=0")}  # one file takes nearly all the time  # fmt: skip
        _pip("install", "--no-index", "--no-deps", "--no-build-isolation", "--upgrade", "--target", SITE, _unpacked(capability), **environment)
        print(_cuda_check("--kernels"))
    done.write_text(json.dumps(stack))


def _cuda_check(option: str) -> str:
    """What minitron.machine.cuda_check says with this option and the site in place."""
    command = [sys.executable, "-m", "minitron.machine.cuda_check", option]
    finished = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(SITE)}, text=True, capture_output=True)
    if finished.returncode:
        raise ValueError(f"what is in {SITE} does not go with this machine: {(finished.stderr.strip() or finished.stdout).splitlines()[-1]}")
    return finished.stdout.strip()


def _unpacked(capability: tuple[int, int]) -> Path:
    """causal-conv1d's source, cut to one architecture and to what NemotronH calls: whole, its largest file takes a compiler minutes and 3 GiB."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    (archive,) = CARRIED.glob("causal_conv1d-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(SOURCE, filter="data")
    (folder,) = SOURCE.iterdir()
    setup = folder / "setup.py"
    setup.write_text(one_architecture(setup.read_text(), capability))
    for path in (*folder.glob("csrc/*.cu"), folder / "csrc" / "causal_conv1d.cpp"):
        path.write_text(without_spare_kernels(path.read_text()))
    return folder


def without_spare_kernels(source: str) -> str:
    """One of causal-conv1d's files without float16 and without kernels of 2 and 3 taps, which are then refused: 4 of 27 variants to compile are left."""
    source = HALF_CALLED.sub("", HALF_BUILT.sub("", WIDTHS.sub("", source)))
    return source.replace(WIDTHS_ALLOWED, "width == 4")


def one_architecture(setup: str, capability: tuple[int, int]) -> str:
    """causal-conv1d's setup.py, compiling for one compute capability of those that it names. Raises ValueError for any other."""
    wanted, named = "{}{}".format(*capability), [number for _, number in GENCODE.findall(setup)]
    if wanted not in named:
        raise ValueError(f"this GPU's compute capability is {'.'.join(map(str, capability))}; causal-conv1d compiles for {', '.join(named)}")
    return GENCODE.sub(lambda pair: pair[0] if pair[2] == wanted else f"{pair[1]}pass\n", setup)


def _pip(*arguments: str | Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    if not importlib.util.find_spec("pip"):
        raise ValueError(f"{sys.executable} has no pip; it is what unpacks and compiles")
    if subprocess.run(command, env=os.environ | environment).returncode:
        raise ValueError(f"pip {arguments[0]} failed; what it said stands above")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prepare", "set-up"))
    parser.add_argument("--python", default="3.12", help="with prepare: the GPU machine's version")
    parser.add_argument("--uncompiled", action="store_true", help="with set-up: leave out causal-conv1d, to try the rest on a machine without a GPU")
    options = parser.parse_args()
    try:
        prepare(options.python) if options.what == "prepare" else set_up(compiles=not options.uncompiled)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
