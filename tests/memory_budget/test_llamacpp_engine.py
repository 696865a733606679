"""make llamacpp-check: what llama.cpp logs of its buffers and writes as types is what memory_budget says; LLAMACPP_PYTHON names the interpreter that has
llama-cpp-python. Prints what it measures."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest

from memory_budget.architecture import Architecture
from memory_budget.gguf_tensors import gguf_bytes, gguf_tensors
from memory_budget.gguf_types import BLOCKS, CACHE_TYPES, FILE_TYPES
from memory_budget.llamacpp import llamacpp_allotment
from tests.memory_budget.gguf_files import write_gguf
from tests.memory_budget.llamacpp_asked import LLAMACPP_PYTHON, MIB, WHOLE, chosen_types, logged, same, started_engine

pytestmark = [pytest.mark.llamacpp, pytest.mark.skipif(LLAMACPP_PYTHON is None, reason="no llama.cpp: make llamacpp-check")]

COMPUTE_TOLERANCE = 0.10

ATTENTION = {"num_attention_heads": 8, "num_key_value_heads": 2, "attention_head_dim": 64}
MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 64, "mamba_num_groups": 2, "mamba_state_size": 128, "mamba_conv_kernel": 4}
TINY = {
    "llama": Architecture(model_type="llama", pattern="*-" * 9, hidden=256, vocab=2048, ffn=768, ffn_gated=True, **ATTENTION),
    "qwen3": Architecture(model_type="qwen3", pattern="*-" * 4, hidden=256, vocab=2048, ffn=512, ffn_gated=True, attention_qk_norm=True, tied_embeddings=True,
                          **ATTENTION),
    "gemma3_text": Architecture(model_type="gemma3_text", pattern="W-" * 5 + "*-W-", hidden=192, vocab=4096, ffn=512, ffn_gated=True, window=512,
                                tied_embeddings=True, post_norms=True, attention_qk_norm=True, **ATTENTION),
    "nemotron_h": Architecture(model_type="nemotron_h", pattern="M-M-M*-M-", hidden=256, vocab=2048, ffn=768, **ATTENTION, **MAMBA),
    "nemotron_h_moe": Architecture(model_type="nemotron_h", pattern="MEM*EMEME", hidden=256, vocab=2048, moe_num_experts=8, moe_ffn=320, moe_shared_ffn=512,
                                   moe_experts_per_token=3, **ATTENTION, **MAMBA),
    "mamba2": Architecture(model_type="mamba2", pattern="MMMM", hidden=160, vocab=1024, tied_embeddings=True, **MAMBA),
}  # fmt: skip
# As many layers and numbers as published models have; their files are empty, so that nothing is allotted, but sizes are told.
LARGE = {
    "Llama 3 8B": Architecture(model_type="llama", pattern="*-" * 32, hidden=4096, vocab=128256, ffn=14336, ffn_gated=True, num_attention_heads=32,
                               num_key_value_heads=8, attention_head_dim=128),
    "Llama 2 70B": Architecture(model_type="llama", pattern="*-" * 80, hidden=8192, vocab=32000, ffn=28672, ffn_gated=True, num_attention_heads=64,
                                num_key_value_heads=8, attention_head_dim=128),
    "Gemma 3 1B": Architecture(model_type="gemma3_text", pattern=("W-" * 5 + "*-") * 4 + "W-W-", hidden=1152, vocab=262144, ffn=6912, ffn_gated=True,
                               window=512, num_attention_heads=4, num_key_value_heads=1, attention_head_dim=256, tied_embeddings=True, post_norms=True,
                               attention_qk_norm=True),
    "Nemotron Nano 9B v2": Architecture(model_type="nemotron_h", pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", hidden=4480, vocab=131072,
                                        ffn=15680, num_attention_heads=40, num_key_value_heads=8, attention_head_dim=128, mamba_num_heads=128,
                                        mamba_head_dim=80, mamba_num_groups=8, mamba_state_size=128, mamba_conv_kernel=4),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Iterator[Callable[..., dict]]:
    with started_engine() as ask:
        yield ask


@pytest.fixture(scope="module")
def file_of(tmp_path_factory) -> Callable[..., Path]:
    """A GGUF of an architecture, written once for each."""
    folder, written = tmp_path_factory.mktemp("ggufs"), {}

    def write(architecture: Architecture, **options) -> Path:
        key = architecture, *options.items()
        if key not in written:
            written[key] = folder / f"{len(written)}.gguf"
            write_gguf(written[key], architecture, **options)
        return written[key]

    return write


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", TINY)
def test_model_cache_and_states_are_what_llamacpp_logs(kind, batch, engine, file_of):
    architecture, context = TINY[kind], 8000
    answer = engine(path=str(file_of(architecture)), context={"n_ctx": context * batch, "n_seq_max": batch, "swa_full": False}, model=WHOLE)
    ours = llamacpp_allotment(architecture, context=context, batch=batch, quant="F32")
    other = llamacpp_allotment(architecture, context=context + 256, batch=batch + 1, quant="F16")
    print(f"\n{kind}, {batch} at once: ", *(f"{name} {logged(answer, name)} MiB" for name in ("model", "KV", "RS", "compute")), ours)
    assert ours["model"] == answer["model_bytes"] != other["model"]
    for name, buffer in (("model", "model"), ("kv", "KV"), ("recurrent", "RS")):
        assert same(ours[name], answer, buffer), name
        assert not ours[name] or not same(other[name], answer, buffer), name
    assert ours["compute_estimate"] / MIB == pytest.approx(logged(answer, "compute"), rel=COMPUTE_TOLERANCE)


@pytest.mark.parametrize(("type_k", "type_v"), [("Q8_0", "Q8_0"), ("Q4_0", "F16"), ("BF16", "Q5_1"), ("F32", "IQ4_NL")])
def test_caches_of_other_types_are_what_llamacpp_logs(type_k, type_v, engine, file_of):
    types = {"type_k": gguf.GGMLQuantizationType[type_k].value, "type_v": gguf.GGMLQuantizationType[type_v].value}
    assert {type_k, type_v} <= set(CACHE_TYPES)
    for kind in ("llama", "gemma3_text"):
        answer = engine(path=str(file_of(TINY[kind])), context={"n_ctx": 20_000, "n_ubatch": 100, "swa_full": False, **types}, model=WHOLE)
        options = {"context": 20_000, "ubatch": 100, "kv_type_k": type_k, "kv_type_v": type_v}
        assert same(llamacpp_allotment(TINY[kind], **options)["kv"], answer, "KV")
        assert not same(llamacpp_allotment(TINY[kind], **options | {"kv_type_v": "Q4_1"})["kv"], answer, "KV")


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("kind", [*TINY, *LARGE])
def test_types_are_those_that_llamacpps_quantiser_chooses(kind, importance, engine, file_of):
    """For every type of file; rows of many lengths, some of which no block divides."""
    architecture, told = (TINY | LARGE)[kind], {}
    source = file_of(architecture, empty=True)
    f32_bytes = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(source).tensors)
    for file_type in FILE_TYPES:
        told[file_type] = chosen_types(engine, source, file_type, importance=importance)
        tensors = list(gguf_tensors(architecture, importance=importance)) if file_type != "F32" else []
        assert Counter((tensor.row_length, tensor.rows, tensor.type_in(file_type)) for tensor in tensors) == told[file_type], file_type
        block = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in BLOCKS}
        saved = sum(rows * length * 4 - rows * length // block[name][0] * block[name][1] for length, rows, name in told[file_type].elements())
        assert gguf_bytes(architecture, file_type, importance=importance) == f32_bytes - saved, file_type
    assert told["Q4_K_M"] != told["Q4_0"] or kind == "mamba2"


@pytest.mark.parametrize("options", [{}, {"context": 32768}, {"context": 32768, "flash_attention": False}, {"ubatch": 100}, {"batch": 4}], ids=str)
@pytest.mark.parametrize("kind", LARGE)
def test_the_estimate_of_the_compute_buffer_of_published_sizes(kind, options, engine, file_of):
    options = {"context": 4096, "batch": 1, "ubatch": 512, "flash_attention": True} | options
    asked = {"n_ctx": options["context"] * options["batch"], "n_seq_max": options["batch"], "n_ubatch": options["ubatch"], "swa_full": False,
             "flash_attn_type": int(options["flash_attention"])}  # fmt: skip
    answer = engine(path=str(file_of(LARGE[kind], empty=True)), context=asked, model={**WHOLE, "no_alloc": True})
    estimate = llamacpp_allotment(LARGE[kind], **options)["compute_estimate"] / MIB
    print(f"\n{kind} {options}: logged {logged(answer, 'compute')} MiB, estimated {estimate:.2f} MiB")
    assert estimate == pytest.approx(logged(answer, "compute"), rel=COMPUTE_TOLERANCE)
