"""Granite-4-H (transformers' models/granitemoehybrid): blocks of a Mamba-2 mixer or attention, then a gated feed-forward layer or experts beside it.

What is peculiar to it, and where it is stated:
- Numbers of config.json multiply what is embedded (`embed_multiplier`) and what every mixer adds to the stream (`added_multiplier`), divide logits, and stand
  in the place of 1/√head_dim. None of them follows from a size, so a student has them as they are. In memory the table of embeddings multiplies and the last
  norm divides (`_ours`), so that whoever takes the model apart, or only its last hidden states and the head, computes the same logits.
- Expand × hidden size = Mamba-2 heads × channels, as transformers insists, whatever the layers are; hidden size = query heads × head_dim, as vLLM takes it.
  So hidden size, query heads and Mamba-2 heads are cut in one ratio (`BlockExpansion`, qwen2's `FullHeads`).
- Gate and up of the feed-forward layer are one matrix, gate's rows first. It is `shared_mlp` with and without experts.
- Attention has rotary positions where config.json says "rope", else none.
- transformers' (5.23) model does not look at positions when it makes the mask of attention, so that documents of a packed row would see each other; here the
  mask is made for it (`documents_by_mask`).
- `layer_types` is written in the older words, mamba and attention: vLLM and llama.cpp know no others.

Letters: N tokens, K experts of a token, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_budget.architecture import BLOCK, Architecture
from minitron.families import blocks, config_json, nemotron_h
from minitron.families.base import EXPERT, EXPERT_FFN, FFN, HIDDEN, ROUTER, SHARED_FFN, Family, ModelParts, Tap, TensorAxes
from minitron.families.config_json import kept_config, transformers_config
from minitron.families.mamba2 import Expansion
from minitron.families.qwen2 import FullHeads

if TYPE_CHECKING:
    from torch import nn

_HIDDEN, _NEURONS = ((HIDDEN,),), ((EXPERT_FFN,),)
TABLE = (
    *(row for row in blocks.TABLE if row.kind != "-" and row.only_if not in ("post_norms", "attention_qk_norm")),
    *(row for row in nemotron_h.MAMBA_TABLE if row.kind == "M"),
    TensorAxes("mixer.shared_mlp.input_linear.weight", "-", (((FFN,), (FFN,)), _HIDDEN)),
    TensorAxes("mixer.shared_mlp.output_linear.weight", "-", (_HIDDEN, ((FFN,),))),
    TensorAxes(ROUTER, "E", (((EXPERT,),), _HIDDEN)),
    TensorAxes("mixer.experts.*.gate_proj.weight", "E", (_NEURONS, _HIDDEN)),
    TensorAxes("mixer.experts.*.up_proj.weight", "E", (_NEURONS, _HIDDEN)),
    TensorAxes("mixer.experts.*.down_proj.weight", "E", (_HIDDEN, _NEURONS)),
    TensorAxes("mixer.shared_mlp.input_linear.weight", "E", (((SHARED_FFN,), (SHARED_FFN,)), _HIDDEN)),
    TensorAxes("mixer.shared_mlp.output_linear.weight", "E", (_HIDDEN, ((SHARED_FFN,),))),
)
# Our names of a block's parts by those in files, and in which half they are; a router has another name in memory.
PARTS = {"input_layernorm": (0, "norm"), "mamba": (0, "mixer"), "self_attn": (0, "mixer"), "post_attention_layernorm": (1, "norm"),
         "shared_mlp": (1, "mixer.shared_mlp"), "block_sparse_moe.router.layer": (1, "mixer.gate"), "block_sparse_moe.gate": (1, "mixer.gate"),
         "block_sparse_moe.experts": (1, "mixer.experts")}  # fmt: skip
ATTENTION = ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj")
# What the modules read of their configuration in a forward pass in eval mode; mamba_chunk_size only orders the additions.
COMPUTING = frozenset({
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "shared_intermediate_size", "num_hidden_layers", "layer_types", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "tie_word_embeddings", "rope_parameters", "position_embedding_type",
    "embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier", "num_local_experts", "num_experts_per_tok", "mamba_n_heads",
    "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit",
})  # fmt: skip
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
OLD_WORDS = {"M": "mamba", "*": "attention"}


@dataclass(frozen=True, slots=True)
class BlockExpansion(Expansion):
    """The same of blocks, of which none may have Mamba-2: then it asks for nothing."""

    def holds(self, student: Architecture, teacher: Architecture) -> Any:
        return "M" not in student.pattern or Expansion.holds(self, student, teacher)

    def size(self, field: str, student: Architecture, teacher: Architecture) -> Any:
        return Expansion.size(self, field, student, teacher) if "M" in teacher.pattern else getattr(student, field)

    def unit(self, field: str, teacher: Architecture) -> int:
        return Expansion.unit(self, field, teacher) if "M" in teacher.pattern else 1

    def __str__(self) -> str:
        return "mamba_expand × hidden_size == mamba_n_heads × mamba_d_head with a whole mamba_expand"


def axis_sizes(architecture: Architecture) -> Mapping[str, int]:
    """Length of every axis of TABLE."""
    return nemotron_h.axis_sizes(architecture)


def hf_config(teacher_config: dict, architecture: Architecture) -> dict:
    """The teacher's config.json with another architecture's sizes; what it says beyond sizes is kept."""
    return {key: value for key, value in kept_config(teacher_config).items() if key != "layers_block_type"} | {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "num_hidden_layers": architecture.num_layers,
        "layer_types": [OLD_WORDS[kind[0]] for kind in architecture.layer_kinds],
        "hidden_size": architecture.hidden,
        "vocab_size": architecture.vocab,
        "tie_word_embeddings": architecture.tied_embeddings,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_key_value_heads,
        "head_dim": architecture.attention_head_dim,
        "shared_intermediate_size": architecture.moe_shared_ffn or architecture.ffn,
        "intermediate_size": architecture.moe_ffn or architecture.ffn,  # llama.cpp's neurons of a dense one
        "num_local_experts": architecture.moe_num_experts,
        "num_experts_per_tok": architecture.moe_experts_per_token,
        **(_mamba_sizes(architecture) if "M" in architecture.pattern else _idle_mamba_sizes(teacher_config, architecture.hidden)),
    }  # fmt: skip


def _mamba_sizes(architecture: Architecture) -> dict:
    return {
        "mamba_expand": architecture.mamba_inner // architecture.hidden,
        "mamba_n_heads": architecture.mamba_num_heads,
        "mamba_d_head": architecture.mamba_head_dim,
        "mamba_n_groups": architecture.mamba_num_groups,
        "mamba_d_state": architecture.mamba_state_size,
        "mamba_d_conv": architecture.mamba_conv_kernel,
        "mamba_conv_bias": architecture.mamba_conv_bias,
        "mamba_proj_bias": architecture.mamba_projection_bias,
    }


def _idle_mamba_sizes(teacher_config: Mapping, hidden: int) -> dict:
    """Of a model without Mamba-2, whose config.json transformers holds to the equation all the same: as many of the teacher's heads as divide it."""
    inner = teacher_config.get("mamba_expand", 2) * hidden
    heads = gcd(teacher_config.get("mamba_n_heads", 128), inner)
    return {"mamba_n_heads": heads, "mamba_d_head": inner // heads, "mamba_n_groups": gcd(teacher_config.get("mamba_n_groups", 1), heads)}


def handed_over(config: dict) -> dict:
    """Rotary positions, where there are any, in both spellings."""
    return blocks.with_both_spellings(config) if config.get("position_embedding_type") == "rope" else config


def canonical_name(name: str) -> str:
    """`model.layers.3.mamba.in_proj.weight` → `layers.6.mixer.in_proj.weight`; a name of neither kind as it is."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        for theirs, (half, ours) in PARTS.items():
            if match[2].startswith(f"{theirs}."):
                return f"layers.{len(BLOCK) * int(match[1]) + half}.{ours}{match[2].removeprefix(theirs)}"
        return f"layers.{len(BLOCK) * int(match[1])}.{match[2]}"
    return next((ours + name.removeprefix(theirs) for ours, theirs in blocks.OUTSIDE.items() if name.startswith(f"{theirs}.")), name)


def file_name(canonical: str) -> str:
    """The name on the Hub; of an expert's matrix that by which a stacked one is taken apart (minitron/checkpoints)."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", canonical)
    if not match:
        ours, _, rest = canonical.partition(".")
        return f"{blocks.OUTSIDE[ours]}.{rest}"
    block, half = divmod(int(match[1]), len(BLOCK))
    named = [(theirs, ours) for theirs, (of_half, ours) in PARTS.items() if of_half == half and match[2].startswith(f"{ours}.")]
    theirs, ours = named[match[2].startswith(ATTENTION)] if named[0][0] == "mamba" else named[0]
    return f"model.layers.{block}.{theirs}{match[2].removeprefix(ours)}"


def parts(model: nn.Module) -> ModelParts:
    base = model.model
    sublayers = [_sublayer(block, half, lambda: base.rotary_emb) for block in base.layers for half in range(len(BLOCK))]
    return ModelParts(embed=base.embed_tokens, layers=sublayers, norm=base.norm, head=model.lm_head)


def layer_taps(architecture: Architecture, layer: int, block: nn.Module) -> list[Tap]:
    """Where a sublayer's width importance is read, as in families with the same mixers."""
    kind = architecture.pattern[layer]
    if kind in "M*":
        return nemotron_h.layer_taps(architecture, layer, block)
    axis, neurons = (FFN, architecture.ffn) if kind == "-" else (SHARED_FFN, architecture.moe_shared_ffn)
    return [Tap(HIDDEN, layer, block.norm, "output", 0, (architecture.hidden,)), Tap(axis, layer, block.mixer.shared_mlp.output_linear, "input", 0, (neurons,))]


def load(folder: Path, **how: Any) -> nn.Module:
    """The checkpoint as transformers' own model but for where it multiplies (`_ours`), in eval mode, with experts one by one (experts.py)."""
    return _ours(config_json.load(folder, **how))


def build(config: dict) -> nn.Module:
    """A freshly initialised float32 model of a config.json dict; on the meta device there is nothing to initialise."""
    return _ours(config_json.build(config))


def build_layer(config: dict, layer: int) -> nn.Module:
    """One sublayer alone, freshly initialised on the current default device."""
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridDecoderLayer, GraniteMoeHybridRotaryEmbedding

    block, half = divmod(layer, len(BLOCK))
    sizes = transformers_config(config)
    has_positions = sizes.position_embedding_type == "rope"
    return _sublayer(GraniteMoeHybridDecoderLayer(sizes, block), half, lambda: GraniteMoeHybridRotaryEmbedding(sizes) if has_positions else None)


def build_outside(config: dict, part: str) -> nn.Module:
    """The final norm ("norm"), which divides, or the output projection ("head") alone."""
    from torch import nn
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNorm

    from minitron.families.halves import dividing

    sizes = transformers_config(config)
    if part == "norm":
        return dividing(GraniteMoeHybridRMSNorm(sizes.hidden_size, eps=sizes.rms_norm_eps), sizes.logits_scaling)
    return nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)


def _ours(model: nn.Module) -> nn.Module:
    """The model with the numbers that transformers' forward passes multiply and divide by in the modules that they come from."""
    from minitron.families.halves import dividing, keeping_documents_apart, multiplying

    base = model.model
    base.register_forward_pre_hook(keeping_documents_apart, with_kwargs=True)
    multiplying(base.embed_tokens, base.embedding_multiplier)
    dividing(base.norm, model.config.logits_scaling)
    base.embedding_multiplier = model.config.logits_scaling = 1.0
    parts(model)  # experts one by one
    return model


def _sublayer(block: nn.Module, half: int, make_rotary: Callable[[], nn.Module | None]) -> nn.Module:
    """One of a block's two sublayers, which share its modules."""
    from minitron.families.halves import Attention, FeedForward, SharedAndExperts, gated_mixture

    factor = block.residual_multiplier
    if half == 0 and block.mamba is None:
        return Attention(block.input_layernorm, block.self_attn, make_rotary=make_rotary, factor=factor)
    if half == 0:
        return FeedForward(block.input_layernorm, block.mamba, factor=factor)
    mixture = block.block_sparse_moe and gated_mixture(block.block_sparse_moe)
    return FeedForward(block.post_attention_layernorm, SharedAndExperts(block.shared_mlp, mixture), factor=factor)


def refused(config: dict) -> str | None:
    """Multipliers that are no numbers, or 0, by which nothing could be divided."""
    for key in MULTIPLIERS:
        value = config.get(key, 1.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            return f"{key} is {value!r}; it must be a number above 0"
    return None


FAMILY = Family(
    model_type="granitemoehybrid",
    table=TABLE,
    axis_sizes=axis_sizes,
    hf_config=hf_config,
    canonical_name=canonical_name,
    file_name=file_name,
    parts=parts,
    layer_taps=layer_taps,
    load=load,
    build=build,
    build_layer=build_layer,
    build_outside=build_outside,
    outside_names={"embed": "embeddings.", "norm": "norm_f.", "head": "lm_head."},
    rms_epsilon=lambda config: transformers_config(config).rms_norm_eps,
    handed_over=handed_over,
    computing=lambda full: COMPUTING | (blocks.computing(full) & {"max_position_embeddings"}),
    couplings=(FullHeads(), BlockExpansion()),
    refused=refused,
    embed_multiplier=lambda config: config.get("embedding_multiplier", 1.0),
    documents_by_mask=True,
    added_multiplier=lambda config: config.get("residual_multiplier", 1.0),
)
