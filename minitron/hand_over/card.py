"""The card of an exported student (README.md): what it is, where it comes from, what it needs, and who can load it."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memory_budget.units import format_gib
from minitron.checkpoints.local_paths import public, public_argument
from minitron.checkpoints.publish import Licence, licence_note, model_card
from minitron.hand_over.compatibility import Finding, programs_of, verdicts
from minitron.report.evaluation import tasks_table
from minitron.report.summary import sequences_text
from minitron.report.text import Summary, nats, table
from minitron.report.verdict import evaluations, how_to_read, how_to_read_memory, models_table
from minitron.walk.shown import escaped
from minitron.walk.stage import Lap

PARTS = {"weights": "weights", "kv_cache": "KV cache", "ssm_state": "SSM state", "conv_state": "convolution state", "activations": "activations"}
# Settings that say where a run is and not what it makes; the rest repeats it.
NOT_REPEATED = ("stage=", "export.", "merge.", "runs_folder=", "run_name=", "tracking=", "device=")


@dataclass(frozen=True, slots=True)
class Exported:
    """Which weights are exported: their name, how they were distilled in a sentence, and whether the evaluation is of them."""

    name: str
    trained: str
    is_final: bool


def export_card(summary: Summary, laps: Sequence[Lap], exported: Exported, *, licence: Licence, findings: Sequence[Finding], arguments: Sequence[str]) -> str:
    """README.md of an export. `arguments` are those of the command, from which the one that repeats the run is made."""
    from memory_budget.architecture import Architecture

    teacher = public(laps[-1].results["teacher"].facts["name"])
    student = summary["models"]["pruned"]  # of the same architecture, and there before the distillation is done
    base = laps[-1].settings.card.base_model or teacher
    head = model_card(exported.name, lines=[exported.trained], architecture=Architecture(**student["architecture"]), base=base, metadata=licence.metadata)
    sections = {
        "Lineage": "\n".join(f"{number}. {step}" for number, step in enumerate(_lineage(summary, laps, exported), 1)),
        "Licence": licence_note(licence, teacher, carried=True),
        "Memory": _memory(summary, student),
        "Evaluation": _evaluation(summary, exported),
        "Use": USE + (SERVE_WITH_STATE if "M" in student["architecture"]["pattern"] else SERVE),
        "Other programs": _programs(findings),
        "Made by": _made_by(summary, arguments),
    }
    return head + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def _lineage(summary: Summary, laps: Sequence[Lap], exported: Exported) -> Iterator[str]:
    """Teacher, then what every lap cut and distilled, with tokens and losses as far as they were measured."""
    teacher = summary["models"]["teacher"]
    losses = {name: f" Held-out loss {nats(found['loss_nats_per_token'])} nats per token." for name, found in evaluations(summary).items()}
    yield f"Teacher: {escaped(public(laps[-1].results['teacher'].facts['name']))}, {teacher['parameters']:,} parameters.{losses.get('teacher', '')}"
    for lap in laps[:-1]:
        yield _cut(lap)
        yield distilled(lap.results["distill"].facts)
    yield _cut(laps[-1]) + losses.get("pruned", "")
    yield exported.trained + (losses.get("student", "") if exported.is_final else "")


def _cut(lap: Lap) -> str:
    return f"Cut: {escaped(lap.results['prune'].facts['description'])}"


def distilled(facts: Mapping[str, Any]) -> str:
    """How a finished distillation went, in a sentence."""
    kl = facts["final_kl_nats_per_token"]
    at_the_end = "" if kl is None else f", to a KL of {nats(kl)} nats per token"
    return f"Distilled from the teacher on {facts['tokens']:,} tokens in {facts['steps']:,} steps{at_the_end}."


def _memory(summary: Summary, student: Mapping[str, Any]) -> str:
    budget, memory = summary["budget"], student["memory_bytes"]
    rows = [(label, format_gib(memory[part])) for part, label in PARTS.items() if memory[part]]
    rows += [("**total**", f"**{format_gib(memory['total'])}**"), (f"budget ({escaped(budget['name'])})", format_gib(budget["bytes"]))]
    fits = "It fits" if memory["total"] <= budget["bytes"] else "It does **not** fit"
    text = f"{fits} the budget when serving {sequences_text(budget['workload'])}. {how_to_read_memory(summary)}"
    return f"{table(('what for', 'memory'), rows)}\n\n{text}"


def _evaluation(summary: Summary, exported: Exported) -> str:
    if not exported.is_final or not evaluations(summary):
        return "These weights were not evaluated." if exported.is_final else "These weights are a state of the distillation; they were not evaluated."
    return "\n\n".join(part for part in (models_table(summary), how_to_read(summary), tasks_table(summary)) if part)


def _programs(findings: Sequence[Finding]) -> str:
    """What each program makes of the folder, then every field that was looked at."""
    marks = {True: "yes", False: "**no**", None: "not known"}
    blocks = ["From config.json and the files alone; nothing was run."]
    for text, (program, own) in zip(verdicts(findings), programs_of(findings).items(), strict=True):
        rows = [f"| `{one.field}` | {escaped(one.value)} | {escaped(one.rule)} | {'yes, but' if one.is_remark else marks[one.accepted]} |" for one in own]
        blocks += [f"- {escaped(text)}.", "\n".join([f"| {program} | here | rule | accepted |", "|---|---|---|---|", *rows])]
    return "\n\n".join(blocks)


def repeating_command(arguments: Sequence[str]) -> str:
    """The command that makes the same student again: the settings given, without those that say only where things are; files and folders by their names."""
    kept = (public_argument(argument) for argument in arguments if not argument.lstrip("+").startswith(NOT_REPEATED))
    return shlex.join(["python", "-m", "minitron.run", *kept])


def _made_by(summary: Summary, arguments: Sequence[str]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    text = f"Every setting in full, and the keys of the stages, are in [export.json](export.json). Seed {summary['seed']}; {versions}."
    return f"```\n{repeating_command(arguments)}\n```\n\n{text}"


USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
```

"""
SERVE = "With vLLM: `vllm serve FOLDER`."
SERVE_WITH_STATE = "With vLLM: `vllm serve FOLDER --mamba_ssm_cache_dtype float32`; with a smaller state accuracy drops."
