"""The door for Python: one call for each thing, on folders, with the results and the store of the command.

    from minitron import api

    asked = {"teacher": "MODEL", "budget": "l4", "text": "corpus.jsonl"}
    api.plan(**asked).seconds
    student = api.distill(**asked, progress=print).checkpoint
    api.generate(student, "What is 3 plus 4?", max_thinking_tokens=32).answer

A call does what it needs first and takes what is done from the store, as `python -m minitron.run stage=…` with the same settings does. What is wrong
with what was asked for is a ValueError of one line, before any work.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from memory_budget.architecture import Architecture
from memory_budget.budget import parse_budget
from memory_budget.calculator import MemoryReport, max_context_tokens, memory_report
from memory_budget.configs.registry import model_from_config
from memory_budget.model import Model, as_model
from memory_budget.parameters import count_total_parameters
from memory_budget.sources.source import open_source
from memory_budget.workload import Workload
from minitron.machine import processes
from minitron.settings.run import GenerateSettings, Settings, Stage
from minitron.walk.console import Advance, Console

if TYPE_CHECKING:  # they bring torch or numpy, which only their calls do
    from transformers import LogitsProcessor, PreTrainedTokenizerBase

    from minitron.generation.answer import Answer
    from minitron.importance.scores import ImportanceScores
    from minitron.plan.plan import Plan

__all__ = ["Asked", "Done", "Memory", "Progress", "distill", "evaluate", "generate", "importance", "memory", "plan", "prune", "score", "search", "settings",
           "thinking_budget"]  # fmt: skip

Text = str | PathLike[str]


@dataclass(frozen=True, slots=True)
class Progress:
    """One thing that is heard of a running call: a line (`text`), of the stage `what` or of none (""); or work going on: `what` is done, and `done` of `total`
    `unit`s of it, the total None where nobody knows it."""

    what: str
    text: str
    done: float | None = None
    total: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        """As a line for people: `progress=print`."""
        if self.done is None:
            return f"{self.what:>9}  {self.text}" if self.what else self.text
        how_far = f"{self.done:,.0f} {self.unit}" if not self.total else f"{100 * self.done / self.total:3.0f} %"
        return f"{self.what:>20}  {how_far}  {self.text}".rstrip()


class Asked(TypedDict, total=False):
    """What every call on a run takes, all of it by name and none of it needed.

    teacher: a folder, a Hub id or a .gguf file; without one it is the experiment's, by default the tiny one that comes with the package ·
    budget: a card's name or GiB · text: files or folders to calibrate and to train on · experiment: tiny, own (where there is a teacher), nano2, … ·
    config_dir: a folder with an experiment/ of your own · runs_folder: where results go ("runs") ·
    settings: any other, by its dotted name or in mappings: {"distill.train.tokens": 1_000_000, "search": {"fixed": {"hidden": 96}}} ·
    progress: is called with a Progress; what it raises ends the call, and the same call goes on from there.
    """

    teacher: Text | None
    budget: str | float | None
    text: Text | Sequence[Text] | None
    experiment: str | None
    config_dir: Text | None
    runs_folder: Text
    settings: Mapping[str, Any]
    progress: Callable[[Progress], None] | None


@dataclass(frozen=True, slots=True)
class Memory:
    """What a model takes under a workload. `budget_bytes`, `fits` and the longest context that fits, in tokens, are None without a budget."""

    report: MemoryReport
    parameters: int
    budget_bytes: int | None = None
    fits: bool | None = None
    max_context_tokens: int | None = None

    @property
    def total(self) -> int:
        """Bytes of weights, caches and states."""
        return self.report.total


@dataclass(frozen=True, slots=True)
class Done:
    """A finished stage: its folder in the store, what it found (`facts`; docs/python.md names them), the seconds that it took when it was made, whether it
    was there already, the checkpoint that it left, if any, and the folder of the run's report."""

    stage: str
    folder: Path
    facts: Mapping[str, Any]
    seconds: float
    reused: bool
    checkpoint: Path | None
    report: Path


def memory(model: Text | Architecture | Model, *, budget: str | float | None = None, context_tokens: int = 131072, batch: int = 1, weights_dtype: str = "bf16",
           kv_dtype: str = "bf16", ssm_dtype: str = "float32") -> Memory:  # fmt: skip
    """What a model takes: a folder, a config.json, a Hub id, or sizes without any. Loads no weights. Raises ValueError for what is none of them, naming it."""
    if isinstance(model, Architecture | Model):
        counted = as_model(model)
    else:
        source = open_source(str(model))
        counted = model_from_config(source.config, source.tensors)
    workload = Workload(context_tokens=context_tokens, batch=batch, weights_dtype=weights_dtype, kv_dtype=kv_dtype, ssm_dtype=ssm_dtype)
    report, parameters = memory_report(counted, workload), count_total_parameters(counted)
    if budget is None:
        return Memory(report, parameters)
    most = parse_budget(budget).bytes
    return Memory(report, parameters, most, report.total <= most, max_context_tokens(counted, workload, most))


def settings(**asked: Unpack[Asked]) -> Settings:
    """Every setting of what is asked for, with what follows from the model and the budget."""
    return _settings("all", asked)[0]


def plan(**asked: Unpack[Asked]) -> "Plan":
    """What the whole run will cut, and what it will take in time, memory and disk; from settings and config.json alone."""
    from minitron.plan.done import done_stages
    from minitron.plan.plan import plan_of

    made = settings(**asked)
    return plan_of(made, done_stages(made, quickly=True))


def score(**asked: Unpack[Asked]) -> Done:
    """How much every unit and every layer matters. `importance` reads what is kept of it."""
    return _run("score", asked)


def importance(scored: Done) -> "ImportanceScores":
    """The scores of every unit, as arrays, of what `score` gave; the mean over tokens, then L2 over samples."""
    from minitron.importance.scores import SCORES_FILE, load_scores

    return load_scores(scored.folder / SCORES_FILE)


def search(**asked: Unpack[Asked]) -> Done:
    """The architectures that fit, the best few measured, and the one chosen."""
    return _run("search", asked)


def prune(**asked: Unpack[Asked]) -> Done:
    """The chosen architecture, cut out of the teacher: a checkpoint."""
    return _run("prune", asked)


def distill(**asked: Unpack[Asked]) -> Done:
    """The student: the cut one trained to the teacher's distribution, a checkpoint."""
    return _run("distill", asked)


def evaluate(**asked: Unpack[Asked]) -> Done:
    """Teacher, pruned and student measured alike, and the report."""
    return _run("evaluate", asked)


def generate(checkpoint: Text, prompt: str | Sequence[Mapping[str, Any]], *, max_thinking_tokens: int | None = None, thinking: bool | None = None,
             max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0, tags: tuple[str, str] = ("<think>", "</think>"),
             device: str = "auto") -> "Answer":  # fmt: skip
    """What a checkpoint's folder goes on with after a user's message, or a conversation [{role, content}, …].

    After `max_thinking_tokens` of reasoning it is closed, and the answer goes on; None sets no limit. `thinking` switches reasoning on or off the way the
    chat template does it. Greedy at temperature 0. Raises ValueError for what cannot be, naming the setting of the command that it is.
    """
    from minitron.generation.answer import answer, checkpoint_folder
    from minitron.machine.device import pick_device

    made = Settings(checkpoint=str(checkpoint), thinking_budget=max_thinking_tokens, device=device,
                    generate=GenerateSettings(new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, thinking_tags=list(tags)))  # fmt: skip
    return answer(checkpoint_folder(replace(made, checkpoint=str(Path(checkpoint).absolute())), []), prompt, made.generate, thinking=thinking,
                  thinking_budget=max_thinking_tokens, device=pick_device(made))  # fmt: skip


def thinking_budget(tokenizer: "PreTrainedTokenizerBase", max_thinking_tokens: int, *, prompt_tokens: int | None = None,
                    tags: tuple[str, str] = ("<think>", "</think>")) -> "LogitsProcessor":  # fmt: skip
    """The same budget for transformers' own `model.generate(…, logits_processor=[…])`, of any model. One serves one call of generate.

    `prompt_tokens` is the width of the prompts, padding on their left included; None takes what generate begins with. Raises ValueError for a negative
    budget, or tags that the tokenizer has no tokens for.
    """
    from minitron.generation.prompts import Tags
    from minitron.generation.thinking import ThinkingBudget

    return ThinkingBudget(max_thinking_tokens, *Tags(*tags).ids(tokenizer), prompt_tokens=prompt_tokens)


class _Heard(Console):
    """A terminal whose lines and bars go to a callback."""

    def __init__(self, hear: Callable[[Progress], None]) -> None:
        super().__init__(quiet=True)
        self.hear = hear

    def say(self, text: str) -> None:
        self.hear(Progress("", text))

    def headline(self, stage: str, text: str) -> None:
        self.hear(Progress(stage, text))

    @contextmanager
    def track(self, description: str, total: float | None, unit: str, done: float = 0.0) -> Iterator[Advance]:
        so_far = done

        def advance(amount: float, note: str = "") -> None:
            nonlocal so_far
            so_far += amount
            self.hear(Progress(description, note, so_far, total, unit))

        yield advance


def _settings(stage: str, asked: Asked) -> tuple[Settings, list[str]]:
    """Settings, and the command's words for them."""
    from minitron.door.python import settings_from, words_of

    if unknown := set(asked) - set(Asked.__annotations__):
        raise TypeError(f"{min(unknown)} is none of {', '.join(Asked.__annotations__)}; a setting goes into settings={{…}}")
    teacher, named = asked.get("teacher"), {"budget": asked.get("budget"), "data.files": _several(asked.get("text")), "experiment": asked.get("experiment")}
    if teacher is not None:
        named["teacher.gguf" if str(teacher).endswith(".gguf") else "teacher.path"] = teacher
    given = {name: value for name, value in named.items() if value is not None}
    if "runs_folder" in asked:
        given["runs_folder"] = asked["runs_folder"]
    words = [*words_of({"stage": stage, **given}), *words_of(asked.get("settings") or {})]
    config_dir = asked.get("config_dir")
    made = settings_from(words, config_dir=None if config_dir is None else str(Path(config_dir).absolute()), processes=processes.world_size())
    return made, [*([] if config_dir is None else ["--config-dir", str(config_dir)]), *words]


def _several(text: Text | Sequence[Text] | None) -> Sequence[Text] | None:
    return [text] if isinstance(text, str | PathLike) else text


def _run(stage: str, asked: Asked) -> Done:
    from minitron.walk.need import nothing_to_cut
    from minitron.walk.pipeline import run_pipeline

    made, words = _settings(stage, asked)
    made = replace(made, stage=Stage[stage])
    if said := nothing_to_cut(made):
        raise ValueError(said)
    hear = asked.get("progress")
    console = Console(quiet=True) if hear is None or processes.rank() > 0 else _Heard(hear)
    with _as_the_command(words):
        lap = run_pipeline(made, console)[-1]
    result = lap.results[stage]
    checkpoint = result.model_folder if "path" in result.facts else None
    return Done(stage, result.folder, result.facts, result.record["seconds"], lap.cached[stage], checkpoint, Path(made.runs_folder) / made.run_name)


@contextmanager
def _as_the_command(words: Sequence[str]) -> Iterator[None]:
    """Reports name the command that does the same."""
    before = sys.argv
    sys.argv = ["minitron.run", *words]
    try:
        yield
    finally:
        sys.argv = before
