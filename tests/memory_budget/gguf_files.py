"""Tiny GGUF files, written with the gguf package: the metadata and tensors that llama.cpp asks of a few kinds of models (its src/models)."""

import math
import os
from pathlib import Path

import gguf
import numpy as np

from memory_budget.architecture import Architecture

GGUF_NAMES = {"llama": "llama", "qwen3": "qwen3", "gemma3_text": "gemma3", "nemotron_h": "nemotron_h", "mamba2": "mamba2"}


def write_gguf(path: Path, architecture: Architecture, *, type_name: str = "F32", empty: bool = False) -> None:
    """A model with random weights: matrices in that type, all else in F32. empty: the file has its full length but nothing in it, hence no blocks on the disk;
    that is enough for llama.cpp where it is told to allot nothing."""
    tensors = tensors_of(architecture)
    writer = gguf.GGUFWriter(path, GGUF_NAMES[architecture.model_type] + "_moe" * ("E" in architecture.pattern))
    _write_metadata(writer, architecture)
    random, length = np.random.default_rng(0), 0
    for name, shape in tensors.items():
        is_matrix = len(shape) > 1 and name.endswith(".weight") and not any(part in name for part in ("_norm", "conv1d", "ffn_gate_inp"))
        kind = gguf.GGMLQuantizationType[type_name] if is_matrix else gguf.GGMLQuantizationType.F32
        if empty:
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            size = math.prod(shape) // block * block_bytes
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
            length += gguf.GGUFWriter.ggml_pad(size, writer.data_alignment)
        else:
            writer.add_tensor(name, gguf.quants.quantize(random.standard_normal(shape, dtype=np.float32) * np.float32(0.02), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file() if empty else writer.write_tensors_to_file()
    writer.close()
    if empty:
        os.truncate(path, gguf.GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment) + length)


def tensors_of(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes by name, as numpy has them: rows first."""
    hidden, vocab = architecture.hidden, architecture.vocab
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if architecture.has_own_head:
        tensors["output.weight"] = (vocab, hidden)
    for layer, letters in enumerate(architecture.layer_kinds):
        of_layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (hidden,)}
        for letter in letters:
            of_layer |= {"*": _attention, "W": _attention, "-": _feed_forward, "M": _mamba2, "E": _experts}[letter](architecture)
        if architecture.sublayers_per_layer > 1:
            of_layer["ffn_norm.weight"] = (hidden,)
        if architecture.post_norms:
            of_layer |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
        tensors |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    return tensors


def _attention(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    head_dim, hidden = architecture.attention_head_dim, architecture.hidden
    queries, keys = architecture.num_attention_heads * head_dim, architecture.num_key_value_heads * head_dim
    norms = {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)} if architecture.attention_qk_norm else {}
    return norms | {
        "attn_q.weight": (queries, hidden),
        "attn_k.weight": (keys, hidden),
        "attn_v.weight": (keys, hidden),
        "attn_output.weight": (hidden, queries),
    }


def _feed_forward(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    ffn, hidden = architecture.ffn, architecture.hidden
    gate = {"ffn_gate.weight": (ffn, hidden)} if architecture.ffn_gated else {}
    return {"ffn_up.weight": (ffn, hidden), "ffn_down.weight": (hidden, ffn)} | gate


def _experts(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    experts, neurons, shared, hidden = architecture.moe_num_experts, architecture.moe_ffn, architecture.moe_shared_ffn, architecture.hidden
    return {
        "ffn_gate_inp.weight": (experts, hidden),
        "exp_probs_b.bias": (experts,),
        "ffn_up_exps.weight": (experts, neurons, hidden),
        "ffn_down_exps.weight": (experts, hidden, neurons),
        "ffn_up_shexp.weight": (shared, hidden),
        "ffn_down_shexp.weight": (hidden, shared),
    }


def _mamba2(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    inner, heads, channels, hidden = architecture.mamba_inner, architecture.mamba_num_heads, architecture.mamba_conv_channels, architecture.hidden
    groups = architecture.mamba_num_groups
    return {
        "ssm_in.weight": (inner + channels + heads, hidden),
        "ssm_conv1d.weight": (channels, architecture.mamba_conv_kernel),
        "ssm_conv1d.bias": (channels,),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads, 1),
        "ssm_d": (heads, 1),
        "ssm_norm.weight": (groups, inner // groups),
        "ssm_out.weight": (hidden, inner),
    }


def _write_metadata(writer: gguf.GGUFWriter, architecture: Architecture) -> None:
    layers = architecture.layer_kinds
    writer.add_block_count(len(layers))
    writer.add_context_length(1 << 17)
    writer.add_embedding_length(architecture.hidden)
    writer.add_vocab_size(architecture.vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture.sublayers_per_layer > 1:
        writer.add_feed_forward_length(architecture.ffn)
        writer.add_head_count(architecture.num_attention_heads)
        writer.add_head_count_kv(architecture.num_key_value_heads)
    else:
        writer.add_feed_forward_length([{"-": architecture.ffn, "E": architecture.moe_ffn}.get(kind, 0) for kind in layers])
        writer.add_head_count(architecture.num_attention_heads)
        writer.add_head_count_kv([architecture.num_key_value_heads if kind == "*" else 0 for kind in layers])
        writer.add_layer_norm_eps(1e-5)
    if architecture.attention_head_dim:
        writer.add_key_length(architecture.attention_head_dim)
        writer.add_value_length(architecture.attention_head_dim)
        writer.add_rope_dimension_count(architecture.attention_head_dim)
    if "E" in architecture.pattern:
        writer.add_expert_count(architecture.moe_num_experts)
        writer.add_expert_used_count(architecture.moe_experts_per_token)
        writer.add_expert_feed_forward_length(architecture.moe_ffn)
        writer.add_expert_shared_feed_forward_length(architecture.moe_shared_ffn)
        writer.add_expert_shared_count(1)
    if architecture.window:
        writer.add_sliding_window(architecture.window)
    if "M" in architecture.pattern:
        writer.add_ssm_conv_kernel(architecture.mamba_conv_kernel)
        writer.add_ssm_inner_size(architecture.mamba_inner)
        writer.add_ssm_state_size(architecture.mamba_state_size)
        writer.add_ssm_time_step_rank(architecture.mamba_num_heads)
        writer.add_ssm_group_count(architecture.mamba_num_groups)
