"""What a GPU needs before work on it begins: bf16, and Mamba-2's fused kernels, which must import and give the right numbers.

transformers takes its slow reference instead, without a word, where a kernel package cannot be imported for whatever reason.
"""

import importlib
import importlib.metadata

import torch

from minitron.mamba import ssd

LEAST_CAPABILITY = (8, 0)  # Ampere, the first with bf16
KERNELS = (
    ("mamba-ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
    ("causal-conv1d", "causal_conv1d", "causal_conv1d_fn"),
)  # fmt: skip
TOKENS, CHUNK = 192, 128  # of the check: a chunk and a half
TOLERANCE = 0.02  # of bf16 results, which are rounded to 0.004


def check_gpu(device: torch.device) -> None:
    """Raises ValueError, one line, for a GPU without bf16 and for a kernel package that is missing or fails, with its version."""
    check_bf16(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    check_kernels(device)


def check_bf16(name: str, capability: tuple[int, int]) -> None:
    """Raises ValueError where a CUDA device of this compute capability computes no bf16."""
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        raise ValueError(f"device {name} has compute capability {found}; bf16 needs at least {least}")


def check_kernels(device: torch.device) -> None:
    """Import every kernel and compare the two that a model calls with the scan in plain torch. Raises ValueError naming package and version."""
    if told := unusable_kernel():
        raise ValueError(told)
    check_numbers(device, {package: importlib.metadata.version(package) for package, _, _ in KERNELS})


def unusable_kernel() -> str | None:
    """What is wrong with the first kernel package that is missing or cannot be imported, with its version; None where all can."""
    for package, module, function in KERNELS:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed; a GPU needs it: make install-cuda (docs/gpu.md)"
        try:
            getattr(importlib.import_module(module), function)
        except Exception as error:  # compiled for another torch, a transformers it does not know: anything can come
            return f"{package} {version} cannot be used: {_line(error)}"
    return None


def check_numbers(device: torch.device, versions: dict[str, str]) -> None:
    """Raises ValueError where scan or convolution, as a model calls them, fail or differ from the sequential definition; versions by package.

    Channels of a head, states and chunk are Nemotron Nano 2's, so that what Triton compiles and tunes here serves its layers too.
    """
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    random = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(shape, generator=random) for shape in ((1, TOKENS, 8, 80), (1, TOKENS, 2, 128), (1, TOKENS, 2, 128)))
    dt, A, D = torch.rand(1, TOKENS, 8, generator=random), -torch.rand(8, generator=random) - 0.1, torch.randn(8, generator=random)
    rows, weight, bias = torch.randn(1, 64, TOKENS, generator=random), torch.randn(64, 4, generator=random), torch.randn(64, generator=random)
    padded = torch.nn.functional.pad(rows, (3, 0))
    convolved = bias[:, None] + sum(padded[..., tap : tap + TOKENS] * weight[:, tap, None] for tap in range(4))
    expected = {"mamba-ssm": ssd.scan(x, dt, A, B, C, D)[0], "causal-conv1d": torch.nn.functional.silu(convolved)}
    half = [tensor.to(device, torch.bfloat16) for tensor in (x, B, C, rows, weight, bias)]
    calls = {
        "mamba-ssm": lambda: modeling.mamba2_chunk_scan(half[0], dt.to(device), A.to(device), half[1], half[2], chunk_size=CHUNK, D=D.to(device)),
        "causal-conv1d": lambda: modeling.causal_conv1d_fn(half[3], half[4], half[5], activation="silu"),
    }
    for package, call in calls.items():
        try:
            found = call().float().cpu()
        except Exception as error:  # a Triton or CUDA error of any kind
            raise ValueError(f"{package} {versions[package]} fails on {device}: {_line(error)}") from None
        difference = ((found - expected[package]).norm() / expected[package].norm()).item()
        if not difference < TOLERANCE:
            raise ValueError(f"{package} {versions[package]} differs from the definition by {difference:.1%} on {device}; at most {TOLERANCE:.0%} is rounding")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
