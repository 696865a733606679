"""Workload: what is served, in tokens, sequences and number formats."""

from dataclasses import dataclass
from numbers import Integral

BYTES_PER_NUMBER = {"bf16": 2, "fp16": 2, "float32": 4, "fp32": 4, "fp8": 1}
WEIGHTS_DTYPES = ("bf16", "fp16", "float32", "fp32", "fp8", "int4")
KV_DTYPES = ("bf16", "fp16", "float32", "fp32", "fp8")
SSM_DTYPES = ("float32", "fp32", "bf16", "fp16")
QUANTISED_DTYPES = ("fp8", "int4")
INT4_GROUP_NUMBERS = 128
INT4_SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Workload:
    """What the memory must hold at once.

    context_tokens: tokens of each sequence, prompt and answer together.
    batch: sequences at once.
    weights_dtype: bf16, fp16, float32 (fp32): all weights. fp8: 1 byte per number for the matrices of the layers (linear
        projections and experts); int4: 4 bits for the same matrices and a 2-byte scale per 128 inputs of each row. In
        both, everything else (embeddings, head, norms, conv1d, per-head vectors, biases, router) stays bf16.
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
        return "bf16" if self.weights_dtype in QUANTISED_DTYPES else self.weights_dtype


def check_workload(workload: Workload) -> None:
    """Refuse a workload that cannot be. Raises ValueError naming the setting, the value and the rule."""
    for name, least, unit in (("context_tokens", 1, "token"), ("batch", 1, "sequence"), ("activation_tokens", 0, "tokens")):
        value = getattr(workload, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} ({value}) must be a whole number of at least {least} {unit}")
    for name, allowed in (("weights_dtype", WEIGHTS_DTYPES), ("kv_dtype", KV_DTYPES), ("ssm_dtype", SSM_DTYPES)):
        value = getattr(workload, name)
        if value not in allowed:
            raise ValueError(f"{name} ({value}) must be one of {', '.join(allowed)}")
