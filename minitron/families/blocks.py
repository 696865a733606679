"""What families of transformer blocks have in common: a block is two sublayers, x + attention(norm(x)), then x + ffn(norm(x)), or experts in the FFN's place.

A family says which classes of transformers it is made of, what they call a block's parts, and what its config.json holds; names, halves of blocks,
loading and building are here. Canonically block b is the sublayers 2b (attention) and 2b + 1 (FFN), and their parts are called norm and mixer, and
post_norm where a second norm follows the mixer.

Letters: D hidden, F ffn, Q query heads, K KV heads, H head dim, V vocabulary, B batch, T tokens.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_budget.architecture import BLOCK, WINDOWED, Architecture
from minitron.families.base import (
    ATTENTION_HEAD,
    EXPERT,
    EXPERT_FFN,
    FFN,
    HIDDEN,
    KEY_VALUE_HEAD,
    POST_NORM,
    ROUTER,
    Family,
    ModelParts,
    Tap,
    TensorAxes,
)  # fmt: skip
from minitron.families.config_json import build, kept_config, load, transformers_config

if TYPE_CHECKING:
    from torch import nn

_HIDDEN, _FFN = ((HIDDEN,),), ((FFN,),)
_VOCABULARY = (("vocab",),)
_QUERY = ((ATTENTION_HEAD, "attention_channel"),)
_KEY_VALUE = ((KEY_VALUE_HEAD, "attention_channel"),)
_CHANNEL = (("attention_channel",),)

TABLE = (
    TensorAxes("embeddings.weight", "", (_VOCABULARY, _HIDDEN)),
    TensorAxes("norm_f.weight", "", (_HIDDEN,)),
    TensorAxes("lm_head.weight", "", (_VOCABULARY, _HIDDEN), only_if="has_own_head"),
    TensorAxes("norm.weight", "any", (_HIDDEN,)),
    TensorAxes(POST_NORM, "any", (_HIDDEN,), only_if="post_norms"),
    TensorAxes("mixer.q_proj.weight", "*", (_QUERY, _HIDDEN)),
    TensorAxes("mixer.k_proj.weight", "*", (_KEY_VALUE, _HIDDEN)),
    TensorAxes("mixer.v_proj.weight", "*", (_KEY_VALUE, _HIDDEN)),
    TensorAxes("mixer.o_proj.weight", "*", (_HIDDEN, _QUERY)),
    TensorAxes("mixer.q_proj.bias", "*", (_QUERY,), only_if="attention_input_bias"),
    TensorAxes("mixer.k_proj.bias", "*", (_KEY_VALUE,), only_if="attention_input_bias"),
    TensorAxes("mixer.v_proj.bias", "*", (_KEY_VALUE,), only_if="attention_input_bias"),
    TensorAxes("mixer.o_proj.bias", "*", (_HIDDEN,), only_if="attention_output_bias"),
    TensorAxes("mixer.q_norm.weight", "*", (_CHANNEL,), only_if="attention_qk_norm"),  # shared by all heads
    TensorAxes("mixer.k_norm.weight", "*", (_CHANNEL,), only_if="attention_qk_norm"),
    TensorAxes("mixer.gate_proj.weight", "-", (_FFN, _HIDDEN)),  # a neuron is a row of gate and the same row of up
    TensorAxes("mixer.up_proj.weight", "-", (_FFN, _HIDDEN)),
    TensorAxes("mixer.down_proj.weight", "-", (_HIDDEN, _FFN)),
    TensorAxes("mixer.gate_proj.bias", "-", (_FFN,), only_if="ffn_bias"),
    TensorAxes("mixer.up_proj.bias", "-", (_FFN,), only_if="ffn_bias"),
    TensorAxes("mixer.down_proj.bias", "-", (_HIDDEN,), only_if="ffn_bias"),
)
_EXPERTS, _NEURONS = ((EXPERT,),), ((EXPERT_FFN,),)
# Of a family whose blocks have experts: a router without a bias, and gated experts, which have none either, nor has an FFN beside them.
EXPERTS_TABLE = (
    *(row for row in TABLE if row.only_if not in ("post_norms", "ffn_bias")),
    TensorAxes(ROUTER, "E", (_EXPERTS, _HIDDEN)),
    TensorAxes("mixer.experts.*.gate_proj.weight", "E", (_NEURONS, _HIDDEN)),
    TensorAxes("mixer.experts.*.up_proj.weight", "E", (_NEURONS, _HIDDEN)),
    TensorAxes("mixer.experts.*.down_proj.weight", "E", (_HIDDEN, _NEURONS)),
)
HALVES = ({"norm": "input_layernorm", "mixer": "self_attn"}, {"norm": "post_attention_layernorm", "mixer": "mlp"})  # of most
DEFAULT_THETA = 10_000.0  # of transformers' rotary positions, where config.json has none
FIXED_ROPES = ("default", "linear", "llama3")  # whose frequencies follow from the positions' own parameters alone
# What such modules read of their configuration in a forward pass in eval mode; the rest is of training, storage, generation or nothing.
COMPUTING = frozenset({
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "tie_word_embeddings", "rope_parameters", "layer_types",
})  # fmt: skip
OUTSIDE = {"embeddings": "model.embed_tokens", "norm_f": "model.norm", "lm_head": "lm_head"}


def with_both_spellings(config: dict) -> dict:
    """Rotary positions in both spellings. transformers from version 5 on reads and writes `rope_parameters`; older versions, and programs of their time,
    read `rope_theta` and `rope_scaling` and would take their own defaults without a word. Where both are there, transformers takes the scaling from the
    older one, so they are made to say the same."""
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    parameters = {**parameters, "rope_type": kind, "rope_theta": theta}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return config | {"rope_parameters": parameters, "rope_theta": theta, "rope_scaling": None if kind == "default" else scaling}


@dataclass(frozen=True, slots=True)
class Blocks:
    """What a family's classes in transformers are called: `module` is the file models/MODULE/modeling_MODULE.py, `prefix` what the classes' names begin
    with ("Llama"), `halves` the names of a block's parts by ours. `rope_by_type`: rotary positions have frequencies of their own for each kind of attention."""

    module: str
    prefix: str
    halves: tuple[Mapping[str, str], Mapping[str, str]] = HALVES
    rope_by_type: bool = False

    def canonical_name(self, name: str) -> str:
        """`model.layers.3.mlp.up_proj.weight` → `layers.7.mixer.up_proj.weight`; a name of neither kind as it is."""
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(.+)", name):
            named = ((half, ours) for half, names in enumerate(self.halves) for ours, theirs in names.items() if theirs == match[2])
            half, ours = next(named, (0, match[2]))
            return f"layers.{len(BLOCK) * int(match[1]) + half}.{ours}.{match[3]}"
        for ours, theirs in OUTSIDE.items():
            if name.startswith(f"{theirs}."):
                return ours + name.removeprefix(theirs)
        return name

    def file_name(self, canonical: str) -> str:
        """A tensor's name on the Hub and in memory, which are the same."""
        if match := re.fullmatch(r"layers\.(\d+)\.(\w+)\.(.+)", canonical):
            block, half = divmod(int(match[1]), len(BLOCK))
            return f"model.layers.{block}.{self.halves[half][match[2]]}.{match[3]}"
        ours, _, rest = canonical.partition(".")
        return f"{OUTSIDE[ours]}.{rest}"

    def load(self, folder: Path, **how: Any) -> nn.Module:
        return self._ours(load(folder, **how))

    def build(self, config: dict) -> nn.Module:
        return self._ours(build(config))

    def _ours(self, model: nn.Module) -> nn.Module:
        self.parts(model)
        return model

    def parts(self, model: nn.Module) -> ModelParts:
        rotary = model.model.rotary_emb
        sublayers = [self._sublayer(block, half, lambda: rotary) for block in model.model.layers for half in range(len(BLOCK))]
        return ModelParts(embed=model.model.embed_tokens, layers=sublayers, norm=model.model.norm, head=model.lm_head)

    def build_layer(self, config: dict, layer: int) -> nn.Module:
        """One sublayer alone, freshly initialised on the current default device."""
        block, half = divmod(layer, len(BLOCK))
        sizes = transformers_config(config)
        return self._sublayer(self._class("DecoderLayer")(sizes, block), half, lambda: self._class("RotaryEmbedding")(sizes))

    def build_outside(self, config: dict, part: str) -> nn.Module:
        """The final norm ("norm") or the output projection ("head") alone."""
        from torch import nn

        sizes = transformers_config(config)
        if part == "norm":
            return self._class("RMSNorm")(sizes.hidden_size, eps=sizes.rms_norm_eps)
        return nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)

    def _class(self, name: str) -> type:
        return getattr(importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}"), self.prefix + name)

    def _sublayer(self, block: nn.Module, half: int, make_rotary: Callable[[], nn.Module]) -> nn.Module:
        """One of a block's two sublayers, which share its modules; experts one by one (experts.py)."""
        from minitron.families.experts import Experts, unstacked
        from minitron.families.halves import Attention, FeedForward

        parts = {ours: getattr(block, theirs) for ours, theirs in self.halves[half].items()}
        if half == 0:
            return Attention(**parts, make_rotary=make_rotary, by_type=self.rope_by_type)
        experts = getattr(parts["mixer"], "experts", None)
        if experts is not None and not isinstance(experts, Experts):
            parts["mixer"].experts = unstacked(experts, gated=True)
        return FeedForward(**parts)


def block_family(model_type: str, blocks: Blocks, *, config: Callable[[dict, Architecture], dict], dropped: Collection[str] = (),
                 computing_too: Collection[str] = (), table: tuple[TensorAxes, ...] = TABLE,
                 handed_over: Callable[[dict], dict] = with_both_spellings, **more: Any) -> Family:  # fmt: skip
    """A family of blocks. `config` gives, from the teacher's config.json and an architecture, what beside the sizes common to all the student's must
    hold, and `dropped` what it must not; `computing_too` the keys beside COMPUTING that a forward pass depends on; `more` are other fields of Family."""
    return Family(
        model_type=model_type,
        table=table,
        axis_sizes=axis_sizes,
        hf_config=lambda teacher, architecture: {key: value for key, value in _sizes(teacher, architecture).items() if key not in dropped}
        | config(teacher, architecture),
        canonical_name=blocks.canonical_name,
        file_name=blocks.file_name,
        parts=blocks.parts,
        layer_taps=layer_taps,
        load=blocks.load,
        build=blocks.build,
        build_layer=blocks.build_layer,
        build_outside=blocks.build_outside,
        outside_names={"embed": "embeddings.", "norm": "norm_f.", "head": "lm_head."},
        rms_epsilon=lambda given: transformers_config(given).rms_norm_eps,
        handed_over=handed_over,
        computing=lambda full: computing(full) | frozenset(computing_too),
        **more,
    )


def axis_sizes(architecture: Architecture) -> Mapping[str, int]:
    """Length of every axis of TABLE."""
    return {
        HIDDEN: architecture.hidden,
        FFN: architecture.ffn,
        ATTENTION_HEAD: architecture.num_attention_heads,
        KEY_VALUE_HEAD: architecture.num_key_value_heads,
        EXPERT: architecture.moe_num_experts,
        EXPERT_FFN: architecture.moe_ffn,
        "attention_channel": architecture.attention_head_dim,
        "vocab": architecture.vocab,
    }


def _sizes(teacher: dict, architecture: Architecture) -> dict:
    """The teacher's config.json with another architecture's sizes. head_dim is always written: elsewhere it is hidden size over heads."""
    return kept_config(teacher) | {
        "num_hidden_layers": architecture.num_layers,
        "hidden_size": architecture.hidden,
        "intermediate_size": architecture.ffn,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_key_value_heads,
        "head_dim": architecture.attention_head_dim,
        "vocab_size": architecture.vocab,
        "tie_word_embeddings": architecture.tied_embeddings,
    }


def computing(full: Mapping) -> frozenset[str]:
    """COMPUTING, and the longest text where the frequencies of rotary positions are computed from it (modeling_rope_utils.py)."""
    return COMPUTING if (full.get("rope_parameters") or {}).get("rope_type", "default") in FIXED_ROPES else COMPUTING | {"max_position_embeddings"}


def layer_taps(architecture: Architecture, layer: int, block: nn.Module) -> list[Tap]:
    """Where a sublayer's width importance is read: what its norm gives, and what its last matrix is given; what experts do is watched (experts.Routed)."""
    found = [Tap(HIDDEN, layer, block.norm, "output", 0, (architecture.hidden,))]
    if architecture.mixers[layer] == "E":
        return found
    if architecture.mixers[layer] == "*":
        heads = (architecture.num_attention_heads, architecture.attention_head_dim)
        return [*found, Tap(ATTENTION_HEAD, layer, block.mixer.o_proj, "input", 0, heads)]
    return [*found, Tap(FFN, layer, block.mixer.down_proj, "input", 0, (architecture.ffn,))]


def attention_types(architecture: Architecture) -> list[str]:
    """`layer_types` of config.json: the kind of attention of every block, as transformers calls it."""
    return ["sliding_attention" if WINDOWED in kind else "full_attention" for kind in architecture.layer_kinds]
