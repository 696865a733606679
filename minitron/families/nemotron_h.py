"""NemotronH: Mamba-2, attention, squared-ReLU FFN and expert layers in one residual stream (N2, arXiv 2508.14444; experts: Nemotron 3).

Experts are no gated ones. Routed ones read the stream, or a latent of it that is kept whole; the router and the shared expert read the stream.
Letters: M Mamba heads, P head dim, G groups, N state, D hidden, F ffn, Q query heads, K KV heads, H head dim, E experts.
Tensor names on disk are NVIDIA's (`backbone.…`); transformers' in-memory names say `model.…`; here both
lose that prefix ("canonical").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_budget.architecture import Architecture
from minitron.families import config_json
from minitron.families.base import (
    ATTENTION_HEAD,
    EXPERT,
    EXPERT_FFN,
    FFN,
    HIDDEN,
    KEY_VALUE_HEAD,
    MAMBA_CHANNEL,
    MAMBA_HEAD,
    ROUTER,
    SHARED_FFN,
    Family,
    ModelParts,
    Tap,
    TensorAxes,
)  # fmt: skip
from minitron.families.config_json import kept_config, transformers_config

if TYPE_CHECKING:
    import torch
    from torch import nn

_HIDDEN = ((HIDDEN,),)
_FFN = ((FFN,),)
_INNER = ((MAMBA_HEAD, MAMBA_CHANNEL),)
_HEADS = ((MAMBA_HEAD,),)
_STATES = ("mamba_group", "mamba_state")
_CONV = (*_INNER, _STATES, _STATES)
_QUERY = ((ATTENTION_HEAD, "attention_channel"),)
_KEY_VALUE = ((KEY_VALUE_HEAD, "attention_channel"),)
_EXPERTS, _NEURONS, _SHARED, _LATENT = ((EXPERT,),), ((EXPERT_FFN,),), ((SHARED_FFN,),), (("moe_latent",),)

# What a Mamba-2 model has, whatever else its layers are; without a head of its own where that is the table of embeddings.
MAMBA_TABLE = (
    TensorAxes("embeddings.weight", "", ((("vocab",),), _HIDDEN)),
    TensorAxes("norm_f.weight", "", (_HIDDEN,)),
    TensorAxes("lm_head.weight", "", ((("vocab",),), _HIDDEN), only_if="has_own_head"),
    TensorAxes("norm.weight", "any", (_HIDDEN,)),
    TensorAxes("mixer.in_proj.weight", "M", ((*_INNER, *_CONV, *_HEADS), _HIDDEN)),
    TensorAxes("mixer.in_proj.bias", "M", ((*_INNER, *_CONV, *_HEADS),), only_if="mamba_projection_bias"),
    TensorAxes("mixer.conv1d.weight", "M", (_CONV, (("one",),), (("conv_kernel",),))),
    TensorAxes("mixer.conv1d.bias", "M", (_CONV,), only_if="mamba_conv_bias"),
    TensorAxes("mixer.A_log", "M", (_HEADS,)),
    TensorAxes("mixer.D", "M", (_HEADS,)),
    TensorAxes("mixer.dt_bias", "M", (_HEADS,)),
    TensorAxes("mixer.norm.weight", "M", (_INNER,)),
    TensorAxes("mixer.out_proj.weight", "M", (_HIDDEN, _INNER)),
    TensorAxes("mixer.out_proj.bias", "M", (_HIDDEN,), only_if="mamba_projection_bias"),
)
TABLE = (
    *MAMBA_TABLE,
    TensorAxes("mixer.up_proj.weight", "-", (_FFN, _HIDDEN)),
    TensorAxes("mixer.up_proj.bias", "-", (_FFN,), only_if="ffn_bias"),
    TensorAxes("mixer.down_proj.weight", "-", (_HIDDEN, _FFN)),
    TensorAxes("mixer.down_proj.bias", "-", (_HIDDEN,), only_if="ffn_bias"),
    TensorAxes("mixer.q_proj.weight", "*", (_QUERY, _HIDDEN)),
    TensorAxes("mixer.k_proj.weight", "*", (_KEY_VALUE, _HIDDEN)),
    TensorAxes("mixer.v_proj.weight", "*", (_KEY_VALUE, _HIDDEN)),
    TensorAxes("mixer.o_proj.weight", "*", (_HIDDEN, _QUERY)),
    TensorAxes(ROUTER, "E", (_EXPERTS, _HIDDEN)),
    TensorAxes("mixer.gate.e_score_correction_bias", "E", (_EXPERTS,), buffer=True),
    TensorAxes("mixer.experts.*.up_proj.weight", "E", (_NEURONS, _HIDDEN), only_if="experts_read_stream"),
    TensorAxes("mixer.experts.*.down_proj.weight", "E", (_HIDDEN, _NEURONS), only_if="experts_read_stream"),
    TensorAxes("mixer.experts.*.up_proj.weight", "E", (_NEURONS, _LATENT), only_if="moe_latent"),
    TensorAxes("mixer.experts.*.down_proj.weight", "E", (_LATENT, _NEURONS), only_if="moe_latent"),
    TensorAxes("mixer.fc1_latent_proj.weight", "E", (_LATENT, _HIDDEN), only_if="moe_latent"),
    TensorAxes("mixer.fc1_latent_proj.bias", "E", (_LATENT,), only_if="moe_latent_bias"),
    TensorAxes("mixer.fc2_latent_proj.weight", "E", (_HIDDEN, _LATENT), only_if="moe_latent"),
    TensorAxes("mixer.fc2_latent_proj.bias", "E", (_HIDDEN,), only_if="moe_latent_bias"),
    TensorAxes("mixer.shared_experts.up_proj.weight", "E", (_SHARED, _HIDDEN)),
    TensorAxes("mixer.shared_experts.up_proj.bias", "E", (_SHARED,), only_if="ffn_bias"),
    TensorAxes("mixer.shared_experts.down_proj.weight", "E", (_HIDDEN, _SHARED)),
    TensorAxes("mixer.shared_experts.down_proj.bias", "E", (_HIDDEN,), only_if="ffn_bias"),
)
# What the modules read of their configuration in a forward pass in eval mode. time_step_limit is read by the code that NVIDIA publishes, not by transformers';
# time_step_min, by which transformers clamps while it reads a prompt, is lifted here and in what is handed over. chunk_size only orders the additions.
COMPUTING = frozenset({
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "layers_block_type", "num_attention_heads", "num_key_value_heads", "head_dim",
    "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "use_conv_bias", "use_bias", "mlp_bias", "mlp_hidden_act",
    "mamba_hidden_act", "layer_norm_epsilon", "time_step_limit", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
    "moe_shared_expert_intermediate_size", "moe_latent_size", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
})  # fmt: skip
OUTSIDE_NAMES = {"embed": "embeddings.", "norm": "norm_f.", "head": "lm_head."}
LAYER_NORM_EPSILON = 1e-5  # of transformers' configuration class, where config.json has none
# Names of what a student's config.json says by the published name: of the pattern, and those that transformers takes for sizes of Mamba-2.
OTHER_SPELLINGS = ("layers_block_type", "layer_types", "mamba_n_groups", "mamba_d_conv", "mamba_conv_bias")
ROUTING = {"norm_topk_prob": True, "routed_scaling_factor": 1.0}  # of transformers' configuration class; llama.cpp and mlx-lm have no defaults for them
# A dense model that carries these is taken for a mixture of experts by other runtimes.
MOE_KEYS = (
    "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "num_local_experts", "moe_intermediate_size", "moe_latent_size",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_overlap", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
    "output_router_logits",
)  # fmt: skip


def axis_sizes(architecture: Architecture) -> Mapping[str, int]:
    """Length of every axis of TABLE."""
    return {
        HIDDEN: architecture.hidden,
        FFN: architecture.ffn,
        MAMBA_HEAD: architecture.mamba_num_heads,
        MAMBA_CHANNEL: architecture.mamba_head_dim,
        ATTENTION_HEAD: architecture.num_attention_heads,
        "vocab": architecture.vocab,
        "mamba_group": architecture.mamba_num_groups,
        "mamba_state": architecture.mamba_state_size,
        "conv_kernel": architecture.mamba_conv_kernel,
        KEY_VALUE_HEAD: architecture.num_key_value_heads,
        "attention_channel": architecture.attention_head_dim,
        EXPERT: architecture.moe_num_experts,
        EXPERT_FFN: architecture.moe_ffn,
        SHARED_FFN: architecture.moe_shared_ffn,
        "moe_latent": architecture.moe_latent,
        "one": 1,
    }


def hf_config(teacher_config: dict, architecture: Architecture) -> dict:
    """The teacher's config.json with another architecture's sizes; what it says beyond sizes is kept.

    The pattern is spelled as published, `hybrid_override_pattern`, and so every reader takes it. In the configuration class that NVIDIA publishes
    beside its weights `layers_block_type` is a property that cannot be set, and mlx-lm knows only its older names of layers.
    """
    config = {key: value for key, value in kept_config(teacher_config).items() if key not in OTHER_SPELLINGS}
    epsilon = config.get("layer_norm_epsilon", LAYER_NORM_EPSILON)
    config |= {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": architecture.pattern,
        "num_hidden_layers": architecture.num_layers,
        "hidden_size": architecture.hidden,
        "vocab_size": architecture.vocab,
        "intermediate_size": architecture.ffn,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_key_value_heads,
        "head_dim": architecture.attention_head_dim,
        "mamba_num_heads": architecture.mamba_num_heads,
        "mamba_head_dim": architecture.mamba_head_dim,
        "n_groups": architecture.mamba_num_groups,
        "ssm_state_size": architecture.mamba_state_size,
        "conv_kernel": architecture.mamba_conv_kernel,
        "tie_word_embeddings": False,
        "layer_norm_epsilon": epsilon,
        "rms_norm_eps": epsilon,  # llama.cpp's and TensorRT-LLM's name for it
        # Biases, which mlx-lm has no defaults for; it reads mamba_proj_bias where the others read use_bias.
        "use_bias": architecture.mamba_projection_bias,
        "mamba_proj_bias": architecture.mamba_projection_bias,
        "use_conv_bias": architecture.mamba_conv_bias,
        "mlp_bias": architecture.ffn_bias,
        "attention_bias": False,
    }
    if "attention_head_dim" in config:
        config["attention_head_dim"] = architecture.attention_head_dim
    if "E" in architecture.pattern:
        return ROUTING | {key: value for key, value in config.items() if key != "num_local_experts"} | _expert_sizes(architecture)
    return {key: value for key, value in config.items() if key not in MOE_KEYS}


def _expert_sizes(architecture: Architecture) -> dict:
    return {
        "n_routed_experts": architecture.moe_num_experts,
        "num_experts_per_tok": architecture.moe_experts_per_token,
        "moe_intermediate_size": architecture.moe_ffn,
        "moe_shared_expert_intermediate_size": architecture.moe_shared_ffn,
        "moe_latent_size": architecture.moe_latent or None,
        "n_shared_experts": 1,  # transformers makes one of that width, whatever is said here; others multiply the width by it
        "n_group": architecture.moe_groups,
        "topk_group": architecture.moe_groups_per_token,
    }


def handed_over(config: dict) -> dict:
    """transformers clamps time steps from below at time_step_min, which elsewhere is but the least initial step; see _block.

    Nearly 0 clamps nothing; 0 itself would have no logarithm where someone initialises a model from it.
    """
    return config | {"time_step_min": 1e-30}


def canonical_name(name: str) -> str:
    """A tensor's name without the prefix that differs between disk (`backbone.`) and memory (`model.`)."""
    return re.sub(r"^(backbone|model)\.", "", name)


def file_name(canonical: str) -> str:
    """The name NVIDIA publishes."""
    return canonical if canonical.startswith("lm_head.") else f"backbone.{canonical}"


def parts(model: nn.Module) -> ModelParts:
    base = model.base_model
    return ModelParts(embed=base.embeddings, layers=list(base.layers), norm=base.norm_f, head=model.lm_head)


def layer_taps(architecture: Architecture, layer: int, block: nn.Module) -> list[Tap]:
    """Where a layer's width importance is read (SSM, arXiv 2504.11409: the x slice of in_proj scores best for Mamba)."""
    found = [Tap(HIDDEN, layer, block.norm, "output", 0, (architecture.hidden,))]
    kind = architecture.pattern[layer]
    if kind == "M":
        heads = (architecture.mamba_num_heads, architecture.mamba_head_dim)
        found.append(Tap(MAMBA_HEAD, layer, block.mixer.in_proj, "output", architecture.mamba_inner, heads))
    elif kind == "-":
        found.append(Tap(FFN, layer, block.mixer.down_proj, "input", 0, (architecture.ffn,)))
    elif kind == "*":
        heads = (architecture.num_attention_heads, architecture.attention_head_dim)
        found.append(Tap(ATTENTION_HEAD, layer, block.mixer.o_proj, "input", 0, heads))
    elif kind == "E":
        found.append(Tap(SHARED_FFN, layer, block.mixer.shared_experts.down_proj, "input", 0, (architecture.moe_shared_ffn,)))
    return found


def load(folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """The checkpoint as transformers' own model, in eval mode, with experts one by one (experts.py); dtype None keeps the stored one."""
    return _ours(config_json.load(folder, dtype=dtype, device=device))


def build(config: dict) -> nn.Module:
    """A freshly initialised float32 model of a config.json dict; on the meta device there is nothing to initialise."""
    return _ours(config_json.build(config))


def build_layer(config: dict, layer: int) -> nn.Module:
    """One layer alone, freshly initialised on the current default device."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock

    return _block(NemotronHBlock(transformers_config(config), layer_idx=layer))


def build_outside(config: dict, part: str) -> nn.Module:
    """The final norm ("norm") or the output projection ("head") alone."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm

    return outside_module(transformers_config(config), part, NemotronHRMSNorm)


def outside_module(sizes: Any, part: str, norm: type[nn.Module]) -> nn.Module:
    """The same of transformers' configuration object and a norm's class."""
    from torch import nn

    if part == "norm":
        return norm(sizes.hidden_size, eps=sizes.layer_norm_epsilon)
    return nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)


def rms_epsilon(config: dict) -> float:
    return transformers_config(config).layer_norm_epsilon


def _ours(model: nn.Module) -> nn.Module:
    for block in model.base_model.layers:
        _block(block)
    return model


def _block(block: nn.Module) -> nn.Module:
    """A layer that decodes as it reads a prompt, with experts one by one.

    transformers clamps dt from below in its chunked path only, so decoding would differ from prefill by 6e-3. (0, inf) is what the original code and vLLM
    use; with it both paths agree to 2e-6.
    """
    if hasattr(block.mixer, "time_step_limit"):
        block.mixer.time_step_limit = (0.0, float("inf"))
    if hasattr(block.mixer, "experts"):
        from minitron.families.experts import unstacked

        block.mixer.experts = unstacked(block.mixer.experts, gated=False)
    return block


FAMILY = Family(
    model_type="nemotron_h",
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
    outside_names=OUTSIDE_NAMES,
    rms_epsilon=rms_epsilon,
    handed_over=handed_over,
    computing=lambda _full: COMPUTING,
)
