"""llama.cpp's arithmetic against values worked out by hand and the gguf package's block sizes."""

from dataclasses import replace

import gguf
import pytest

from memory_budget.architecture import Architecture
from memory_budget.gguf_tensors import fallbacks, gguf_bytes, gguf_tensors
from memory_budget.gguf_types import BLOCKS, FILE_TYPES, Place, tensor_type
from memory_budget.llamacpp import llamacpp_allotment
from memory_budget.model import Model, as_model
from memory_budget.parts.attention import Attention
from memory_budget.parts.experts import Experts
from memory_budget.parts.feed_forward import FeedForward

MIB = 1 << 20
LLAMA_3_8B = Architecture(model_type="llama", pattern="*-" * 32, hidden=4096, vocab=128256, ffn=14336, ffn_gated=True, num_attention_heads=32,
                          num_key_value_heads=8, attention_head_dim=128)  # fmt: skip
MIXTRAL = Model(model_type="mixtral", vocab=32000, hidden=4096, tied_embeddings=False, num_layers=32, norms=65 * 4096,
                layers=((32, Attention(hidden=4096, query_heads=32, key_value_heads=8, head_dim=128)),
                        (32, Experts(hidden=4096, experts=8, experts_per_token=2, neurons=14336))))  # fmt: skip
WINDOWED = Architecture(model_type="gemma3_text", pattern="W-W-*-", hidden=512, vocab=1000, ffn=1024, ffn_gated=True, num_attention_heads=4,
                        num_key_value_heads=1, attention_head_dim=256, window=512, tied_embeddings=True)  # fmt: skip


def types_of(counted, file_type: str, role: str) -> list[str]:
    return [tensor.type_in(file_type) for tensor in gguf_tensors(counted) if tensor.place.role == role]


def test_blocks_are_those_of_the_gguf_package():
    assert BLOCKS == {name: tuple(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]) for name in BLOCKS}


@pytest.mark.parametrize(
    ("file_type", "file_bytes"),
    [("Q4_K_M", 4_920_734_272), ("Q8_0", 8_540_770_880), ("Q6_K", 6_596_006_464), ("Q5_K_M", 5_732_987_456), ("Q4_0", 4_661_211_712)],
)
def test_llama_3_8b_is_as_long_as_its_published_files_but_for_their_headers(file_type, file_bytes):
    """bartowski/Meta-Llama-3-8B-Instruct-GGUF on the Hub; a header with 128,256 tokens and their merges is 7.8 MB."""
    assert 0 < file_bytes - gguf_bytes(LLAMA_3_8B, file_type) < 8 * MIB
