"""What a family of models must say about itself, and nothing else knows.

A tensor's dimension is a tuple of segments laid end to end; a segment is a tuple of axes, slowest first,
whose sizes multiply. `in_proj` rows of a Mamba-2 mixer, for example, are five segments: z, x, B, C, dt.

What the rest of the program walks are sublayers: x + mixer(norm(x)), one letter of the pattern each. A transformer block
is two of them. Canonical tensor names number sublayers, `layers.7.norm.weight` and `layers.7.mixer.…`, whatever a file calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from memory_budget.architecture import Architecture
from nas.couplings import Coupling

if TYPE_CHECKING:  # so that settings can ask for a family's rules without torch
    from torch import nn

Segment = tuple[str, ...]
Dimension = tuple[Segment, ...]

# Axes that a plan may cut. Every other axis (vocabulary, groups, state, …) is kept whole.
HIDDEN, FFN, MAMBA_HEAD, MAMBA_CHANNEL = "hidden", "ffn", "mamba_head", "mamba_channel"
ATTENTION_HEAD, KEY_VALUE_HEAD = "attention_head", "key_value_head"
EXPERT, EXPERT_FFN, SHARED_FFN = "expert", "expert_ffn", "shared_ffn"
ROUTER = "mixer.gate.weight"  # scores of experts, a row each
POST_NORM = "post_norm.weight"  # of a norm between a mixer and the residual stream


@dataclass(frozen=True, slots=True)
class TensorAxes:
    """One row of a family's table: tensors whose canonical name ends so, and the axes of their dimensions; `experts.*` stands for every expert's number.

    `suffix` is the name without the sublayer's prefix ("mixer.in_proj.weight"); `kind` is the letter of the mixer (Architecture.mixers) it
    belongs to, or "" for a tensor outside the sublayers and "any" for one that every sublayer has. `only_if` names
    the field of Architecture that says whether the model has it; "" for a tensor that it always has. `buffer`: it is stored, but no parameter, and float32
    whatever the model computes in.
    """

    suffix: str
    kind: str
    dimensions: tuple[Dimension, ...]
    only_if: str = ""
    buffer: bool = False


@dataclass(frozen=True, slots=True)
class Tap:
    """Where an axis's activation is read: a module's input or output, and the slice of its last dimension.

    `shape` is what the slice's last dimension unfolds to, e.g. (M, P) for Mamba heads.
    """

    axis: str
    layer: int
    module: nn.Module
    side: str
    start: int
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class ModelParts:
    """A model taken apart for walking it sublayer by sublayer: ids → embed → layers → norm → head → logits."""

    embed: nn.Module
    layers: list[nn.Module]
    norm: nn.Module
    head: nn.Module


@dataclass(frozen=True, slots=True, eq=False)  # each is itself, and so a key of what is remembered of it
class Family:
    """The duties of one family. `axis_sizes` gives the length of every axis named in the table.

    `build_layer` and `build_outside` give one module alone (a sublayer; "norm" or "head"), for models
    that are never whole in memory; `outside_names` gives the prefixes of canonical tensor names of those and of the embeddings ("embed"). `rms_epsilon`
    gives, from config.json, the epsilon of the norms that sublayers and head read the residual stream through; None where they are no RMSNorm.
    `handed_over` gives a config.json with which the model is the same one in programs that load it without `load`.
    `couplings` are equations between sizes that transformers' configuration class insists on; `refused` gives, from config.json, what of the
    model a cut could not honour (quantised weights, say), None where it can. `computing` gives, from all that transformers' configuration object says,
    the keys that the forward pass depends on: two checkpoints that differ in another one compute alike.

    `norm_offset` is what is added to the stored weight of a norm of the residual stream before it multiplies: 0, or 1 where such weights are stored around
    0. `embed_scale` gives what the model multiplies rows of its table of embeddings by, where that follows from its sizes, and `embed_multiplier` what it
    multiplies them by besides, from config.json; `added_multiplier` what every mixer's output is multiplied by before it is added to the stream.
    `float32_stream` gives, from config.json, whether the residual stream is float32 whatever number format the layers compute in.
    `decodes_without_attention` says that transformers goes on from the cache of a model of this family that has no attention layer; `documents_by_mask` that
    its attention keeps the documents of a packed row apart by a mask alone, which flash attention does not take.
    """

    model_type: str
    table: tuple[TensorAxes, ...]
    axis_sizes: Callable[[Architecture], Mapping[str, int]]
    hf_config: Callable[[dict, Architecture], dict]
    canonical_name: Callable[[str], str]
    file_name: Callable[[str], str]
    parts: Callable[[nn.Module], ModelParts]
    layer_taps: Callable[[Architecture, int, nn.Module], list[Tap]]
    load: Callable[..., nn.Module]
    build: Callable[[dict], nn.Module]
    build_layer: Callable[[dict, int], nn.Module]
    build_outside: Callable[[dict, str], nn.Module]
    outside_names: Mapping[str, str]
    rms_epsilon: Callable[[dict], float] | None
    handed_over: Callable[[dict], dict]
    computing: Callable[[Mapping], frozenset[str]]
    couplings: tuple[Coupling, ...] = ()
    refused: Callable[[dict], str | None] = lambda _config: None
    norm_offset: float = 0.0
    embed_scale: Callable[[Architecture], float] = lambda _architecture: 1.0
    embed_multiplier: Callable[[Mapping], float] = lambda _config: 1.0
    added_multiplier: Callable[[Mapping], float] = lambda _config: 1.0
    float32_stream: Callable[[Mapping], bool] = lambda _config: False
    decodes_without_attention: bool = False
    documents_by_mask: bool = False
