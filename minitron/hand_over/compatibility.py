"""What other programs ask of a folder, field by field, and whether one has it. Nothing of theirs is imported.

Read in their sources: transformers 5.23; vLLM 0.32.0 (models/nemotron_h.py, mamba/mamba_mixer2.py, mamba/ops/ssd_combined.py, attention/backends/
flash_attn.py); llama.cpp's convert_hf_to_gguf.py of 2026 (NemotronHForCausalLM and its parents) with the tensors its loader creates. Of Llama's and
Qwen3's folders there are those rules that are no family's own, and what transformers' configuration classes check.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memory_budget.architecture import BLOCK_TYPES
from memory_budget.hf_config import BLOCK_TYPE_LETTERS

TRANSFORMERS, VLLM, LLAMA_CPP = "transformers", "vLLM", "llama.cpp"
CLASS = "NemotronHForCausalLM"


@dataclass(frozen=True, slots=True)
class Folder:
    """What the rules look at: config.json, the weights' names, the files, and whether the tokenizer was trained here."""

    config: Mapping[str, Any]
    tensors: Sequence[str]
    files: Sequence[str]
    own_tokenizer: bool

    def size(self, key: str) -> int:
        """A whole number of config.json, 0 where there is none."""
        value = self.config.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    @property
    def mamba_inner(self) -> int:
        return self.size("mamba_num_heads") * self.size("mamba_head_dim")

    @property
    def pattern(self) -> str:
        """One letter a layer, from either spelling; ? for what is no kind of layer."""
        text = self.config.get("hybrid_override_pattern")
        names = self.config.get("layers_block_type") or ()
        return text if isinstance(text, str) else "".join(BLOCK_TYPE_LETTERS.get(name, "?") for name in names)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a program asks of a field. `holds` gives None where a folder cannot tell."""

    program: str
    field: str
    rule: str
    holds: Callable[[Folder], bool | None]


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule and what a folder has there; `accepted` is None where it cannot be told from the folder."""

    program: str
    field: str
    rule: str
    value: str
    accepted: bool | None


def _says(key: str, *allowed: object) -> Callable[[Folder], bool]:
    """The field is one of these; None among them allows its absence."""
    return lambda folder: folder.config.get(key) in allowed


def _given(*keys: str) -> Callable[[Folder], bool]:
    return lambda folder: any(folder.size(key) > 0 for key in keys)


def _names_are_published(folder: Folder) -> bool:
    return all(name.startswith(("backbone.", "lm_head.")) for name in folder.tensors)


def _divides(small: str, large: str) -> Callable[[Folder], bool]:
    return lambda folder: folder.size(small) > 0 and folder.size(large) % folder.size(small) == 0


def _is_full_range(folder: Folder) -> bool:
    limit = folder.config.get("time_step_limit", [0.0, math.inf])
    return list(limit) == [0.0, math.inf]


def _is_plain_pattern(folder: Folder) -> bool:
    text = folder.config.get("hybrid_override_pattern")
    return isinstance(text, str) and set(text) <= set("M*-") and 0 < len(text) == folder.size("num_hidden_layers")


def _power_of_two(folder: Folder) -> bool:
    size = folder.size("chunk_size")
    return "chunk_size" not in folder.config or (size > 0 and size & (size - 1) == 0)


RULES = (
    Rule(TRANSFORMERS, "model_type", "must be nemotron_h", _says("model_type", "nemotron_h")),
    Rule(TRANSFORMERS, "head_dim", "must be given: attention_head_dim is not read, and 128 is taken", _given("head_dim")),
    Rule(TRANSFORMERS, "hybrid_override_pattern", "must hold a *: its cache asks an attention layer how long it is", lambda folder: "*" in folder.pattern),
    Rule(VLLM, "architectures", f"must name {CLASS}", lambda folder: CLASS in (folder.config.get("architectures") or ())),
    Rule(VLLM, "hybrid_override_pattern", "must be of M, *, - and E", lambda folder: folder.pattern != "" and set(folder.pattern) <= set("M*-E")),
    Rule(VLLM, "num_hidden_layers", "must be the pattern's length", lambda folder: folder.size("num_hidden_layers") == len(folder.pattern)),
    Rule(VLLM, "head_dim", "must be a multiple of 8 and at most 256, for FlashAttention",
         lambda folder: 0 < folder.size("head_dim") <= 256 and folder.size("head_dim") % 8 == 0),
    Rule(VLLM, "num_key_value_heads", "must divide num_attention_heads", _divides("num_key_value_heads", "num_attention_heads")),
    Rule(VLLM, "attention_bias", "must be false: its attention has no biases", _says("attention_bias", False, None)),
    Rule(VLLM, "mlp_hidden_act", "must be relu2: it always computes that", _says("mlp_hidden_act", "relu2", None)),
    Rule(VLLM, "mamba_hidden_act", "must be silu, which its kernels know", _says("mamba_hidden_act", "silu", None)),
    Rule(VLLM, "n_groups", "must divide mamba_num_heads", _divides("n_groups", "mamba_num_heads")),
    Rule(VLLM, "conv_kernel", "must be 2 to 4", lambda folder: 2 <= folder.size("conv_kernel") <= 4),
    Rule(VLLM, "chunk_size", "must be a power of two", _power_of_two),
    Rule(VLLM, "time_step_limit", "must be 0 to infinity: it always computes that", _is_full_range),
    Rule(VLLM, "tie_word_embeddings", "must be false: it reads lm_head.weight", _says("tie_word_embeddings", False, None)),
    Rule(VLLM, "max_position_embeddings", "must be given: it is the longest context served", _given("max_position_embeddings")),
    Rule(VLLM, "tensor names", "must begin with backbone. or be lm_head.weight", _names_are_published),
    Rule(VLLM, "tokenizer.json", "must be there", lambda folder: "tokenizer.json" in folder.files),
    Rule(LLAMA_CPP, "architectures", f"must begin with {CLASS}", lambda folder: list(folder.config.get("architectures") or ())[:1] == [CLASS]),
    Rule(LLAMA_CPP, "hybrid_override_pattern", "must be a string of M, * and -, num_hidden_layers long: it does not know transformers' names of layers",
         _is_plain_pattern),
    Rule(LLAMA_CPP, "num_experts_per_tok", "must be absent: a model with it is taken for a mixture of experts",
         lambda folder: "num_experts_per_tok" not in folder.config),
    Rule(LLAMA_CPP, "rms_norm_eps", "must be there, equal to layer_norm_epsilon: the loader asks for it, and the other is not converted to it",
         lambda folder: folder.config.get("rms_norm_eps", folder.config.get("norm_eps")) == folder.config.get("layer_norm_epsilon", 1e-5)),
    Rule(LLAMA_CPP, "head_dim", "must be given", _given("head_dim", "attention_head_dim")),
    Rule(LLAMA_CPP, "n_groups", "must divide mamba_num_heads", _divides("n_groups", "mamba_num_heads")),
    Rule(LLAMA_CPP, "mamba_num_heads × mamba_head_dim", "must be a multiple of 64, or of mamba_d_head where that is given",
         lambda folder: folder.mamba_inner > 0 and folder.mamba_inner % (folder.size("mamba_d_head") or 64) == 0),
    Rule(LLAMA_CPP, "conv_kernel", "must be given", _given("conv_kernel", "d_conv")),
    Rule(LLAMA_CPP, "ssm_state_size", "must be given", _given("ssm_state_size", "state_size", "d_state")),
    Rule(LLAMA_CPP, "intermediate_size", "must be given", _given("intermediate_size")),
    Rule(LLAMA_CPP, "hidden_act", "must be absent or silu", _says("hidden_act", "silu", None)),
    Rule(LLAMA_CPP, "mlp_hidden_act", "must be relu2: it always computes that", _says("mlp_hidden_act", "relu2", None)),
    Rule(LLAMA_CPP, "use_bias", "must be false: its Mamba-2 projections have no biases", _says("use_bias", False, None)),
    Rule(LLAMA_CPP, "vocab_size", "must be a multiple of 8: it pads the list of tokens to one, the embeddings not",
         lambda folder: folder.size("vocab_size") % 8 == 0),
    Rule(LLAMA_CPP, "tensor names", "must begin with backbone. or be lm_head.weight", _names_are_published),
    Rule(LLAMA_CPP, "tokenizer", "must be one whose pre-tokenizer it has on its list", lambda folder: False if folder.own_tokenizer else None),
)  # fmt: skip
_OF_ANY = {(VLLM, "head_dim"), (VLLM, "num_key_value_heads"), (VLLM, "max_position_embeddings"), (VLLM, "tokenizer.json"), (LLAMA_CPP, "tokenizer")}
BLOCK_RULES = (
    Rule(TRANSFORMERS, "hidden_size", "must be a multiple of num_attention_heads in a llama",
         lambda folder: folder.config.get("model_type") != "llama" or _divides("num_attention_heads", "hidden_size")(folder)),
    Rule(TRANSFORMERS, "layer_types", "must have an entry for every layer, where it is given",
         lambda folder: len(folder.config.get("layer_types") or ()) in (0, folder.size("num_hidden_layers"))),
    *(rule for rule in RULES if (rule.program, rule.field) in _OF_ANY),
)  # fmt: skip
# What is shown of a field that is no key of config.json.
SHOWN: Mapping[str, Callable[[Folder], str]] = {
    "tokenizer": lambda folder: "trained here" if folder.own_tokenizer else "the teacher's",
    "tokenizer.json": lambda folder: "there" if "tokenizer.json" in folder.files else "absent",
    "tensor names": lambda folder: _prefixes(folder.tensors),
    "mamba_num_heads × mamba_head_dim": lambda folder: f"{folder.mamba_inner:,}",
}


def _prefixes(tensors: Sequence[str]) -> str:
    return ", ".join(sorted({name.split(".")[0] + "." for name in tensors}))


def check_folder(folder: Folder) -> list[Finding]:
    """Every rule, with what the folder has there and whether the program takes it."""
    findings = []
    for rule in BLOCK_RULES if folder.config.get("model_type") in BLOCK_TYPES else RULES:
        value = SHOWN[rule.field](folder) if rule.field in SHOWN else folder.config.get(rule.field, "absent")
        findings.append(Finding(rule.program, rule.field, rule.rule, str(value), rule.holds(folder)))
    return findings


def programs_of(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """The findings of every program, in the order of the rules."""
    return {program: [finding for finding in findings if finding.program == program] for program in dict.fromkeys(finding.program for finding in findings)}


def verdicts(findings: Sequence[Finding]) -> list[str]:
    """A sentence a program: whether it would take the folder, and what it would not take."""
    sentences = []
    for program, own in programs_of(findings).items():
        bad = [f"{finding.field} ({finding.value}) {finding.rule}" for finding in own if finding.accepted is False]
        unsure = [f"{finding.field} {finding.rule}" for finding in own if finding.accepted is None]
        text = f"{program} would not take it: {'; '.join(bad)}" if bad else f"{program} takes all {len(own) - len(unsure)} fields checked"
        sentences.append(text + (f"; not to be told from here: {'; '.join(unsure)}" if unsure else ""))
    return sentences
