"""Budget: the bytes a device leaves for a model."""

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches

from memory_budget.calculator import MemoryReport
from memory_budget.units import GIB

MOST_GIB = 2.0**33  # 2**63 bytes


@dataclass(frozen=True, slots=True)
class Budget:
    """A device's usable memory less a cushion for the serving framework and less what is set aside for other things.

    device_gib: usable GiB, as CUDA reports them · cushion_fraction: share of them left free, 0 to below 1 ·
    set_aside_gib: GiB for other models.
    Raises ValueError where a number is out of range or nothing is left.
    """

    name: str
    device_gib: float
    cushion_fraction: float = 0.0
    set_aside_gib: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.device_gib <= MOST_GIB:
            raise ValueError(f"device_gib ({self.device_gib}) of budget {self.name} must be a number of GiB above 0, and at most 2**33")
        if not 0 <= self.cushion_fraction < 1:
            raise ValueError(f"cushion_fraction ({self.cushion_fraction}) of budget {self.name} must be at least 0 and below 1")
        if not 0 <= self.set_aside_gib <= MOST_GIB:
            raise ValueError(f"set_aside_gib ({self.set_aside_gib}) of budget {self.name} must be at least 0 GiB")
        if self.bytes < 1:
            raise ValueError(
                f"set_aside_gib ({self.set_aside_gib}) of budget {self.name} must leave memory free; the device has {self.device_gib} GiB"
            )

    @property
    def bytes(self) -> int:
        """floor((device·(1 − cushion) − set aside)·2**30)."""
        return math.floor((self.device_gib * (1 - self.cushion_fraction) - self.set_aside_gib) * GIB)


# a10g is the published job (N2): 5 % for the serving framework, 1.3 GiB for a vision encoder -> 19.657 GiB.
# The other cards' usable GiB are the "total capacity" of PyTorch's out-of-memory messages (ECC and the driver's share
# are gone by then; a figure may differ by 0.3 GiB between drivers): t4 AlphaGPU/leetgpu-challenges issue 52, l4 ArcInstitute/evo2 issue 190,
# rtx3090 GaoLii/DSP issue 10, rtx4090 ali-vilab/VGen issue 104, rtx5090 TrajectoryCrafter/TrajectoryCrafter issue 20, a100-40 TianheWu/CoSeR issue 10,
# l40s stepfun-ai/Step-Video-T2V issue 8, a100-80 HiDream-ai/VAREdit issue 6, h100-80 vllm issue 27508, h200 vllm issue 34553, b200 (its driver's "total
# global memory") pytorch/ao pull 4002, mi300x ROCm/rocm-blogs, "INT4 Quantization on AMD GPUs with GPTQModel" (newer ROCm says 191.69).
# Of Apple's unified memory Metal lets a process use recommendedMaxWorkingSetSize, as macOS sets it unless iogpu.wired_limit_mb says more. Measured: mac-16
# (74 %) AlexsJones/llmfit pull 754, mac-24 (74 %) sglang pull 29949, mac-32 (67 %) llama.cpp pull 2011, mac-64 (75 %) llama.cpp issue 1870, mac-96 (75 %)
# llama.cpp issue 3213, mac-128 (84 %) antirez/ds4 pull 893. Those of 32, 64 and 96 are of 2023; later macOS may allow more.
PRESETS = {
    budget.name: budget
    for budget in (
        Budget("a10g", 22.06, cushion_fraction=0.05, set_aside_gib=1.3),
        Budget("t4", 14.56, cushion_fraction=0.05),
        Budget("l4", 22.03, cushion_fraction=0.05),
        Budget("rtx3090", 23.70, cushion_fraction=0.05),
        Budget("rtx4090", 23.64, cushion_fraction=0.05),
        Budget("rtx5090", 31.36, cushion_fraction=0.05),
        Budget("a100-40", 39.50, cushion_fraction=0.05),
        Budget("l40s", 44.42, cushion_fraction=0.05),
        Budget("a100-80", 79.25, cushion_fraction=0.05),
        Budget("h100-80", 79.11, cushion_fraction=0.05),
        Budget("h200", 139.81, cushion_fraction=0.05),
        Budget("b200", 178.35, cushion_fraction=0.05),
        Budget("mi300x", 191.98, cushion_fraction=0.05),
        Budget("mac-16", 11.84, cushion_fraction=0.05),
        Budget("mac-24", 17.76, cushion_fraction=0.05),
        Budget("mac-32", 21.33, cushion_fraction=0.05),
        Budget("mac-64", 48.00, cushion_fraction=0.05),
        Budget("mac-96", 72.00, cushion_fraction=0.05),
        Budget("mac-128", 107.52, cushion_fraction=0.05),
    )
}


# What people call a card whose number alone would be read as GiB.
CARD_NUMBERS = {"3090": ("rtx3090",), "4090": ("rtx4090",), "5090": ("rtx5090",)}


def parse_budget(text: str | float) -> Budget:
    """A preset by its name, or a number of GiB without cushion, as vendors count a card's GB too: 24, 24GiB, 24gb. Raises ValueError listing the presets."""
    word = str(text).strip().lower()
    if word in PRESETS:
        return PRESETS[word]
    number = re.sub(r"(?<=[\d.])\s*(gib|gb|g)$", "", word)
    try:
        gib = float(number)
    except ValueError:
        gib = math.nan
    if not 0 < gib <= MOST_GIB or word in CARD_NUMBERS:
        near = [name for name in PRESETS if word and name.startswith(word)] or get_close_matches(word, PRESETS, n=1) or CARD_NUMBERS.get(word, ())
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"budget ({str(text)[:40]}) must be a number of GiB above 0 or one of {', '.join(PRESETS)}{meant}")
    return Budget(f"{number} GiB", gib)


def fits(report: MemoryReport, budget: Budget) -> bool:
    """Whether the report's total is within the budget; an array of them for a report of arrays."""
    return report.total <= budget.bytes
