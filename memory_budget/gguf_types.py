"""GGUF's number types, and which of them llama.cpp's quantiser gives each tensor.

Block sizes: ggml/src/ggml-common.h. Rules: src/llama-quant.cpp of ggml-org/llama.cpp (`llama_tensor_get_type_impl`, `tensor_type_fallback`,
`llama_ftype_get_default_type`), as in llama-cpp-python 0.3.36; tests/memory_budget/test_llamacpp_engine.py holds them to what its quantiser writes.
"""

from dataclasses import dataclass

# name: numbers of a block, bytes of a block
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "IQ4_NL": (32, 18), "MXFP4": (32, 17),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110),
    "IQ4_XS": (256, 136),
}  # fmt: skip

# What a file is called by (llama-quantize's argument): the type of its tensors, where no rule below says another.
FILE_TYPES = {
    **{name: name for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q6_K")},
    "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K",
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS", "MXFP4_MOE": "MXFP4",
}  # fmt: skip
PLAIN = ("F32", "F16", "BF16")
CACHE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1")  # common/arg.cpp, kv_cache_types

# What a row takes whose length the type's block does not divide.
FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
SMALLEST_FILES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")  # their rules are of their own; llama-quantize needs an importance matrix

ROLES = ("output", "token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What the rules look at of a tensor and its model.

    role: one of ROLES; fused q, k and v are attn_v · index, of: which of how many, counted as llama.cpp does: values among themselves, an FFN's tensors
    among themselves but out of all layers; in a mixture of experts an FFN's index is its layer · nth: its number among themselves there too · stacked: the
    experts' matrices of a layer in one tensor · tied: token_embd is the output too · queries_per_key: of the first layer, 0 where that has no attention ·
    experts: of a layer, 0 without · is_70b: a type of 80 layers that llama.cpp calls so · importance: an importance matrix is used.
    """

    role: str
    index: int = 0
    nth: int = 0
    of: int = 1
    stacked: bool = False
    tied: bool = False
    queries_per_key: int = 1
    experts: int = 0
    is_70b: bool = False
    importance: bool = False

    @property
    def more_bits(self) -> bool:
        """The first and the last eighth, and every third between."""
        eighth = self.of // 8
        return self.index < eighth or self.index >= 7 * self.of // 8 or (self.index - eighth) % 3 == 2

    @property
    def first_eighth(self) -> bool:
        return self.index < self.of // 8


def row_bytes(type_name: str, numbers: int) -> int:
    """Bytes of a row. Raises ValueError where the type's block does not divide it."""
    block_numbers, block_bytes = BLOCKS[type_name]
    if numbers % block_numbers:
        raise ValueError(f"row length ({numbers}) must be a multiple of {block_numbers} for {type_name}")
    return numbers // block_numbers * block_bytes


def check_file_type(name: str) -> str:
    """The name as FILE_TYPES has it, whatever its case. Raises ValueError for others."""
    known = name.upper()
    if known not in FILE_TYPES:
        raise ValueError(f"GGUF type {name!r} is not known; known: {', '.join(FILE_TYPES)}")
    return known


def check_cache_type(name: str, setting: str) -> str:
    """The name as CACHE_TYPES has it, whatever its case. Raises ValueError for others."""
    known = name.upper()
    if known not in CACHE_TYPES:
        raise ValueError(f"{setting} ({name!r}) is not a cache type of llama.cpp; known: {', '.join(CACHE_TYPES).lower()}")
    return known


def tensor_type(file_type: str, place: Place, row_length: int) -> str:
    """The type that a matrix is stored in, with rows of that many numbers: the one its place asks for, or the one that its rows fall back to."""
    wanted = wanted_type(file_type, place, row_length)
    if row_length % BLOCKS[wanted][0] == 0:
        return wanted
    fallback = FALLBACKS.get(wanted, wanted)
    return fallback if row_length % BLOCKS[fallback][0] == 0 else "F16"


def wanted_type(file_type: str, place: Place, row_length: int) -> str:
    """The type that the rules ask for, before a look at the rows of all but the output, for which the rules look themselves."""
    default = FILE_TYPES[file_type]
    if default in PLAIN:
        return default
    if place.role == "output" or (place.tied and place.role == "token_embd"):
        return _output(file_type, default, row_length)
    if file_type == "MXFP4_MOE":
        return "MXFP4" if place.stacked else "Q8_0"
    if place.role == "token_embd":
        return _token_embd(file_type, default)
    if file_type in SMALLEST_FILES:
        return _smallest(file_type, place, default)
    if place.role == "attn_v":
        return _values(file_type, place, default)
    if place.role in ("attn_q", "attn_k"):
        return _queries_and_keys(file_type, place, default)
    if place.role == "attn_output":
        return _attention_output(file_type, place, default)
    if place.role == "ffn_down":
        return _ffn_down(file_type, place, default)
    if place.role in ("ffn_gate", "ffn_up") and file_type == "IQ3_XS" and place.of // 8 <= place.index < 7 * place.of // 8:
        return "IQ3_XXS"
    return default


def _output(file_type: str, default: str, row_length: int) -> str:
    if file_type == "MXFP4_MOE" or row_length % BLOCKS[default][0]:
        return "Q8_0"
    if file_type in SMALLEST_FILES or file_type == "IQ3_XXS":
        return "Q5_K"
    return default if default == "Q8_0" else "Q6_K"


def _token_embd(file_type: str, default: str) -> str:
    if file_type in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
        return "IQ3_S"
    return "Q2_K" if file_type in SMALLEST_FILES else default


def _smallest(file_type: str, place: Place, default: str) -> str:
    better = "IQ3_S" if file_type in ("IQ2_S", "IQ2_M") else "Q2_K"
    if place.role == "attn_v":
        return "Q4_K" if place.queries_per_key >= 4 or place.experts >= 4 else better
    if place.role == "attn_k" and place.experts == 8:
        return "Q4_K"
    if place.role == "ffn_down" and place.nth < place.of // 8:
        return better
    if place.role == "attn_output":
        if place.experts == 8:
            return "Q5_K"
        return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(file_type, default)
    return default


def _values(file_type: str, place: Place, default: str) -> str:
    grouped = place.queries_per_key >= 4
    chosen = {
        "Q2_K": "Q4_K" if grouped else "Q3_K",
        "Q2_K_S": "Q4_K" if grouped else default,
        "IQ3_XXS": "Q4_K" if grouped else "IQ3_XXS" if place.importance else "IQ3_S",
        "IQ3_XS": "Q4_K" if grouped else default,
        "IQ3_S": "Q4_K" if grouped else default,
        "IQ3_M": "Q4_K",
        "IQ4_NL": "Q5_K" if grouped else default,
        "IQ4_XS": "Q5_K" if grouped else default,
        "Q3_K_M": "Q5_K" if place.index < 2 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "Q4_K_S": "Q5_K" if place.index < 4 else default,
        "Q4_K_M": "Q6_K" if place.more_bits else default,
        "Q5_K_M": "Q6_K" if place.more_bits else default,
    }.get(file_type, default)
    if place.experts == 8:
        return "Q8_0"
    return "Q5_K" if place.is_70b and chosen in ("Q3_K", "Q4_K") else chosen


def _queries_and_keys(file_type: str, place: Place, default: str) -> str:
    if place.role == "attn_k" and place.experts == 8:
        return "Q8_0"
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(file_type, default)


def _attention_output(file_type: str, place: Place, default: str) -> str:
    if place.experts == 8:
        lifted = ("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS")
        return "Q5_K" if file_type in lifted else default
    return {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(file_type, default)


def _ffn_down(file_type: str, place: Place, default: str) -> str:
    first, plain = place.first_eighth, not place.importance
    return {
        "Q2_K": "Q3_K",
        "Q2_K_S": "Q4_K" if first else default,
        "IQ3_XXS": default if place.importance else "Q4_K" if first else "Q3_K",
        "IQ3_M": "Q4_K" if first or (place.experts == 8 and place.more_bits) else default,
        "IQ4_NL": "Q5_K" if first and plain else default,
        "IQ4_XS": "Q5_K" if first and plain else default,
        "Q3_K_M": "Q5_K" if place.index < place.of // 16 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "Q4_K_S": "Q5_K" if first else default,
        "Q4_K_M": "Q6_K" if place.more_bits else default,
        "Q5_K_M": "Q6_K" if place.more_bits else default,
        "Q4_0": default if plain or not first else "Q4_1",
        "Q5_0": default if plain or not first else "Q5_1",
    }.get(file_type, default)
