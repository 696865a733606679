"""What other programs ask of a model folder, field by field, and whether one has it: the machinery. The rules are in rules_*.py, a family each.

Nothing of those programs is imported; a folder's config.json, its tensors' names and its files are looked at.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from minitron.families.config_json import CODE_KEYS
from minitron.families.row_lengths import INT4_GROUP, K_QUANT_BLOCK

TRANSFORMERS, VLLM, LLAMA_CPP, MLX_LM, TENSORRT_LLM = "transformers", "vLLM", "llama.cpp", "mlx-lm", "TensorRT-LLM"
REMOTE_CODE = "NVIDIA's code"  # beside its published weights, for versions of transformers without the family


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


@dataclass(frozen=True, slots=True)
class Rule:
    """What a program asks of a field. `holds` gives None where a folder cannot tell; `shown` says what a folder has there, where it is no key of
    config.json. `is_advice`: the program takes the folder all the same, but makes it slower or larger, or its older versions do not.
    """

    program: str
    field: str
    rule: str
    holds: Callable[[Folder], bool | None]
    shown: Callable[[Folder], str] | None = None
    is_advice: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule and what a folder has there; `accepted` is None where it cannot be told from the folder. `is_remark`: it is accepted, against advice."""

    program: str
    field: str
    rule: str
    value: str
    accepted: bool | None
    is_remark: bool = False


def says(key: str, *allowed: object) -> Callable[[Folder], bool]:
    """The field is one of these; None among them allows its absence."""
    return lambda folder: folder.config.get(key) in allowed


def given(*keys: str) -> Callable[[Folder], bool]:
    """One of the fields is a number above 0."""
    return lambda folder: any(folder.size(key) > 0 for key in keys)


def divides(small: str, large: str) -> Callable[[Folder], bool]:
    """One field's number divides another's."""
    return lambda folder: folder.size(small) > 0 and folder.size(large) % folder.size(small) == 0


def fits_flash_attention(folder: Folder) -> bool:
    """A head's channels are what FlashAttention's kernels are built for (vLLM's attention/backends/flash_attn.py)."""
    return 0 < folder.size("head_dim") <= 256 and folder.size("head_dim") % 8 == 0


def named(program: str, *beginnings: str) -> Rule:
    """Every tensor's name begins with one of these."""
    text = " or be ".join((", ".join(beginnings[:-1]), f"{beginnings[-1]}weight"))
    return Rule(program, "tensor names", f"must begin with {text}", lambda folder: all(name.startswith(beginnings) for name in folder.tensors), _prefixes)


def has_class(program: str, name: str) -> Rule:
    """The class that a program knows the model by: vLLM looks for any that it knows, llama.cpp at the first."""
    if program == LLAMA_CPP:
        return Rule(program, "architectures", f"must begin with {name}", lambda folder: list(folder.config.get("architectures") or ())[:1] == [name])
    return Rule(program, "architectures", f"must name {name}", lambda folder: name in (folder.config.get("architectures") or ()))


def tokenizer_there(*files: str) -> Rule:
    """vLLM finds a tokenizer."""
    return Rule(VLLM, files[0], f"must be there{''.join(f', or {name}' for name in files[1:])}", lambda folder: bool(set(files) & set(folder.files)),
                lambda folder: next((name if name != files[0] else "there" for name in files if name in folder.files), "absent"))  # fmt: skip


def known_tokenizer(holds: Callable[[Folder], bool | None]) -> Rule:
    """llama.cpp's list of pre-tokenizers, by the tokens of a fixed text, is not looked up here."""
    return Rule(LLAMA_CPP, "tokenizer", "must be one whose pre-tokenizer it has on its list", holds,
                lambda folder: "trained here" if folder.own_tokenizer else "the teacher's")  # fmt: skip


def no_code(program: str) -> Rule:
    """No key of config.json names files of code: with trust_remote_code=True a program would look for them, and the folder holds none."""
    return Rule(program, "auto_map", f"must be absent, as must {CODE_KEYS[1]}: with trust_remote_code=True the code that it names is looked for, and not here",
                lambda folder: not any(key in folder.config for key in CODE_KEYS),
                lambda folder: ", ".join(key for key in CODE_KEYS if key in folder.config) or "absent")  # fmt: skip


def head_there(program: str, otherwise: str) -> Rule:
    """The output head is among the tensors unless it is the table of embeddings."""

    def is_tied(folder: Folder) -> bool:
        return folder.config.get("tie_word_embeddings") is True

    return Rule(program, "lm_head.weight", f"must be there unless tie_word_embeddings is true: {otherwise}",
                lambda folder: is_tied(folder) or "lm_head.weight" in folder.tensors,
                lambda folder: f"{'there' if 'lm_head.weight' in folder.tensors else 'absent'}, {'tied' if is_tied(folder) else 'not tied'}")  # fmt: skip


def row_rules(*names: str, unused: Callable[[Folder], Collection[str]] = lambda _: ()) -> tuple[Rule, ...]:
    """Advice on lengths of rows, sizes of config.json or products of two: what those who pack the weights into fewer bits can do with them. `unused` gives
    those of no matrix of a folder's model."""

    def odd(folder: Folder, multiple: int) -> str:
        lengths = {name: prod(folder.size(key) for key in name.split(" × ")) for name in names if name not in unused(folder)}
        return ", ".join(f"{name} {length:,}" for name, length in lengths.items() if length % multiple)

    return (
        Rule(VLLM, "lengths of rows", f"should be multiples of {INT4_GROUP}: other matrices are not packed as int4 in groups of {INT4_GROUP}",
             lambda folder: not odd(folder, INT4_GROUP), lambda folder: odd(folder, INT4_GROUP) or "all are", is_advice=True),
        Rule(LLAMA_CPP, "lengths of rows", f"should be multiples of {K_QUANT_BLOCK}: other matrices get a larger type in place of a K-quant",
             lambda folder: not odd(folder, K_QUANT_BLOCK), lambda folder: odd(folder, K_QUANT_BLOCK) or "all are", is_advice=True),
    )  # fmt: skip


def _prefixes(folder: Folder) -> str:
    return ", ".join(sorted({name.split(".")[0] + "." for name in folder.tensors}))


def check_folder(folder: Folder, rules: Sequence[Rule]) -> list[Finding]:
    """Every rule, with what the folder has there and whether the program takes it."""
    findings = []
    for rule in rules:
        value = folder.config.get(rule.field, "absent") if rule.shown is None else rule.shown(folder)
        holds = rule.holds(folder)
        findings.append(Finding(rule.program, rule.field, rule.rule, str(value), rule.is_advice or holds, rule.is_advice and not holds))
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


def remarks(findings: Sequence[Finding]) -> list[str]:
    """What a program takes, but not as it should be; a sentence each."""
    return [f"{one.program} takes it, but {one.field} ({one.value}) {one.rule}" for one in findings if one.is_remark]
