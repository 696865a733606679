"""Mamba-2, pure: every layer is a Mamba-2 mixer behind a norm (arXiv 2405.21060; transformers' models/mamba2). The head is tied where config.json says so.

What is peculiar to it, and where it is stated:
- The inner width is a whole number of times the hidden size: expand × hidden_size == num_heads × head_dim (`Expansion`). So hidden size and heads are cut
  together, at the teacher's expand, unless both are given.
- Where config.json says so, and it does so by default, the residual stream is float32 whatever the layers compute in (`float32_stream`).
- config.json has no max_position_embeddings; a state has no longest text.

Names, the table's rows and where activations are read are NemotronH's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import gcd, lcm
from typing import TYPE_CHECKING, Any

from memory_budget.architecture import Architecture
from minitron.families import config_json, nemotron_h
from minitron.families.base import Family
from minitron.families.config_json import kept_config, transformers_config

if TYPE_CHECKING:
    from torch import nn

# What the modules read of their configuration in a forward pass in eval mode; chunk_size only orders the additions.
COMPUTING = frozenset({
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "expand", "n_groups", "state_size", "conv_kernel",
    "use_conv_bias", "use_bias", "hidden_act", "layer_norm_epsilon", "residual_in_fp32", "time_step_limit", "tie_word_embeddings",
})  # fmt: skip
LEFT_OUT = ("time_step_rank", "intermediate_size", "d_inner", "mamba_d_ssm")  # of a teacher's config.json


@dataclass(frozen=True, slots=True)
class Expansion:
    """A coupling (nas.couplings). Of hidden size and heads the one that is not given follows from the others, at the teacher's expand, and heads in whole
    numbers for each group; where both are given, any whole expand will do."""

    fields: tuple[str, ...] = ("hidden", "mamba_num_heads", "mamba_head_dim")

    def holds(self, student: Architecture, teacher: Architecture) -> Any:
        """Number by number where sizes are arrays; not where one that follows is larger than the teacher's."""
        inner, within = student.mamba_inner, (student.hidden <= teacher.hidden) & (student.mamba_num_heads <= teacher.mamba_num_heads)
        return within & (inner > 0) & (student.hidden > 0) & (inner % (student.hidden + (student.hidden == 0)) == 0)

    def follower(self, given: Collection[str]) -> str | None:
        if "hidden" in given:
            return None if "mamba_num_heads" in given else "mamba_num_heads"
        return "hidden" if not set(self.fields).isdisjoint(given) else None

    def size(self, field: str, student: Architecture, teacher: Architecture) -> Any:
        """At the teacher's expand; 0 where it is no whole number, or no multiple of the groups."""
        if field == "hidden":
            inner, expand = student.mamba_inner, _expand(teacher)
            return inner // expand * (inner % expand == 0)
        inner, channels = student.hidden * _expand(teacher), student.mamba_head_dim
        return inner // channels * (inner % (channels * teacher.mamba_num_groups) == 0)

    def unit(self, field: str, teacher: Architecture) -> int:
        expand, channels, groups = _expand(teacher), teacher.mamba_head_dim, teacher.mamba_num_groups
        if field == "hidden":
            return groups * channels // gcd(groups * channels, expand)
        if field == "mamba_num_heads":
            return lcm(groups, expand // gcd(expand, channels))
        return expand // gcd(expand, teacher.mamba_num_heads)

    def __str__(self) -> str:
        return "expand × hidden_size == num_heads × head_dim with a whole expand"


def _expand(architecture: Architecture) -> int:
    return architecture.mamba_inner // architecture.hidden


def hf_config(teacher_config: dict, architecture: Architecture) -> dict:
    """The teacher's config.json with another architecture's sizes; what it says beyond sizes is kept.

    Left out are other names of the inner width, which some programs read in expand's stead, and time_step_rank, a number of the teacher's hidden size that
    nothing reads: without it transformers takes the student's own.
    """
    return {key: value for key, value in kept_config(teacher_config).items() if key not in LEFT_OUT} | {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "num_hidden_layers": architecture.num_layers,
        "hidden_size": architecture.hidden,
        "num_heads": architecture.mamba_num_heads,
        "head_dim": architecture.mamba_head_dim,
        "expand": _expand(architecture),
        "n_groups": architecture.mamba_num_groups,
        "state_size": architecture.mamba_state_size,
        "conv_kernel": architecture.mamba_conv_kernel,
        "vocab_size": architecture.vocab,
        "tie_word_embeddings": architecture.tied_embeddings,
        "use_bias": architecture.mamba_projection_bias,
        "use_conv_bias": architecture.mamba_conv_bias,
    }


def build_layer(config: dict, layer: int) -> nn.Module:
    """One layer alone, freshly initialised on the current default device."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Block

    return Mamba2Block(transformers_config(config), layer_idx=layer)


def build_outside(config: dict, part: str) -> nn.Module:
    """The final norm ("norm") or the output projection ("head") alone."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2RMSNorm

    return nemotron_h.outside_module(transformers_config(config), part, Mamba2RMSNorm)


def refused(config: dict) -> str | None:
    """An expansion that is no whole number, which transformers' configuration class refuses too."""
    expand = config.get("expand", 2)
    if not isinstance(expand, int) or isinstance(expand, bool) or expand < 1:
        return f"expand is {expand!r}; {Expansion()}, so it must be a whole number of at least 1"
    return None


def float32_stream(config: Mapping) -> bool:
    """Whether the residual stream is float32 whatever the layers compute in."""
    return config.get("residual_in_fp32", True)


FAMILY = Family(
    model_type="mamba2",
    table=nemotron_h.MAMBA_TABLE,
    axis_sizes=nemotron_h.axis_sizes,
    hf_config=hf_config,
    canonical_name=nemotron_h.canonical_name,
    file_name=nemotron_h.file_name,
    parts=nemotron_h.parts,
    layer_taps=nemotron_h.layer_taps,
    load=config_json.load,
    build=config_json.build,
    build_layer=build_layer,
    build_outside=build_outside,
    outside_names=nemotron_h.OUTSIDE_NAMES,
    rms_epsilon=nemotron_h.rms_epsilon,
    handed_over=lambda config: config,
    computing=lambda _full: COMPUTING,
    couplings=(Expansion(),),
    refused=refused,
    float32_stream=float32_stream,
    decodes_without_attention=True,
)
