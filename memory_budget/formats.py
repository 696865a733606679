"""Number formats of weights: what each packs of a matrix, and into how many bytes.

A name may say more: `int4-g64` packs in groups of 64; `mxfp4-moe` packs the matrices of the mixtures of experts alone (kinds as in parameters_by_kind).

    fp8     a byte a number; fp8-g128 also a float32 scale for each block of 128 × 128 (DeepSeek's, `weight_block_size`)
    int8    a byte a number and a 2-byte scale a row, as compressed-tensors' strategy "channel"
    int4    4 bits a number and a 2-byte scale for each group of a row (groups of 128 unless said); a last, shorter group counts as one
    mxfp4   4 bits a number and a 1-byte scale for each block of 32 (OCP Microscaling Formats 1.0)
    nvfp4   4 bits a number, a 1-byte (fp8) scale for each block of 16 and a float32 one for the tensor (NVIDIA's TensorRT Model Optimizer)

mxfp4 and nvfp4 have no short blocks: a matrix whose rows they do not divide stays bf16.
"""

import re
from dataclasses import dataclass

BYTES_PER_NUMBER = {"bf16": 2, "fp16": 2, "float32": 4, "fp32": 4, "fp8": 1}
QUANTISED_DTYPES = ("fp8", "int4", "int8", "mxfp4", "nvfp4")
WEIGHTS_DTYPES = ("bf16", "fp16", "float32", "fp32", *QUANTISED_DTYPES)
GROUPS = {"int4": 128, "mxfp4": 32, "nvfp4": 16}
CHOOSABLE_GROUPS = ("fp8", "int4")
SCALE_BYTES = {"int8": 2, "int4": 2, "mxfp4": 1, "nvfp4": 1}
PACKED_KINDS = ("attention", "mamba", "ffn", "moe", "other")
LARGEST_GROUP = 2**16


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """dtype: one of WEIGHTS_DTYPES · group: numbers that share a scale (0: none such) · kinds: whose matrices are packed (empty: all)."""

    dtype: str
    group: int = 0
    kinds: tuple[str, ...] = ()

    @property
    def is_packed(self) -> bool:
        return self.dtype in QUANTISED_DTYPES

    def packs(self, kind: str) -> bool:
        """Whether matrices of that kind are packed."""
        return self.is_packed and (not self.kinds or kind in self.kinds)

    def matrix_bytes(self, copies: int, outputs: int, inputs: int) -> int:
        """Bytes of so many matrices of outputs × inputs numbers. Integers, or arrays of them."""
        if self.dtype == "fp8":
            blocks = (_groups(outputs, self.group) * _groups(inputs, self.group)) if self.group else 0
            return copies * (outputs * inputs + 4 * blocks)
        if self.dtype == "int8":
            return copies * outputs * (inputs + SCALE_BYTES["int8"] * (inputs > 0))
        row = (inputs + 1) // 2 + _groups(inputs, self.group) * SCALE_BYTES[self.dtype]
        if self.dtype == "int4":
            return copies * outputs * row
        tensor = 4 * (outputs * inputs > 0) if self.dtype == "nvfp4" else 0
        fits = (inputs % self.group == 0) * 1
        return copies * (fits * (outputs * row + tensor) + (1 - fits) * outputs * inputs * BYTES_PER_NUMBER["bf16"])

    def describe(self) -> str:
        """For people: what is packed, and with which scales."""
        if not self.is_packed:
            return self.dtype
        whose = " and ".join(_KIND_WORDS[kind] for kind in self.kinds) if self.kinds else "layers'"
        scales = {"fp8": f" with a 4-byte scale per {self.group} x {self.group}" if self.group else "", "int8": " with a 2-byte scale per row"}
        with_scales = scales.get(self.dtype, f" with a {SCALE_BYTES.get(self.dtype)}-byte scale per {self.group}")
        return f"{whose} matrices {self.dtype}{with_scales}, the rest bf16"


_KIND_WORDS = {"attention": "attention's", "mamba": "Mamba's", "ffn": "FFNs'", "moe": "experts'", "other": "all layers'"}


def parse_format(text: str) -> WeightFormat:
    """`NAME`, `NAME-gGROUP`, `NAME-KIND…`. Raises ValueError listing what there is."""
    name, *further = text.split("-") if isinstance(text, str) else (text,)
    if name not in WEIGHTS_DTYPES:
        raise ValueError(f"weights_dtype ({str(text)[:80]}) must be one of {', '.join(WEIGHTS_DTYPES)}")
    group, kinds = GROUPS.get(name, 0), []
    for word in further:
        if name in CHOOSABLE_GROUPS and (number := re.fullmatch(r"g([1-9]\d{0,4})", word)) and int(number[1]) <= LARGEST_GROUP:
            group = int(number[1])
        elif name in QUANTISED_DTYPES and word in PACKED_KINDS:
            kinds.append(word)
        else:
            raise ValueError(f"weights_dtype ({text[:80]}): after {name} may stand gN, a group of N numbers (of {' and '.join(CHOOSABLE_GROUPS)}), "
                             f"and of a packed format whose matrices alone it packs: {', '.join(PACKED_KINDS)}; not {word}")  # fmt: skip
    return WeightFormat(name, group, tuple(kinds))


def _groups(numbers: int, group: int) -> int:
    return (numbers + group - 1) // group
