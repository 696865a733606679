"""make llamacpp-check for mixers that no architecture of the search has: latent attention, gated delta nets, Mamba-1, short convolutions, mixtures of gated
experts. Tensors are those that llama.cpp asks of each type (its src/models), of 256 hidden channels."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from memory_budget.gguf_tensors import gguf_tensors
from memory_budget.gguf_types import FILE_TYPES
from memory_budget.llamacpp import llamacpp_allotment
from memory_budget.model import Model
from memory_budget.parts.attention import Attention
from memory_budget.parts.experts import Experts
from memory_budget.parts.feed_forward import FeedForward
from memory_budget.parts.mamba2 import Mamba2
from memory_budget.parts.part import Part
from tests.memory_budget.gguf_files import write_empty
from tests.memory_budget.llamacpp_asked import LLAMACPP_PYTHON, MIB, WHOLE, chosen_types, logged, same, started_engine

latent = pytest.importorskip("memory_budget.parts.latent")
delta = pytest.importorskip("memory_budget.parts.delta")
mamba1 = pytest.importorskip("memory_budget.parts.mamba1")
short_conv = pytest.importorskip("memory_budget.parts.short_conv")

pytestmark = [pytest.mark.llamacpp, pytest.mark.skipif(LLAMACPP_PYTHON is None, reason="no llama.cpp: make llamacpp-check")]

COMPUTE_TOLERANCE = 0.10
HIDDEN, VOCAB = 256, 2048
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Kind:
    """A type as GGUF has it (`name`, `metadata`, the tensors of each layer) and as a model of parts."""

    name: str
    model_type: str
    layers: list[Shapes]
    parts: tuple[tuple[int, Part], ...]
    metadata: dict[str, int | float | list[int]] = field(default_factory=dict)
    tied: bool = False
    last_norm: str = "output_norm.weight"

    @property
    def tensors(self) -> Shapes:
        tensors = {"token_embd.weight": (VOCAB, HIDDEN), self.last_norm: (HIDDEN,)}
        if not self.tied:
            tensors["output.weight"] = (VOCAB, HIDDEN)
        return tensors | {f"blk.{number}.{name}": shape for number, layer in enumerate(self.layers) for name, shape in layer.items()}

    @property
    def model(self) -> Model:
        layers = len(self.layers)
        return Model(model_type=self.model_type, vocab=VOCAB, hidden=HIDDEN, tied_embeddings=self.tied, layers=self.parts, num_layers=layers,
                     norms=(2 * layers + 1) * HIDDEN)  # fmt: skip


def attention(queries: int, *, norms: bool = False, gate: bool = False) -> Shapes:
    """2 KV heads of 64 channels."""
    shapes = {"attn_q.weight": (queries * 64 * (1 + gate), HIDDEN), "attn_k.weight": (128, HIDDEN), "attn_v.weight": (128, HIDDEN),
              "attn_output.weight": (HIDDEN, queries * 64)}  # fmt: skip
    return shapes | ({"attn_q_norm.weight": (64,), "attn_k_norm.weight": (64,)} if norms else {})


def feed_forward(neurons: int) -> Shapes:
    return {"ffn_gate.weight": (neurons, HIDDEN), "ffn_up.weight": (neurons, HIDDEN), "ffn_down.weight": (HIDDEN, neurons)}


def mixture(experts: int, neurons: int, shared: int = 0) -> Shapes:
    shapes = {"ffn_gate_inp.weight": (experts, HIDDEN), "ffn_gate_exps.weight": (experts, neurons, HIDDEN), "ffn_up_exps.weight": (experts, neurons, HIDDEN),
              "ffn_down_exps.weight": (experts, HIDDEN, neurons)}  # fmt: skip
    beside = {"ffn_gate_shexp.weight": (shared, HIDDEN), "ffn_up_shexp.weight": (shared, HIDDEN), "ffn_down_shexp.weight": (HIDDEN, shared)}
    return shapes | (beside if shared else {})


NORMS = {"attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,)}
LATENT = {"attn_q_a.weight": (192, HIDDEN), "attn_q_a_norm.weight": (192,), "attn_q_b.weight": (4 * 192, 192), "attn_kv_a_mqa.weight": (320, HIDDEN),
          "attn_kv_a_norm.weight": (256,), "attn_k_b.weight": (4, 256, 128), "attn_v_b.weight": (4, 128, 256), "attn_output.weight": (HIDDEN, 512)}  # fmt: skip
DELTA = {"attn_qkv.weight": (512, HIDDEN), "attn_gate.weight": (256, HIDDEN), "ssm_conv1d.weight": (512, 4), "ssm_dt.bias": (4,), "ssm_a": (4,),
         "ssm_ba.weight": (8, HIDDEN), "ssm_norm.weight": (64,), "ssm_out.weight": (HIDDEN, 256)}  # fmt: skip
MAMBA1 = {"ssm_in.weight": (1024, HIDDEN), "ssm_conv1d.weight": (512, 4), "ssm_conv1d.bias": (512,), "ssm_x.weight": (192, 512), "ssm_dt_norm.weight": (160,),
          "ssm_dt.weight": (512, 160), "ssm_dt.bias": (512,), "ssm_b_norm.weight": (16,), "ssm_c_norm.weight": (16,), "ssm_a": (512, 16), "ssm_d": (512,),
          "ssm_out.weight": (HIDDEN, 512)}  # fmt: skip
MAMBA2 = {"ssm_in.weight": (1544, HIDDEN), "ssm_conv1d.weight": (1024, 4), "ssm_conv1d.bias": (1024,), "ssm_dt.bias": (8,), "ssm_a": (8, 1), "ssm_d": (8, 1),
          "ssm_norm.weight": (2, 256), "ssm_out.weight": (HIDDEN, 512)}  # fmt: skip
CONV = {"shortconv.conv.weight": (HIDDEN, 3), "shortconv.in_proj.weight": (3 * HIDDEN, HIDDEN), "shortconv.out_proj.weight": (HIDDEN, HIDDEN)}

HEADS = {"attention.head_count_kv": 2, "attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}
SCAN = {"ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 128, "ssm.time_step_rank": 8, "ssm.group_count": 2}


def heads(queries: int, **options) -> Attention:
    return Attention(hidden=HIDDEN, query_heads=queries, key_value_heads=2, head_dim=64, **options)


KINDS = [
    Kind("llama", "mixtral", [NORMS | attention(8) | mixture(8, 512)] * 9,
         ((9, heads(8)), (9, Experts(hidden=HIDDEN, experts=8, experts_per_token=2, neurons=512))),
         HEADS | {"attention.head_count": 8, "feed_forward_length": 512, "expert_count": 8, "expert_used_count": 2}),
    Kind("deepseek2", "deepseek_v3",
         [NORMS | LATENT | feed_forward(768)] * 2 + [NORMS | LATENT | mixture(16, 320, 320) | {"exp_probs_b.bias": (16,)}] * 7,
         ((9, latent.LatentAttention(hidden=HIDDEN, heads=4, query_rank=192, latent=256, plain_dim=128, rotated_dim=64, value_dim=128)),
          (2, FeedForward(hidden=HIDDEN, neurons=768)), (7, Experts(hidden=HIDDEN, experts=16, experts_per_token=3, neurons=320, shared_neurons=320))),
         {"attention.head_count": 4, "attention.head_count_kv": 1, "attention.q_lora_rank": 192, "attention.kv_lora_rank": 256, "attention.key_length": 320,
          "attention.value_length": 256, "attention.key_length_mla": 192, "attention.value_length_mla": 128, "rope.dimension_count": 64,
          "feed_forward_length": 768, "leading_dense_block_count": 2, "expert_count": 16, "expert_used_count": 3, "expert_shared_count": 1,
          "expert_feed_forward_length": 320, "expert_weights_scale": 1.0, "expert_gating_func": 2}),
    Kind("qwen3next", "qwen3_next",
         [{"attn_norm.weight": (HIDDEN,), "post_attention_norm.weight": (HIDDEN,), "ffn_gate_inp_shexp.weight": (HIDDEN,)} | mixture(16, 128, 128)
          | (attention(8, norms=True, gate=True) if number % 4 == 3 else DELTA) for number in range(8)],
         ((6, delta.GatedDelta(hidden=HIDDEN, key_heads=2, key_head_dim=64, value_heads=4, value_head_dim=64, conv_kernel=4, fused=True)),
          (2, heads(8, output_gate=True, qk_norms=128)),
          (8, Experts(hidden=HIDDEN, experts=16, experts_per_token=3, neurons=128, shared_neurons=128, shared_gate=True))),
         HEADS | {"attention.head_count": 8, "feed_forward_length": 512, "expert_count": 16, "expert_used_count": 3, "expert_feed_forward_length": 128,
                  "expert_shared_feed_forward_length": 128, "ssm.conv_kernel": 4, "ssm.inner_size": 256, "ssm.state_size": 64, "ssm.time_step_rank": 4,
                  "ssm.group_count": 2}),
    Kind("jamba", "jamba",
         [NORMS | (mixture(4, 768) if number % 2 else feed_forward(768)) | (attention(4) if number % 4 == 3 else MAMBA1) for number in range(16)],
         ((12, mamba1.Mamba1(hidden=HIDDEN, inner=512, state=16, rank=160, conv_kernel=4)), (4, heads(4)), (8, FeedForward(hidden=HIDDEN, neurons=768)),
          (8, Experts(hidden=HIDDEN, experts=4, experts_per_token=2, neurons=768))),
         HEADS | {"attention.head_count": 4, "attention.head_count_kv": [0, 0, 0, 2] * 4, "feed_forward_length": 768, "expert_count": 4, "expert_used_count": 2,
                  "ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16, "ssm.time_step_rank": 160}),
    Kind("falcon-h1", "falcon_h1",
         [{"attn_norm.weight": (HIDDEN,), "ffn_norm": (HIDDEN,)} | feed_forward(768) | attention(4) | MAMBA2] * 4,
         ((4, Mamba2(hidden=HIDDEN, heads=8, head_dim=64, groups=2, state=128, conv_kernel=4)), (4, heads(4)), (4, FeedForward(hidden=HIDDEN, neurons=768))),
         HEADS | SCAN | {"attention.head_count": 4, "feed_forward_length": 768}),
    Kind("lfm2", "lfm2", [NORMS | feed_forward(768) | (attention(4, norms=True) if number % 3 == 2 else CONV) for number in range(6)],
         ((4, short_conv.ShortConv(hidden=HIDDEN, conv_kernel=3)), (2, heads(4, qk_norms=128)), (6, FeedForward(hidden=HIDDEN, neurons=768))),
         HEADS | {"attention.head_count": 4, "attention.head_count_kv": [0, 0, 2] * 2, "feed_forward_length": 768, "shortconv.l_cache": 3},
         tied=True, last_norm="token_embd_norm.weight"),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Iterator[Callable[..., dict]]:
    with started_engine() as ask:
        yield ask


@pytest.fixture
def path(kind: Kind, tmp_path) -> Path:
    metadata = {"block_count": len(kind.layers), "embedding_length": HIDDEN, "vocab_size": VOCAB, "context_length": 1 << 17}
    write_empty(tmp_path / "model.gguf", kind.name, metadata | kind.metadata, kind.tensors)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.model_type)
def test_buffers_are_what_llamacpp_logs(kind, path, engine):
    answer = engine(path=str(path), context={"n_ctx": 6000, "n_seq_max": 2, "swa_full": False}, model=WHOLE)
    ours = llamacpp_allotment(kind.model, context=3000, batch=2, quant="F32")
    print(f"\n{kind.model_type}: ", *(f"{name} {logged(answer, name)} MiB" for name in ("model", "KV", "RS", "compute")), ours)
    assert ours["model"] == answer["model_bytes"]
    assert same(ours["kv"], answer, "KV") and same(ours["recurrent"], answer, "RS")
    assert not same(llamacpp_allotment(kind.model, context=3200, batch=2)["kv"], answer, "KV")
    assert ours["compute_estimate"] / MIB == pytest.approx(logged(answer, "compute"), rel=COMPUTE_TOLERANCE)


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.model_type)
def test_types_are_those_that_llamacpps_quantiser_chooses(kind, importance, path, engine):
    for file_type in sorted(set(FILE_TYPES) - {"F32"}):
        tensors = gguf_tensors(kind.model, importance=importance)
        ours = Counter((tensor.row_length, tensor.rows, tensor.type_in(file_type)) for tensor in tensors)
        assert ours == chosen_types(engine, path, file_type, importance=importance), file_type
