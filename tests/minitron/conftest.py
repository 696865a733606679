"""Tiny models of every family, whose every tensor has its say: random sizes apart from each other, no weight constant.

transformers initialises A_log, D, dt_bias and the norms so that exchanging two heads or channels would go
unnoticed; `build_model` overwrites them all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config
from minitron.checkpoints.placement import WholeModel
from minitron.checkpoints.shards import save_model_weights
from minitron.families.base import Family
from minitron.families.known import family_of
from minitron.families.nemotron_h import FAMILY as NEMOTRON_H
from minitron.families.state import model_tensors
from minitron.families.table import BUFFER
from minitron.importance.activations import measure_width
from minitron.importance.scores import aggregate
from minitron.pruning.cut import build_pruned
from minitron.pruning.plan import PruningPlan, make_plan
from minitron.training.tiny_teacher import TINY_CONFIG
from minitron.walk.store import write_json
from nas.couplings import QUERY_HEADS, completed, following
from nas.depth import spelled

torch.set_num_threads(1)  # matrices this small only lose by more, and threads of several processes block each other

TINY = Architecture(
    model_type="nemotron_h", pattern="M-M*-M-*-", hidden=32, vocab=97, ffn=48, num_attention_heads=6, num_key_value_heads=2, attention_head_dim=8,
    mamba_num_heads=8, mamba_head_dim=4, mamba_num_groups=2, mamba_state_size=6, mamba_conv_kernel=4,
)  # fmt: skip

# Experts in two groups, of which a token sees one, and a shared one; with all biases that there can be.
TINY_EXPERTS = replace(TINY, pattern="M*E-E", ffn_bias=True, moe_num_experts=8, moe_experts_per_token=2, moe_ffn=16, moe_shared_ffn=20, moe_groups=2)
_ROUTING = {"norm_topk_prob": True, "routed_scaling_factor": 2.5}

# One of each kind that can be cut: head tied or not, biases where a family has any, heads that are not hidden size over heads, windows shorter than the rows
# that tests give (for all layers, for some), layers of both kinds of attention; experts in groups and not, in every other block.
_SIZES = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 6, "vocab_size": TINY.vocab, "rms_norm_eps": 1e-5,
          "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0, "dtype": "float32"}  # fmt: skip
_MAMBA2 = {"hidden_size": 32, "num_hidden_layers": 4, "num_heads": 8, "state_size": 6, "conv_kernel": 4, "chunk_size": 16, "vocab_size": TINY.vocab,
           "layer_norm_epsilon": 1e-5, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "dtype": "float32"}  # fmt: skip
# Multipliers of which none is a power of two, by which dividing and multiplying round.
_GRANITE = {"num_key_value_heads": 3, "shared_intermediate_size": 56, "mamba_n_heads": 12, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 6,
            "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 16, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
            "attention_multiplier": 0.3, "logits_scaling": 6.0, "num_local_experts": 0, "pad_token_id": 0}  # fmt: skip
_FULL, _SLIDING = "full_attention", "sliding_attention"
MODELS = {
    "nemotron_h": NEMOTRON_H.hf_config(TINY_CONFIG, TINY),
    "nemotron_h experts": NEMOTRON_H.hf_config(TINY_CONFIG | _ROUTING, TINY_EXPERTS),
    "nemotron_h latent": NEMOTRON_H.hf_config(TINY_CONFIG | _ROUTING, replace(TINY_EXPERTS, moe_latent=16)),
    "llama tied": {"model_type": "llama", **_SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama untied": {"model_type": "llama", **_SIZES, "num_key_value_heads": 3, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **_SIZES, "num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": False, "sliding_window": 9},
    "qwen2 tied": {"model_type": "qwen2", **_SIZES, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True, "use_sliding_window": True,
                   "sliding_window": 9, "max_window_layers": 4, "layer_types": [_FULL, _SLIDING, _SLIDING, _FULL]},
    "qwen3 tied": {"model_type": "qwen3", **_SIZES, "num_key_value_heads": 3, "head_dim": 10, "tie_word_embeddings": True, "use_sliding_window": False,
                   "sliding_window": None, "max_window_layers": 4, "layer_types": [_FULL] * 4},
    "qwen3_moe": {"model_type": "qwen3_moe", **_SIZES, "num_key_value_heads": 3, "head_dim": 10, "tie_word_embeddings": False, "attention_bias": True,
                  "use_sliding_window": True, "sliding_window": 9, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "decoder_sparse_step": 2, "norm_topk_prob": True},
    "gemma3_text": {"model_type": "gemma3_text", **_SIZES, "num_key_value_heads": 3, "head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 9,
                    "layer_types": [_SLIDING, _SLIDING, _SLIDING, _FULL]},
    "mamba2 tied": {"model_type": "mamba2", **_MAMBA2, "expand": 2, "head_dim": 8, "n_groups": 2, "tie_word_embeddings": True},
    "mamba2 untied": {"model_type": "mamba2", **_MAMBA2, "expand": 1, "head_dim": 4, "n_groups": 4, "use_bias": True, "use_conv_bias": False},
    "granite tied": {"model_type": "granitemoehybrid", **_SIZES, **_GRANITE, "layer_types": ["mamba", "attention", "mamba", "mamba"],
                     "position_embedding_type": "rope", "tie_word_embeddings": True},
    "granite untied": {"model_type": "granitemoehybrid", **_SIZES, **_GRANITE, "layer_types": ["attention", "attention", "mamba", "mamba"],
                       "tie_word_embeddings": False, "attention_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False},
    "granite experts": {"model_type": "granitemoehybrid", **_SIZES, **_GRANITE, "layer_types": ["mamba", "attention", "mamba", "mamba"],
                        "tie_word_embeddings": True, "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 16,
                        "shared_intermediate_size": 20},
}  # fmt: skip
NOT_ONES = ("mamba2 untied", "nemotron_h latent", "granite untied")
ONES = tuple(name for name in MODELS if name not in NOT_ONES)  # of which all is asked that is asked of every family


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A random model: not to be changed where it is shared."""

    family: Family
    config: dict
    architecture: Architecture
    model: nn.Module


@torch.no_grad()
def _randomise(family: Family, architecture: Architecture, model: nn.Module, seed: int) -> None:
    """Every parameter, and what corrects a router's choice, drawn anew, the same by name and shape for a seed; norms about what multiplies by 1, embedded
    tokens about as large as 1."""
    random = torch.Generator().manual_seed(seed)

    def normal(parameter, scale):
        return torch.randn(parameter.shape, generator=random) * scale

    def uniform(parameter, low, high):
        return torch.rand(parameter.shape, generator=random) * (high - low) + low

    correction_biases = ((name, buffer) for name, buffer in model.named_buffers() if BUFFER.search(name))
    for name, parameter in (*model.named_parameters(), *correction_biases):
        last = name.removesuffix(".weight").split(".")[-1]
        if name.endswith("conv1d.weight"):
            value = normal(parameter, 0.5)
        elif last in ("embeddings", "embed_tokens"):
            value = normal(parameter, 1 / family.embed_scale(architecture) / getattr(model.get_input_embeddings(), "multiplier", 1.0))
        elif name.endswith(("gate.weight", "router.weight")):  # a router, which sends many tokens to some experts and few to others
            value = normal(parameter, 2 * parameter.shape[1] ** -0.5)
        elif parameter.ndim == 2:
            value = normal(parameter, parameter.shape[1] ** -0.5)
        elif "norm" in last:
            value = 1 - family.norm_offset + normal(parameter, 0.3)
        elif last == "A_log":
            value = uniform(parameter, -1.0, 1.5)
        elif last == "dt_bias":
            value = uniform(parameter, -3.0, 0.5)
        elif last == "e_score_correction_bias":
            value = normal(parameter, 0.2)
        else:  # D and biases
            value = normal(parameter, 0.5)
        parameter.copy_(value)


@pytest.fixture(scope="session")
def tiny() -> Architecture:
    return TINY


@pytest.fixture(scope="session")
def config_of() -> Callable[[Architecture], dict]:
    """The config.json dict of a tiny architecture."""
    return lambda architecture: NEMOTRON_H.hf_config(TINY_CONFIG, architecture)


@pytest.fixture(scope="session")
def build_model(config_of) -> Callable[..., nn.Module]:
    """A new random model in eval mode: build_model(seed=1, pattern="MM-")."""

    def build(seed: int = 0, **sizes) -> nn.Module:
        architecture = replace(TINY, **sizes)
        model = NEMOTRON_H.build(config_of(architecture)).eval()
        _randomise(NEMOTRON_H, architecture, model, seed)
        return model

    return build


@pytest.fixture(scope="session")
def teacher(build_model) -> nn.Module:
    """The model of `tiny`, shared by all tests: not to be changed."""
    return build_model()


@pytest.fixture(scope="session")
def build_tiny() -> Callable[..., TinyModel]:
    """A new random model of MODELS in eval mode: build_tiny("llama tied", seed=1, num_hidden_layers=2)."""

    def build(name: str, seed: int = 0, **changes) -> TinyModel:
        config = MODELS[name] | changes
        if "layer_types" in config and "layer_types" not in changes:
            config["layer_types"] = (config["layer_types"] * config["num_hidden_layers"])[: config["num_hidden_layers"]]
        family, architecture = family_of(config), architecture_from_config(config)
        model = family.build(config).eval()
        _randomise(family, architecture, model, seed)
        return TinyModel(family, config, architecture, model)

    return build


@pytest.fixture(scope="session")
def configs() -> dict[str, dict]:
    """config.json of each of them."""
    return MODELS


@pytest.fixture(scope="session", params=ONES)
def one(request, build_tiny) -> TinyModel:
    """One of each kind, shared by all tests."""
    return build_tiny(request.param)


@pytest.fixture(scope="session")
def calibration(token_ids) -> list[torch.Tensor]:
    """Two batches [5, 40] by which each of them is scored and refitted, a row of the first one padded."""
    padded = token_ids(rows=5, seed=31)
    padded[3, 25:] = -1
    return [padded, token_ids(rows=5, seed=32)]


@pytest.fixture(scope="session")
def measured(one, calibration):
    """Its activations, summed over calibration."""
    return measure_width(WholeModel(one.family, one.model, one.architecture), calibration)


@pytest.fixture(scope="session")
def hard_plan(one, measured) -> PruningPlan:
    """The third layer goes, of KV heads one, and a quarter of every other axis, as far as the equations between sizes allow it, with what follows by them."""
    teacher, couplings, keys = one.architecture, one.family.couplings, one.architecture.num_key_value_heads
    kept = tuple(layer for layer in range(teacher.num_layers) if layer != 2)
    axes = ("ffn", "hidden", "mamba_num_heads", "mamba_head_dim", "moe_num_experts", "moe_ffn", "moe_shared_ffn")
    smaller = {name: getattr(teacher, name) * 3 // 4 for name in axes}
    student, given = teacher, {}
    for name, size in (({"num_key_value_heads": keys - 1} if keys else {}) | smaller).items():
        sizes = given | {name: size}
        tried = completed(replace(teacher, pattern=spelled(teacher, kept), **sizes), teacher, following(couplings, sizes))
        if all(coupling.holds(tried, teacher) for coupling in (*couplings, QUERY_HEADS)):
            student, given = tried, sizes
    return make_plan(teacher, student, kept, aggregate(measured))


@pytest.fixture(scope="session")
def sliced(one, hard_plan) -> nn.Module:
    """The student of that plan, cut in memory without refits: not to be changed."""
    return build_pruned(one.family, one.model, hard_plan, one.config)


@pytest.fixture(scope="session")
def teacher_folder(one, tmp_path_factory, write_checkpoint) -> Path:
    """The model as a checkpoint of several shards."""
    return write_checkpoint(tmp_path_factory.mktemp("teacher"), one.model, one.config, max_shard_bytes=30_000)


@pytest.fixture(scope="session")
def token_ids() -> Callable[..., torch.Tensor]:
    """Random ids [rows, tokens] within the tiny vocabulary."""
    return lambda rows=2, tokens=40, seed=1: torch.randint(TINY.vocab, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def padded_batches(token_ids) -> Callable[..., list[torch.Tensor]]:
    """Two calibration batches [8, 60], a row of the first one padded."""

    def batches(seed: int) -> list[torch.Tensor]:
        padded = token_ids(rows=8, tokens=60, seed=seed)
        padded[3, 40:] = -1
        return [padded, token_ids(rows=8, tokens=60, seed=seed + 1)]

    return batches


@pytest.fixture(scope="session")
def logits_of(token_ids) -> Callable[..., torch.Tensor]:
    """Logits [2, 40, V] of a model on fixed ids, or on those given."""

    @torch.no_grad()
    def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
        return model(token_ids() if ids is None else ids, use_cache=False).logits

    return logits


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """Write a model and its config as the pipeline does, optionally in several shards and in another dtype."""

    def write(folder: Path, model: nn.Module, config: dict, *, dtype: torch.dtype | None = None, max_shard_bytes: int = 2**30) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        family = family_of(config)
        state = {family.file_name(name): tensor.to(dtype or tensor.dtype) for name, tensor in model_tensors(family, model).items()}
        save_model_weights(state, folder, max_shard_bytes=max_shard_bytes)
        dtype_name = str(next(iter(state.values())).dtype).removeprefix("torch.")
        write_json(folder / "config.json", config | {"dtype": dtype_name})
        return folder

    return write


@pytest.fixture(scope="session")
def keep_all() -> Callable[..., PruningPlan]:
    """A plan that keeps every layer and, but for the `units` given, every unit."""

    def plan(architecture: Architecture = TINY, **units) -> PruningPlan:
        return PruningPlan(teacher=architecture, student=architecture, kept_layers=tuple(range(architecture.num_layers)), units=units)

    return plan


TEMPLATES = Path(__file__).with_name("templates")
# Stand-ins for published chat templates, each with what ends a turn in it; the files say what is peculiar to each.
END_OF_TURN = {"nemotron_nano_v2": "<SPECIAL_12>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "deepseek_r1": "<|end_of_sentence|>"}


@pytest.fixture(scope="session")
def chat_tokenizer() -> Callable[..., object]:
    """A tokenizer of single bytes with one of the templates, or with a template given as text; its end of text is </s>, id 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(template: str) -> PreTrainedTokenizerFast:
        special = ["<pad>", "<s>", "</s>", "<think>", "</think>", *dict.fromkeys([*END_OF_TURN.values(), "<SPECIAL_11>", "<|im_start|>"])]
        vocabulary = [*dict.fromkeys(special), *sorted(pre_tokenizers.ByteLevel.alphabet())]
        words = Tokenizer(models.BPE({word: number for number, word in enumerate(vocabulary)}, []))
        words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        words.add_special_tokens([word for word in special if "think" not in word])
        words.add_tokens(["<think>", "</think>"])
        text = (TEMPLATES / f"{template}.jinja").read_text() if template in END_OF_TURN else template
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=text)

    return make


@pytest.fixture(params=END_OF_TURN)
def template(request) -> str:
    """Each of the stand-ins by name."""
    return request.param
