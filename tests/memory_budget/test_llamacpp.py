"""llama.cpp's arithmetic against values worked out by hand and the gguf package's block sizes."""

from collections import Counter
from dataclasses import replace

import gguf
import pytest

from memory_budget.architecture import Architecture
from memory_budget.gguf_tensors import fallbacks, gguf_bytes, gguf_tensors
from memory_budget.gguf_types import BLOCKS, FILE_TYPES, Place, tensor_type
from memory_budget.llamacpp import llamacpp_allotment, llamacpp_notes
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
    assert {name: tuple(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]) for name in BLOCKS} == BLOCKS


# "CPU buffer size" of files of 8B models of Llama 3, in MiB with llama.cpp's decimals, as found in logs that people published.
LOGGED = {"Q4_0": "4437.80", "Q4_K_M": "4685.30", "Q5_K_M": "5459.93", "Q6_K": "6282.97", "Q8_0": "8137.64"}


@pytest.mark.parametrize("file_type", LOGGED)
def test_llama_3_8b_takes_what_llamacpp_logged(file_type):
    assert f"{gguf_bytes(LLAMA_3_8B, file_type) / MIB:.2f}" == LOGGED[file_type]
    tied = replace(LLAMA_3_8B, tied_embeddings=True)
    assert f"{gguf_bytes(tied, file_type) / MIB:.2f}" != LOGGED[file_type]


def test_q4_k_m_gives_more_bits_to_values_and_ffn_down_of_every_third_layer_and_both_ends():
    lifted = [0, 1, 2, 3, *range(6, 28, 3), 28, 29, 30, 31]
    for role in ("attn_v", "ffn_down"):
        assert [layer for layer, name in enumerate(types_of(LLAMA_3_8B, "Q4_K_M", role)) if name == "Q6_K"] == lifted
    assert set(types_of(LLAMA_3_8B, "Q4_K_M", "ffn_up")) == {"Q4_K"}


def test_tensors_by_type_of_qwen3_30b_a3b_as_llamacpp_logged_them():
    """ggml-org/llama.cpp issue 14235: f32 241, q4_K 289, q6_K 49 tensors, 17.28 GiB."""
    model = Model(model_type="qwen3_moe", vocab=151936, hidden=2048, tied_embeddings=False, num_layers=48, norms=97 * 2048,
                  layers=((48, Attention(hidden=2048, query_heads=32, key_value_heads=4, head_dim=128, qk_norms=256)),
                          (48, Experts(hidden=2048, experts=128, experts_per_token=8, neurons=768))))  # fmt: skip
    assert Counter(tensor.type_in("Q4_K_M") for tensor in gguf_tensors(model)) == {"Q4_K": 289, "Q6_K": 49}
    assert f"{gguf_bytes(model, 'q4_k_m') / (1 << 30):.2f}" == "17.28"
    assert f"{gguf_bytes(model, 'Q4_K_S') / (1 << 30):.2f}" != "17.28"


def test_eight_experts_lift_keys_values_and_outputs():
    found = {role: set(types_of(MIXTRAL, "Q4_K_M", role)) for role in ("attn_q", "attn_k", "attn_v", "attn_output")}
    assert found == {"attn_q": {"Q4_K"}, "attn_k": {"Q8_0"}, "attn_v": {"Q8_0"}, "attn_output": {"Q5_K"}}
    sixteen = replace(MIXTRAL, layers=(MIXTRAL.layers[0], (32, replace(MIXTRAL.layers[1][1], experts=16))))
    assert set(types_of(sixteen, "Q4_K_M", "attn_k")) == {"Q4_K"}


def test_dense_layers_come_before_the_mixtures_they_are_listed_before():
    dense = FeedForward(hidden=4096, neurons=10240)
    model = replace(MIXTRAL, layers=(MIXTRAL.layers[0], (2, dense), (30, MIXTRAL.layers[1][1])))
    assert [tensor.place.index for tensor in gguf_tensors(model) if tensor.place.role == "ffn_down" and not tensor.place.stacked] == [0, 1]


def test_a_hybrid_counts_its_ffns_among_themselves_but_out_of_all_layers(architecture_of):
    """56 layers, of which 25 are FFNs: the first eighth of 56 is 7. Rows of 15,680 numbers are no multiple of 256."""
    found = types_of(architecture_of("nemotron-nano-9b-v2"), "Q4_K_S", "ffn_down")
    assert found == ["Q5_1"] * 7 + ["Q5_0"] * 18


@pytest.mark.parametrize(("row_length", "stored"), [(512, "Q4_K"), (192, "Q5_0"), (100, "F16")])
def test_rows_that_no_block_divides_fall_back(row_length, stored):
    assert tensor_type("Q4_K_M", Place(role="ffn_up"), row_length) == stored


def test_what_falls_back_is_named():
    narrow = replace(LLAMA_3_8B, ffn=14336 + 32)
    assert [said.split(":")[0] for said in fallbacks(narrow, "Q4_K_M")] == ["16 ffn_down tensors in Q8_0", "16 ffn_down tensors in Q5_0"]
    assert not fallbacks(LLAMA_3_8B, "Q4_K_M") and not fallbacks(narrow, "Q8_0")


def test_every_file_type_is_between_its_own_type_and_f16():
    for file_type, default in FILE_TYPES.items():
        block, block_bytes = BLOCKS[default]
        total = gguf_bytes(LLAMA_3_8B, file_type, importance=True)
        assert 8_030_261_248 * block_bytes / block * 0.99 < total <= gguf_bytes(LLAMA_3_8B, "F32")


def kv_of(counted, **options) -> int:
    return llamacpp_allotment(counted, **options)["kv"]


@pytest.mark.parametrize(
    ("types", "mib"),
    [({}, 1024), ({"kv_type_k": "q8_0"}, 784), ({"kv_type_k": "q8_0", "kv_type_v": "q8_0"}, 544), ({"kv_type_k": "q4_0", "kv_type_v": "q4_0"}, 288)],
)
def test_cache_types(types, mib):
    """Llama 3 8B, 8,192 tokens: 32 layers, rows of 1,024 numbers, 32 of which take 34 bytes in q8_0 and 18 in q4_0."""
    assert kv_of(LLAMA_3_8B, context=8192, **types) == mib * MIB


def test_contexts_are_made_multiples_of_256_for_every_sequence():
    assert kv_of(LLAMA_3_8B, context=8193) == kv_of(LLAMA_3_8B, context=8448) > kv_of(LLAMA_3_8B, context=8192)
    assert kv_of(LLAMA_3_8B, context=100, batch=4) == 4 * kv_of(LLAMA_3_8B, context=256)
    assert kv_of(LLAMA_3_8B, context=100, batch=4, unified=True) == kv_of(LLAMA_3_8B, context=512)


def test_a_window_keeps_itself_and_a_forward_pass():
    """Two layers of window 512, one of all 32,768: 512 + 512 tokens, and with a ubatch of 100 the multiple of 256 above 612."""
    token = 2 * 256 * 2
    assert kv_of(WINDOWED, context=32768) == token * (32768 + 2 * 1024)
    assert kv_of(WINDOWED, context=32768, ubatch=100) == token * (32768 + 2 * 768)
    assert kv_of(WINDOWED, context=300) == token * 3 * 512
    assert kv_of(WINDOWED, context=32768, batch=2, unified=True) == token * (65536 + 2 * 1536)


def test_windows_that_llamacpp_does_not_know_keep_everything():
    mistral = replace(WINDOWED, model_type="mistral")
    assert kv_of(mistral, context=32768) == 2 * 256 * 2 * 3 * 32768 == kv_of(WINDOWED, context=32768, full_windows=True)
    assert llamacpp_notes(mistral) == ("llama.cpp keeps the whole context in the 2 layers with a window: it uses none for mistral",)
    assert llamacpp_notes(WINDOWED) == ()


def test_states_are_float32_for_every_sequence(architecture_of):
    """27 layers of 128·80·128 numbers of state and (10,240 + 2,048)·3 of the convolution."""
    architecture = architecture_of("nemotron-nano-9b-v2")
    assert llamacpp_allotment(architecture, context=1000, batch=3)["recurrent"] == 3 * 27 * 4 * (1_310_720 + 36_864)
    assert llamacpp_allotment(LLAMA_3_8B, context=1000)["recurrent"] == 0


def test_an_architecture_and_its_model_are_the_same():
    assert llamacpp_allotment(as_model(WINDOWED), context=4096, quant="Q4_0") == llamacpp_allotment(WINDOWED, context=4096, quant="Q4_0")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quant": "Q7_0"}, "GGUF type 'Q7_0' is not known"),
        ({"kv_type_k": "fp8"}, "kv_type_k .'fp8'. is not a cache type"),
        ({"kv_type_v": "q8_0", "flash_attention": False}, "kv_type_v .q8_0. is quantised"),
        ({"context": 0}, "context .0. must be at least 1"),
        ({"ubatch": 0}, "ubatch .0. must be at least 1"),
    ],
)
def test_what_llamacpp_would_refuse_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        llamacpp_allotment(LLAMA_3_8B, **({"context": 4096} | options))


def test_a_cache_types_block_must_divide_a_head():
    with pytest.raises(ValueError, match="blocks of 32, which must divide a head's 80 numbers"):
        llamacpp_allotment(replace(LLAMA_3_8B, attention_head_dim=80), context=4096, kv_type_k="q8_0")


def test_more_layers_than_llamacpp_takes_are_refused_at_once():
    endless = replace(MIXTRAL, num_layers=1 << 63, layers=tuple((1 << 63, part) for _, part in MIXTRAL.layers))
    with pytest.raises(ValueError, match="num_hidden_layers .9223372036854775808. must be at most 512 for llama.cpp"):
        llamacpp_allotment(endless, context=4096)
