"""The answer for llama.cpp: its buffers in place of the plain parts, and the longest context and largest batch by them."""

from collections.abc import Callable
from dataclasses import dataclass

from memory_budget.architecture import Architecture
from memory_budget.calculator import MemoryReport
from memory_budget.gguf_tensors import fallbacks
from memory_budget.llamacpp import DEFAULT_UBATCH, llamacpp_allotment
from memory_budget.model import Model, as_model
from memory_budget.workload import LARGEST_NUMBER, Workload

NO_LIMIT = 2**48  # tokens or sequences; a byte each is more than any memory


@dataclass(frozen=True, slots=True)
class Gguf:
    """quant: the file's type, such as Q4_K_M · kv: the caches' type · ubatch: tokens of a forward pass, for the compute buffer alone."""

    quant: str = "F16"
    kv: str = "f16"
    ubatch: int = DEFAULT_UBATCH

    def buffers(self, counted: Architecture | Model, workload: Workload) -> dict[str, int]:
        """Bytes of llama.cpp's buffers, as it logs them; the compute buffer is an estimate."""
        ubatch = workload.activation_tokens or self.ubatch
        return llamacpp_allotment(counted, context=workload.context_tokens, batch=workload.batch, ubatch=ubatch, quant=self.quant, kv_type_k=self.kv,
                                  kv_type_v=self.kv)  # fmt: skip

    def report(self, counted: Architecture | Model, workload: Workload) -> MemoryReport:
        """The buffers as parts: recurrent states in float32, the compute buffer as activations where the workload asks for them."""
        buffers = self.buffers(counted, workload)
        conv = 4 * workload.batch * sum(number * part.conv_numbers for number, part in as_model(counted).layers)
        return MemoryReport(weights=buffers["model"], kv_cache=buffers["kv"], ssm_state=buffers["recurrent"] - conv, conv_state=conv,
                            activations=buffers["compute_estimate"] if workload.activation_tokens else 0)  # fmt: skip

    def notes(self, counted: Architecture | Model) -> tuple[str, ...]:
        """Tensors that fall back to a larger type."""
        return fallbacks(counted, self.quant)


def most(fits: Callable[[int], bool]) -> int | None:
    """The largest number that fits, 0 if 1 does not; None where there is no limit. What fits must fit with less."""
    if not fits(1):
        return 0
    if fits(min(NO_LIMIT, LARGEST_NUMBER)):
        return None
    least, too_many = 1, NO_LIMIT
    while too_many - least > 1:
        middle = (least + too_many) // 2
        least, too_many = (middle, too_many) if fits(middle) else (least, middle)
    return least
