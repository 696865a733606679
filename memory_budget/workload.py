"""Workload: what is served, in tokens, sequences and number formats."""

from dataclasses import dataclass
from numbers import Integral

from memory_budget.formats import BYTES_PER_NUMBER, WEIGHTS_DTYPES, parse_format

__all__ = ["BYTES_PER_NUMBER", "KV_DTYPES", "LARGEST_NUMBER", "SSM_DTYPES", "WEIGHTS_DTYPES", "Workload", "check_workload"]

KV_DTYPES = ("bf16", "fp16", "float32", "fp32", "fp8")
SSM_DTYPES = ("float32", "fp32", "bf16", "fp16")
LARGEST_NUMBER = 2**53  # of tokens and sequences: a float holds it, and so what is worked out of a few such


@dataclass(frozen=True, slots=True)
class Workload:
    """What the memory must hold at once.

    context_tokens: tokens of each sequence, prompt and answer together.
    batch: sequences at once.
    weights_dtype: bf16, fp16, float32 (fp32): all weights. fp8: 1 byte per number for the matrices of the layers (linear
        projections and experts); int8, int4, mxfp4, nvfp4 pack the same matrices, with scales: `formats`, which also says what may stand
        behind a name. In all, everything else (embeddings, head, norms, conv1d, per-head vectors, biases, router) stays bf16.
    kv_dtype, ssm_dtype: number formats of the attention cache and of Mamba's SSM state. float32 is what the published
        student is served with: accuracy drops without it (N2).
    activation_tokens: tokens of one prefill chunk whose activations must fit too; 0 leaves activations out.

    Raises ValueError, naming the setting, its value and the rule.
    """

    context_tokens: int = 131072
    batch: int = 1
    weights_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    ssm_dtype: str = "float32"
    activation_tokens: int = 0

    def __post_init__(self) -> None:
        check_workload(self)

    @property
    def compute_dtype(self) -> str:
        """Number format of activations and of the convolution's state: the weights', or bf16 where they are quantised."""
        return "bf16" if parse_format(self.weights_dtype).is_packed else self.weights_dtype


def check_workload(workload: Workload) -> None:
    """Refuse a workload that cannot be. Raises ValueError naming the setting, the value and the rule."""
    for name, least, unit in (("context_tokens", 1, "token"), ("batch", 1, "sequence"), ("activation_tokens", 0, "tokens")):
        value = getattr(workload, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} ({value}) must be a whole number of at least {least} {unit}")
        if value > LARGEST_NUMBER:
            raise ValueError(f"{name} ({str(value)[:40]}) must be at most 2**53")
    parse_format(workload.weights_dtype)
    for name, allowed in (("kv_dtype", KV_DTYPES), ("ssm_dtype", SSM_DTYPES)):
        value = getattr(workload, name)
        if value not in allowed:
            raise ValueError(f"{name} ({value}) must be one of {', '.join(allowed)}")
