"""The first rung of the ladder: every shortlisted candidate's held-out loss and KL as cut, on views of the sorted teacher."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from itertools import groupby

import numpy as np
import torch

from memory_budget.architecture import Architecture
from memory_budget.hf_config import read_config
from minitron.checkpoints.files import stored_bytes
from minitron.checkpoints.forward_memory import forward_memory
from minitron.families.known import family_of
from minitron.importance.scores import scores_of
from minitron.machine.device import check_on_gpu, pick_device
from minitron.pruning.compensated_cut import calibration_rows
from minitron.pruning.plan import set_ridge
from minitron.pruning.rotated import rotate_model, with_own_head
from minitron.pruning.views import SortedTeacher, View
from minitron.pruning.width_refits import refit_widths
from minitron.search.distances import GPU_CHUNK_TOKENS, Distance, best_first, measure_batch
from minitron.settings.derived import base_stage, candidate_samples, ranks_rotated, refitted_widths
from minitron.settings.teachers import base_architecture, teacher_architecture
from minitron.text.samples import batches_of, screening_rows, spread_rows
from minitron.walk.stage import StageContext
from nas.axes import WIDTHS

PART_FILE = "zero_shot.partial.jsonl"


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """Measurements by candidate, and the candidates by ascending loss."""

    means: Mapping[str, dict]
    best_first: list[str]


def screening_batches(context: StageContext, device: torch.device) -> list[torch.Tensor]:
    """The held-out rows that choose among candidates."""
    settings = context.settings
    rows = np.load(context.inputs["data"].folder / "heldout.npy", mmap_mode="r")
    return batches_of(spread_rows(screening_rows(rows), settings.search.screen_samples), settings.evaluate.batch, device)


def measure_zero_shot(context: StageContext, entries: Mapping[str, dict]) -> ZeroShot:
    """Loss and KL of every candidate, all of them batch by batch; batches of an interrupted run are read back.

    Candidates are views of one sorted teacher, or of one for each number of Mamba channels, since heads rank by the channels kept; where they
    will be cut compensated, the teacher is rotated first and its writing matrices are refitted to their widths.
    """
    device = pick_device(context.settings)
    batches = screening_batches(context, device)
    done, facts = _read_parts(context)

    def channels(name: str) -> int:
        return entries[name]["architecture"]["mamba_head_dim"]

    path = context.folder / PART_FILE
    if done:
        context.goes_on(f"{len(done):,} of {len(batches) * len(entries):,} zero-shot batches")
    with context.console.track("zero-shot", len(batches) * len(entries), "candidate batches", len(done)) as advance, path.open("a", buffering=1) as file:
        for head_dim, group in groupby(sorted(entries, key=channels), key=channels):
            names = list(group)
            missing = {index: some for index in range(len(batches)) if (some := [name for name in names if (name, index) not in done])}
            for index, name, distance, fact in _measured(context, {name: entries[name] for name in names}, head_dim, batches, missing):
                done[name, index], facts[name] = distance, fact
                file.write(json.dumps([name, index, astuple(distance), fact]) + "\n")
                advance(1)
    totals = {name: sum((done[name, index] for index in range(len(batches))), Distance()) for name in entries}
    _refuse_twins(facts)
    path.unlink()
    means = {name: distance.means() for name, distance in totals.items()}
    measured = {name: {**_zero_shot_facts(mean), **facts.get(name, {})} for name, mean in means.items()}
    return ZeroShot(measured, best_first({name: mean["loss"] for name, mean in means.items()}) or list(entries))


def _measured(context: StageContext, entries: Mapping[str, dict], head_dim: int, batches: list[torch.Tensor], missing: Mapping[int, list[str]]
              ) -> Iterator[tuple[int, str, Distance, dict]]:  # fmt: skip
    """(batch, candidate, distance, facts of its view) for what is missing, by batch; nothing is loaded where nothing is."""
    if not missing:
        return
    device = batches[0].device
    _check_memory(context, device, tokens=batches[0].numel())
    students = {name: Architecture(**entries[name]["architecture"]) for name in sorted({name for some in missing.values() for name in some})}
    sorted_base = _sorted_base(context, head_dim, students.values(), device)
    teacher = sorted_base.model if "base" not in context.inputs else _load(context, "teacher", device)
    views = {name: sorted_base.view(student, tuple(entries[name]["kept_layers"])) for name, student in students.items()}
    for index, some in missing.items():
        models = {name: views[name].model for name in some}
        for name, distance in measure_batch(teacher, models, batches[index]).items():
            yield index, name, distance, _view_facts(views[name])


def _check_memory(context: StageContext, device: torch.device, *, tokens: int) -> None:
    """Raises ValueError where a GPU cannot hold the base, in the teacher's stead or beside it; candidates are views of it."""
    settings = context.settings
    base = with_own_head(base_architecture(settings)) if ranks_rotated(settings) else base_architecture(settings)
    stages = {"teacher": teacher_architecture(settings), base_stage(settings): base}  # a teacher that is the base once
    models = [(architecture, stored_bytes(context.inputs[stage].model_folder)) for stage, architecture in stages.items()]
    plan = forward_memory("shortlist", models, tokens=tokens, logits_tokens=GPU_CHUNK_TOKENS, advice="Lower evaluate.batch, or set search.shortlist_size=1 and "
                          "search.finalists=0, which measures nothing")  # fmt: skip
    check_on_gpu(plan, device)


def _zero_shot_facts(mean: Mapping[str, float]) -> dict:
    """What the table says; a candidate whose loss is no number stays in it, marked."""
    if not math.isfinite(mean["loss"]):
        return {"zero_shot_loss": None, "zero_shot_kl": None, "note": "its zero-shot loss is not a number"}
    return {"zero_shot_loss": mean["loss"], "zero_shot_kl": mean["kl"]}


def _load(context: StageContext, stage: str, device: torch.device):
    folder = context.inputs[stage].model_folder
    return family_of(read_config(folder)).load(folder, device=str(device))


def _sorted_base(context: StageContext, head_dim: int, students: Iterable[Architecture], device: torch.device) -> SortedTeacher:
    folder = context.base_folder
    config = read_config(folder)
    family, settings = family_of(config), context.settings
    scores, architecture, model = scores_of(context.inputs["score"], settings), base_architecture(settings), family.load(folder, device=str(device))
    rotates, refits = ranks_rotated(settings), refitted_widths(settings)
    calibration = batches_of(calibration_rows(context, candidate_samples(settings)), settings.prune.batch, device) if rotates or refits else []
    norm_scales = rotate_model(family, model, architecture, calibration, config=config) if rotates else {}
    architecture, students = with_own_head(architecture) if rotates else architecture, list(students)
    fewer_keys = any(student.num_key_value_heads < architecture.num_key_value_heads for student in students)
    sorted_base = SortedTeacher(family, model, config, architecture, scores, head_dim, norm_scales=norm_scales, sort_key_values=fewer_keys)
    if refits:
        others = {width: getattr(architecture, width) for width in WIDTHS if width not in (*refits, "hidden")}
        refit_widths(sorted_base, [replace(student, **others) for student in students], calibration, set_ridge(settings.prune))
    return sorted_base


def _view_facts(view: View) -> dict:
    """What of the model is its own: bytes copied for it, and the digest that tells it from the others."""
    return {"copied_bytes": view.copied_bytes, "copied_mamba_bytes": view.mamba_copied_bytes, "view_digest": view.digest}


def _refuse_twins(facts: Mapping[str, dict]) -> None:
    """Two candidates made of the same numbers would mean that a cut did not happen. Raises RuntimeError."""
    by_digest: dict[str, str] = {}
    for name, fact in facts.items():
        twin = by_digest.setdefault(fact["view_digest"], name)
        if twin != name:
            raise RuntimeError(f"candidates {twin} and {name} were cut to the same weights")


def _read_parts(context: StageContext) -> tuple[dict[tuple[str, int], Distance], dict[str, dict]]:
    """Finished measurements of an interrupted run, and the facts of those views; a half-written last line is left out."""
    path = context.folder / PART_FILE
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    if lines:
        path.write_text("".join(lines))
    parts = [json.loads(line) for line in lines]
    return {(name, index): Distance(*values) for name, index, values, _ in parts}, {name: facts for name, _, _, facts in parts}
