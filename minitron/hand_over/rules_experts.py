"""What other programs ask of a folder with experts, beside what they ask of the rest of it: of NemotronH, and of Qwen3 with experts (rules_blocks.py).

Read in their sources: transformers 5.23 (integrations/moe.py; models/nemotron_h, qwen3_moe); vLLM 0.32.0 (models/nemotron_h.py, qwen3_moe.py;
layers/fused_moe/config.py and experts/cpu_moe.py), and seen there on a CPU; llama.cpp of 2026 (conversion/nemotron.py, base.py, qwen.py;
src/models/nemotron-h.cpp, qwen3moe.cpp; src/llama-model.cpp); mlx-lm of 2026 (mlx_lm/models/nemotron_h.py); TensorRT-LLM of 2026
(tensorrt_llm/_torch/models/modeling_nemotron_h.py).
"""

from collections.abc import Callable, Sequence

from minitron.families.row_lengths import GROUPED_BYTES
from minitron.hand_over.compatibility import LLAMA_CPP, MLX_LM, TENSORRT_LLM, TRANSFORMERS, VLLM, Folder, Rule, given, says

VLLM_CPU_MULTIPLE = 32  # of what gated experts read and write, of its kernels for CPUs
# Keys that programs read without a default where there are experts.
LLAMA_CPP_KEYS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size", "n_shared_experts", "n_group",
                  "norm_topk_prob", "routed_scaling_factor")  # fmt: skip
MLX_LM_KEYS = (*LLAMA_CPP_KEYS, "topk_group")


def _number_bytes(folder: Folder) -> int:
    return 4 if folder.config.get("dtype", folder.config.get("torch_dtype")) == "float32" else 2


def expert_rows(width: Callable[[Folder], str], neurons: str = "moe_intermediate_size") -> Rule:
    """The rows of experts' matrices, `width` naming what experts read and write. Where they do not fit, transformers loads the model and fails at the first
    text."""

    def odd(folder: Folder) -> str:
        return ", ".join(f"{name} {folder.size(name):,}" for name in (width(folder), neurons)
                         if folder.size(name) * _number_bytes(folder) % GROUPED_BYTES)  # fmt: skip

    return Rule(TRANSFORMERS, "rows of experts", f"must be multiples of {GROUPED_BYTES} bytes: its grouped products take no other strides, and only "
                'experts_implementation="eager" does without them', lambda folder: not odd(folder), lambda folder: odd(folder) or "all are")  # fmt: skip


def given_where(has_experts: Callable[[Folder], bool], program: str, keys: Sequence[str], otherwise: str) -> Rule:
    """All of some keys are there where there are experts."""

    def absent(folder: Folder) -> str:
        return ", ".join(key for key in keys if key not in folder.config) if has_experts(folder) else ""

    return Rule(program, "keys of experts", f"must all be given: {otherwise}", lambda folder: not absent(folder),
                lambda folder: f"without {found}" if (found := absent(folder)) else "all there")  # fmt: skip


def nemotron_h_rules(pattern_of: Callable[[Folder], str]) -> tuple[Rule, ...]:
    """Of NemotronH, where its pattern has an E; a dense one keeps them all."""

    def has_experts(folder: Folder) -> bool:
        return "E" in pattern_of(folder)

    def where(holds: Callable[[Folder], bool | None]) -> Callable[[Folder], bool | None]:
        return lambda folder: not has_experts(folder) or holds(folder)

    def width(folder: Folder) -> str:
        return "moe_latent_size" if folder.config.get("moe_latent_size") else "hidden_size"

    no_biases = "must be false where there are experts"
    rows = expert_rows(width)
    return (
        Rule(TRANSFORMERS, rows.field, rows.rule, where(rows.holds), rows.shown),
        Rule(TRANSFORMERS, "n_group", "must divide n_routed_experts, two experts in a group at least: a group is judged by its best two",
             where(lambda folder: folder.size("n_group") == 1 or folder.size("n_group") > 0 == folder.size("n_routed_experts") % folder.size("n_group")
                   and folder.size("n_routed_experts") >= 2 * folder.size("n_group"))),
        Rule(VLLM, "mlp_bias", f"{no_biases}: it leaves out the shared expert's biases without a word, another model", where(says("mlp_bias", False, None))),
        Rule(VLLM, "n_shared_experts", "must be 1: it multiplies the shared expert's width by it", where(says("n_shared_experts", 1))),
        Rule(VLLM, "hybrid_override_pattern", "should have no E for a CPU: there it has no kernel for experts that are not gated",
             lambda folder: not has_experts(folder), is_advice=True),
        Rule(LLAMA_CPP, "num_experts_per_tok", "must be there where there are experts, and absent where there are none: a model with it is taken for a mixture",
             lambda folder: ("num_experts_per_tok" in folder.config) == has_experts(folder)),
        Rule(LLAMA_CPP, "kinds of FFN", "must have no - where there are experts: it knows one kind of FFN in a model",
             lambda folder: not {"E", "-"} <= set(pattern_of(folder)), pattern_of),
        given_where(has_experts, LLAMA_CPP, LLAMA_CPP_KEYS, "its converter asks for them"),
        Rule(LLAMA_CPP, "mlp_bias", f"{no_biases}: its shared expert has none", where(says("mlp_bias", False, None))),
        Rule(LLAMA_CPP, "topk_group", "must be below n_group where that is above 1",
             where(lambda folder: folder.size("n_group") <= 1 or 0 < folder.size("topk_group") < folder.size("n_group"))),
        given_where(has_experts, MLX_LM, MLX_LM_KEYS, "it has no defaults for them, and without n_shared_experts no shared expert"),
        Rule(MLX_LM, "num_experts_per_tok", "must be above 1 where norm_topk_prob is true: it makes no single weight 1",
             where(lambda folder: folder.size("num_experts_per_tok") > 1 or folder.config.get("norm_topk_prob") is False)),
        Rule(TENSORRT_LLM, "n_shared_experts", "must be 1: it multiplies the shared expert's width by it", where(says("n_shared_experts", 1))),
    )  # fmt: skip


def dense_layers(folder: Folder) -> list[int]:
    """Blocks of Qwen3 that have an FFN in place of experts."""
    listed, step = folder.config.get("mlp_only_layers") or (), folder.size("decoder_sparse_step") or 1
    return [layer for layer in range(folder.size("num_hidden_layers")) if layer in listed or (layer + 1) % step]


def _dense_text(folder: Folder) -> str:
    return f"FFN in {len(dense_layers(folder)):,} of {folder.size('num_hidden_layers'):,} layers"


OF_QWEN3_MOE = (
    expert_rows(lambda _: "hidden_size"),
    Rule(VLLM, "num_experts", "must be given", given("num_experts", "num_local_experts")),
    Rule(VLLM, "mlp_only_layers", "must leave a layer with experts: without one it stops",
         lambda folder: len(dense_layers(folder)) < folder.size("num_hidden_layers"), _dense_text),
    Rule(VLLM, "layer_types", "must be absent: windows would be where it says, and transformers has them in all layers or in none",
         lambda folder: folder.config.get("layer_types") is None,
         lambda folder: "absent" if folder.config.get("layer_types") is None else f"{len(folder.config['layer_types']):,} entries"),
    Rule(VLLM, "attention_bias", "must be false: it leaves out the output projection's bias without a word, another model",
         says("attention_bias", False, None)),
    Rule(VLLM, "hidden_size", f"should be a multiple of {VLLM_CPU_MULTIPLE} for a CPU: its kernels for experts there take no other",
         lambda folder: folder.size("hidden_size") % VLLM_CPU_MULTIPLE == 0, is_advice=True),
    Rule(LLAMA_CPP, "attention_bias", "must be false: its output projection has no bias", says("attention_bias", False, None)),
    Rule(LLAMA_CPP, "use_sliding_window", "must be false: it has no windows", says("use_sliding_window", False, None)),
    Rule(LLAMA_CPP, "mlp_only_layers", "must leave experts in all layers: its loader asks for them in each", lambda folder: not dense_layers(folder),
         _dense_text),
    Rule(LLAMA_CPP, "norm_topk_prob", "must be true: it always makes the weights of a token's experts add up to 1", says("norm_topk_prob", True)),
    Rule(LLAMA_CPP, "num_experts_per_tok", "must be given", given("num_experts_per_tok")),
)  # fmt: skip
