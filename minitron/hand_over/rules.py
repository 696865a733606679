"""Which rules of other programs hold for which family of models."""

from collections.abc import Mapping, Sequence

from minitron.hand_over import rules_gemma3, rules_granite, rules_mamba2, rules_nemotron_h
from minitron.hand_over.compatibility import Rule
from minitron.hand_over.rules_blocks import LLAMA_RULES, MISTRAL_RULES, QWEN2_RULES, QWEN3_MOE_RULES, QWEN3_RULES

RULES: Mapping[str, Sequence[Rule]] = {
    "nemotron_h": rules_nemotron_h.RULES, "llama": LLAMA_RULES, "mistral": MISTRAL_RULES, "qwen2": QWEN2_RULES, "qwen3": QWEN3_RULES,
    "qwen3_moe": QWEN3_MOE_RULES,
    "gemma3_text": rules_gemma3.RULES, "mamba2": rules_mamba2.RULES, "granitemoehybrid": rules_granite.RULES,
}  # fmt: skip
