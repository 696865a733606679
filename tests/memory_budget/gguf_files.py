"""Tiny GGUF files, written with the gguf package: the metadata and tensors that llama.cpp asks of a few kinds of models (its src/models)."""

import math
import os
from pathlib import Path

import gguf
import numpy as np

from memory_budget.architecture import Architecture

GGUF_NAMES = {"llama": "llama", "qwen3": "qwen3", "gemma3_text": "gemma3", "nemotron_h": "nemotron_h", "mamba2": "mamba2"}
Metadata = dict[str, int | float | list[int]]


def write_gguf(path: Path, architecture: Architecture, *, empty: bool = False) -> None:
    """A model in F32 with random weights; or empty, as write_empty makes it."""
    name = GGUF_NAMES[architecture.model_type] + "_moe" * ("E" in architecture.pattern)
    if empty:
        return write_empty(path, name, metadata_of(architecture), tensors_of(architecture))
    writer, random = _begun(path, name, metadata_of(architecture)), np.random.default_rng(0)
    for tensor, shape in tensors_of(architecture).items():
        writer.add_tensor(tensor, random.standard_normal(shape, dtype=np.float32) * np.float32(0.02))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return None


def write_empty(path: Path, name: str, metadata: Metadata, tensors: dict[str, tuple[int, ...]]) -> None:
    """A file of F32 tensors of its full length with nothing in it, hence without blocks on the disk: all zeros to who reads it."""
    writer, length = _begun(path, name, metadata), 0
    for tensor, shape in tensors.items():
        size = math.prod(shape) * np.dtype(np.float32).itemsize
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), size)
        length += gguf.GGUFWriter.ggml_pad(size, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, gguf.GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment) + length)


def _begun(path: Path, name: str, metadata: Metadata) -> gguf.GGUFWriter:
    """With the metadata, whose keys are without the type's name."""
    writer = gguf.GGUFWriter(path, name)
    writer.add_tokenizer_model("no_vocab")
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        add = writer.add_array if isinstance(value, list) else writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{name}.{key}", value)
    return writer


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


def metadata_of(architecture: Architecture) -> Metadata:
    """By the names that GGUF has for them, without the type's before it."""
    layers, blocks = architecture.layer_kinds, architecture.sublayers_per_layer > 1
    neurons = {"-": architecture.ffn, "E": architecture.moe_ffn}
    metadata: Metadata = {
        "block_count": len(layers),
        "context_length": 1 << 17,
        "embedding_length": architecture.hidden,
        "vocab_size": architecture.vocab,
        "attention.head_count": architecture.num_attention_heads,
        "feed_forward_length": architecture.ffn if blocks else [neurons.get(kind, 0) for kind in layers],
        "attention.head_count_kv": architecture.num_key_value_heads if blocks else [architecture.num_key_value_heads * (kind == "*") for kind in layers],
    }
    if not blocks:
        metadata["attention.layer_norm_epsilon"] = 1e-5
    if architecture.attention_head_dim:
        metadata |= dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), architecture.attention_head_dim)
    if "E" in architecture.pattern:
        metadata |= {"expert_count": architecture.moe_num_experts, "expert_used_count": architecture.moe_experts_per_token, "expert_shared_count": 1,
                     "expert_feed_forward_length": architecture.moe_ffn, "expert_shared_feed_forward_length": architecture.moe_shared_ffn}  # fmt: skip
    if architecture.window:
        metadata["attention.sliding_window"] = architecture.window
    if "M" in architecture.pattern:
        metadata |= {"ssm.conv_kernel": architecture.mamba_conv_kernel, "ssm.inner_size": architecture.mamba_inner,
                     "ssm.state_size": architecture.mamba_state_size, "ssm.time_step_rank": architecture.mamba_num_heads,
                     "ssm.group_count": architecture.mamba_num_groups}  # fmt: skip
    return metadata
