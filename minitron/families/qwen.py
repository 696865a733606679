"""Qwen3, dense and with experts (transformers' models/qwen3, qwen3_moe); and what Qwen2 and Qwen3 say of windows: none, or one for some of the layers.

Qwen3 has Llama's blocks with a norm over every query's and key's channels before they are turned. It has one weight of head_dim for all heads, so heads are cut
without it; head_dim is a number of its own and no axis. With experts, a router sends every token to some of them by a softmax over all, and their weights are
made to add up to 1 where `norm_topk_prob` says so. Which blocks have an FFN in their place, config.json says by number; a window is there for all blocks or
none, and `layer_types`, which transformers would ignore and vLLM obey, is not written.

transformers takes the kind of every layer from `layer_types`; older versions, and other programs, know only the number of the first layer with a window,
`max_window_layers`. Both are written. Of layers whose windows come and go the number says the first one too: it must not be the number of layers, which vLLM
takes for no window at all.
"""

from memory_budget.architecture import WINDOWED, Architecture
from minitron.families.blocks import EXPERTS_TABLE, Blocks, attention_types, block_family

COMPUTING = ("sliding_window",)  # None where use_sliding_window is false; which layers have it, layer_types says


def windows(teacher: dict, architecture: Architecture) -> dict:
    """The keys of a student's config.json that say which of its layers have a window."""
    types = attention_types(architecture)
    if WINDOWED not in architecture.pattern:
        listed = {"layer_types": types} if "layer_types" in teacher else {}
        return {"use_sliding_window": False, "max_window_layers": architecture.num_layers, **listed}
    return {"use_sliding_window": True, "sliding_window": architecture.window, "max_window_layers": types.index("sliding_attention"), "layer_types": types}


def _config(teacher: dict, architecture: Architecture) -> dict:
    return {"architectures": ["Qwen3ForCausalLM"], **windows(teacher, architecture)}


def _moe_config(teacher: dict, architecture: Architecture) -> dict:
    window = {"sliding_window": architecture.window} if architecture.window else {}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "use_sliding_window": bool(window),
        **window,
        "num_experts": architecture.moe_num_experts,
        "num_experts_per_tok": architecture.moe_experts_per_token,
        "moe_intermediate_size": architecture.moe_ffn,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, kind in enumerate(architecture.layer_kinds) if "E" not in kind],
        "norm_topk_prob": teacher.get("norm_topk_prob", False),
    }


QWEN3 = block_family("qwen3", Blocks("qwen3", "Qwen3"), config=_config, computing_too=COMPUTING)
QWEN3_MOE = block_family(
    "qwen3_moe", Blocks("qwen3_moe", "Qwen3Moe"), config=_moe_config, dropped=("num_local_experts", "layer_types", "max_window_layers"), table=EXPERTS_TABLE,
    computing_too=("sliding_window", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers",
                   "norm_topk_prob"),  # num_local_experts: what transformers calls num_experts
)  # fmt: skip
