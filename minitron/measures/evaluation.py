"""Teacher, pruned and student measured alike: held-out text, speed, a long-context probe, prompts, tasks of lm-eval.

Every measurement of a checkpoint is kept by itself (minitron.measures.kept), so what was measured before, by this run or another, is
not measured again; a model is loaded only where something of it is missing.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from distill.batches import count_tokens
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.files import stored_bytes
from minitron.checkpoints.forward_memory import forward_memory
from minitron.families.known import can_decode, family_of
from minitron.generation.tokenizers import load_tokenizer
from minitron.machine.alone import measured_alone
from minitron.machine.device import check_on_gpu, let_go, pick_device
from minitron.measures.continuations import check_prompts, continuations, row_beginnings
from minitron.measures.held_out import CHUNK_TOKENS, Reference, by_position, by_row, by_source, token_sums
from minitron.measures.kept import kept, measurements_folder
from minitron.measures.needle import check_vocabulary, measure_needle
from minitron.measures.paired import Rows, paired_difference
from minitron.measures.speed import machine_of, make_prompts, measure_speed
from minitron.measures.tasks import load_task, run_task, task_identity
from minitron.settings.evaluate import EvaluateSettings, SpeedSettings
from minitron.settings.rules import key_settings
from minitron.settings.teachers import max_positions
from minitron.text.key_values import Vocabulary, vocabulary_of
from minitron.text.samples import batches_of, evaluation_rows, spread_rows
from minitron.walk.console import Advance
from minitron.walk.stage import StageContext
from minitron.walk.store import write_json

SMALLEST_LOSS_NATS = 0.01
MODELS = {"teacher": "teacher", "pruned": "prune", "student": "distill"}
DIFFERENCES = {"cut": ("pruned", "teacher"), "won": ("pruned", "student"), "left": ("student", "teacher")}  # whose loss less whose
Share = Callable[[float], None]  # hears which share of a measurement is done


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that is measured of every model: what it follows from beside the checkpoint, and how it is done, by the model's name."""

    name: str
    of: Mapping[str, Any]
    make: Callable[[str, Share], Any]


class Models:
    """The models of the run, each loaded when it is asked for; the teacher stays, of the others the last one."""

    def __init__(self, folders: Mapping[str, Path], device: torch.device):
        self.folders, self.device = folders, device
        self._loaded: dict[str, nn.Module] = {}

    @cached_property
    def reference(self) -> Reference:
        return Reference(lambda: self["teacher"])

    def alone(self, name: str) -> nn.Module:
        """A model for what needs no other: on a GPU the others make room for long prompts."""
        if self.device.type == "cuda":
            self._loaded = {loaded: model for loaded, model in self._loaded.items() if loaded == name}
            let_go()
        return self[name]

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self._loaded:
            self._loaded = {loaded: model for loaded, model in self._loaded.items() if loaded == "teacher"}
            folder = self.folders[name]
            self._loaded[name] = family_of(read_config(folder)).load(folder, device=str(self.device))
        return self._loaded[name]


def evaluate_models(context: StageContext) -> dict:
    """Writes <model>.json per model."""
    device = pick_device(context.settings)
    _check_memory(context, device)
    models = Models({name: context.inputs[stage].model_folder for name, stage in MODELS.items()}, device)
    measures = list(_measures(context, models))
    store = context.folder.parent.parent
    measured, rows = {}, {}
    if there := [name for name in MODELS if (context.folder / f"{name}.json").exists()]:
        context.goes_on(f"the measurements of {', '.join(there)}, which are there")
    with context.console.track("evaluating", len(MODELS) * len(measures), "measurements") as advance:
        for name, stage in MODELS.items():
            folder = measurements_folder(store, context.inputs[stage])
            found = {measure.name: _one(measure, name, folder, context.console.say, advance) for measure in measures}
            measured[name], rows[name] = _facts(context.settings.evaluate, found), found["held_out"].get("rows")
            write_json(context.folder / f"{name}.json", measured[name] | {"rows": rows[name]})
    loss = {name: facts["loss_nats_per_token"] for name, facts in measured.items()}
    lost = loss["pruned"] - loss["teacher"]
    # Of a loss within the noise of these rows, a share would say nothing.
    recovered = (loss["pruned"] - loss["student"]) / lost if lost > SMALLEST_LOSS_NATS else None
    share = f", {100 * recovered:.0f} % of the loss won back" if recovered is not None and recovered >= 0 else ""
    if loss["student"] > loss["pruned"] + SMALLEST_LOSS_NATS:
        share = ": distillation made it worse; keep the pruned one, or distill again at a lower distill.train.learning_rate or on more tokens"
    headline = f"held-out nats/token: teacher {loss['teacher']:.3f}, pruned {loss['pruned']:.3f}, student {loss['student']:.3f}{share}"
    apart = {of: _apart(rows[one], rows[other]) for of, (one, other) in DIFFERENCES.items()}
    return {"headline": headline, "models": measured, "lost_nats_per_token": lost, "recovered_share": recovered, "differences": apart}


def _apart(one: Rows | None, other: Rows | None) -> dict[str, Any] | None:
    """One model's loss less another's; None where an earlier version measured one of them, without its rows."""
    return asdict(paired_difference(one, other)) if one and other else None


def evaluate_slice(context: StageContext) -> dict:
    """Held-out text of the plain slice as cut and as distilled, beside what stage evaluate found of the student."""
    device, wanted = pick_device(context.settings), context.settings.evaluate
    stages = {"teacher": "teacher", "pruned": "prune_slice", "student": "distill_slice"}
    models = Models({name: context.inputs[stage].model_folder for name, stage in stages.items()}, device)
    rows = spread_rows(evaluation_rows(np.load(context.inputs["data"].folder / "heldout.npy", mmap_mode="r")), wanted.samples)
    sums = {}
    with context.console.track("evaluating the slice", 2 * count_tokens(rows), "tokens") as advance:
        for name in ("pruned", "student"):
            sums[name] = token_sums(models[name], models.reference, batches_of(rows, wanted.batch, device), advance)
    found = {name: asdict(one.means()) for name, one in sums.items()}
    students = json.loads((context.inputs["evaluate"].folder / "student.json").read_text()).get("rows")
    own, distilled = context.inputs["evaluate"].facts["models"], context.inputs["distill_slice"]
    ours, slices = own["student"]["loss_nats_per_token"], found["student"]["loss_nats_per_token"]
    headline = f"plain slice {found['pruned']['loss_nats_per_token']:.3f}, after the same {distilled.facts['tokens']:,} tokens {slices:.3f} nats/token"
    return {"headline": f"{headline}; the student is {abs(slices - ours):.3f} {'lower' if ours <= slices else 'higher'}", "models": found,
            "difference": _apart(by_row(sums["student"]), students), "tokens": distilled.facts["tokens"],
            "learning_rate": distilled.record["settings"]["phases"][0]["learning_rate"]}  # fmt: skip


def _one(measure: Measure, name: str, folder: Path, say: Callable[[str], None], advance: Advance) -> Any:
    """A model's measurement, kept or made; it counts as one on the bar."""
    done = 0.0

    def on_share(share: float) -> None:
        nonlocal done
        done += share
        advance(share, f"{name}: {measure.name}")

    found = kept(folder, measure.name, of=measure.of, make=lambda: measure.make(name, on_share), say=say)
    advance(1 - done, f"{name}: {measure.name}")
    return found


def _measures(context: StageContext, models: Models) -> Iterator[Measure]:
    """Everything that the settings want measured. Raises ValueError where the tokenizer or a task does not allow it."""
    wanted, data = context.settings.evaluate, context.inputs["data"]
    held_out = np.load(data.folder / "heldout.npy", mmap_mode="r")
    rows = spread_rows(evaluation_rows(held_out), wanted.samples)
    runs = json.loads((data.folder / "heldout_sources.json").read_text())
    sources = np.repeat([source for source, _ in runs], [number for _, number in runs])
    of_rows = {"data": data.key, "samples": wanted.samples}
    tokenizer = load_tokenizer(models.folders["teacher"])

    of_held_out = {**of_rows, "teacher": context.inputs["teacher"].identity}
    yield Measure("held_out", of_held_out, partial(_held_out, models, rows, spread_rows(evaluation_rows(sources), wanted.samples), wanted.batch))
    for lengths in wanted.speed:
        yield Measure(_speed_name(lengths), {**of_rows, **machine_of(models.device)}, partial(_speed, models, rows, lengths))
    if wanted.needle.lengths:
        vocabulary = vocabulary_of(tokenizer)
        check_vocabulary(vocabulary, wanted.needle)
        make = partial(_needle, models, rows, vocabulary, wanted)
        yield Measure("needle", {**of_rows, **key_settings(wanted.needle)}, make)
    if wanted.prompts or wanted.held_out_prompts:
        check_prompts(tokenizer, wanted, max_positions(context.settings))
        prompts = list(dict.fromkeys([*wanted.prompts, *row_beginnings(tokenizer, rows, wanted.held_out_prompts)]))
        of_prompts = {"prompts": prompts, "new_tokens": wanted.new_tokens, "teacher": context.inputs["teacher"].identity}
        yield Measure("prompts", of_prompts, partial(_prompts, models, tokenizer, prompts, wanted.new_tokens))
    for task in wanted.tasks:
        yield Measure(_task_name(task), task_identity(load_task(task, wanted), wanted), partial(_task, models, tokenizer, task, wanted))


def _check_memory(context: StageContext, device: torch.device) -> None:
    """Raises ValueError where a GPU cannot hold the teacher and the largest of the others on held-out rows, or the teacher alone on the longest prompt."""
    wanted, folders = context.settings.evaluate, {name: context.inputs[stage].model_folder for name, stage in MODELS.items()}
    sizes = {name: (architecture_from_config(read_config(folder)), stored_bytes(folder)) for name, folder in folders.items()}
    largest = max((sizes["pruned"], sizes["student"]), key=lambda size: size[1] * count_total_parameters(size[0]))
    longest = max([0, *(speed.batch * speed.input_tokens for speed in wanted.speed), *wanted.needle.lengths])
    for models, tokens in (([sizes["teacher"], largest], wanted.batch * context.settings.data.sequence_length), ([sizes["teacher"]], longest)):
        plan = forward_memory("evaluate", models, tokens=tokens, logits_tokens=CHUNK_TOKENS,
                              advice="Lower evaluate.batch, evaluate.speed's lengths or evaluate.needle.lengths")  # fmt: skip
        check_on_gpu(plan, device)


def _held_out(models: Models, rows_RT: np.ndarray, sources_R: np.ndarray, batch: int, name: str, on_share: Share) -> dict[str, Any]:
    tokens = count_tokens(rows_RT)
    sums = token_sums(models[name], models.reference, batches_of(rows_RT, batch, models.device), lambda some: on_share(some / tokens))
    return {**asdict(sums.means()), "by_position": by_position(sums), "by_source": by_source(sums, sources_R.tolist()), "rows": by_row(sums)}


def _speed(models: Models, rows_RT: np.ndarray, lengths: SpeedSettings, name: str, _on_share: Share) -> dict[str, Any]:
    prompts = make_prompts(rows_RT, lengths.input_tokens, lengths.batch).to(models.device)
    model, can_decode = models.alone(name), _can_decode(models, name)
    found, alone = measured_alone(lambda: measure_speed(model, prompts, lengths, can_decode=can_decode))
    return found | {"alone": alone}


def _can_decode(models: Models, name: str) -> bool:
    return can_decode(architecture_from_config(read_config(models.folders[name])))


def _prompts(models: Models, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int, name: str,
             _on_share: Share) -> list[dict[str, Any]]:  # fmt: skip
    if not _can_decode(models, name):
        return [{"prompt": prompt, "text": None} for prompt in prompts]
    return continuations(models.alone(name), tokenizer, prompts, new_tokens=new_tokens)


def _needle(models: Models, rows_RT: np.ndarray, vocabulary: Vocabulary, wanted: EvaluateSettings, name: str, on_share: Share) -> dict[str, Any]:
    total = sum(wanted.needle.lengths) * wanted.needle.depths * wanted.needle.samples
    return measure_needle(models.alone(name), vocabulary, rows_RT, wanted.needle, batch_tokens=wanted.batch * rows_RT.shape[1],
                          on_tokens=lambda tokens: on_share(tokens / total))  # fmt: skip


def _task(models: Models, tokenizer: PreTrainedTokenizerBase, task: str, wanted: EvaluateSettings, name: str, _on_share: Share) -> dict[str, Any]:
    return run_task(models.alone(name), tokenizer, task, wanted)


def _speed_name(lengths: SpeedSettings) -> str:
    return f"speed_{lengths.input_tokens}_{lengths.output_tokens}_{lengths.batch}"


def _task_name(task: str) -> str:
    return f"task_{task.replace('/', '-')}"


def _facts(wanted: EvaluateSettings, found: Mapping[str, Any]) -> dict[str, Any]:
    """A model's measurements as summary.json has them."""
    speed = [found[_speed_name(lengths)] for lengths in wanted.speed]
    decode = speed[0]["decode_tokens_per_second"] if speed else None
    tasks = {task: found[_task_name(task)] for task in wanted.tasks}
    held_out = {name: value for name, value in found["held_out"].items() if name != "rows"}
    facts = {**held_out, "decode_tokens_per_second": decode, "speed": speed, "needle": found.get("needle"), "tasks": tasks}
    return facts | ({"continuations": found["prompts"]} if "prompts" in found else {})
