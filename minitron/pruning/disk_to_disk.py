"""Cut the chosen architecture out of the teacher, tensor by tensor from disk to disk; as it is, or compensated for what is lost."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from memory_budget.architecture import Architecture
from memory_budget.hf_config import read_config
from memory_budget.parameters import count_total_parameters
from memory_budget.units import GIB, format_gib
from minitron.checkpoints.files import Checkpoint, PlannedTensor
from minitron.checkpoints.publish import check_layer_by_layer, check_reload, formats_of, student_card, write_companions
from minitron.checkpoints.shards import write_weights
from minitron.families.base import FFN, Family
from minitron.families.known import family_of
from minitron.families.state import load_tensors
from minitron.families.table import left_out, names_by_canonical
from minitron.importance.scores import scores_of
from minitron.machine.memory import available_memory_bytes
from minitron.pruning.compensated_cut import BASIS_FILE, MadeWeights, damage, write_compensated
from minitron.pruning.cut import TensorCut, cut_state, plan_cuts
from minitron.pruning.plan import PruningPlan, make_plan
from minitron.settings.derived import base_stage
from minitron.settings.run import PruneMethod
from minitron.settings.teachers import base_architecture
from minitron.walk.stage import StageContext
from minitron.walk.store import write_json
from nas.axes import LAYERS, WIDTH_AXES

PLAN_FILE = "plan.json"
SHORT_TITLES = {"hidden": "hidden", "ffn": "FFN", "mamba_heads": "Mamba heads"}  # of axes, in a sentence; others by their own


def prune_teacher(context: StageContext) -> dict:
    """Writes checkpoint/ and plan.json; the checkpoint is read back and compared before the stage is done."""
    settings = context.settings
    source_folder = context.base_folder
    config = read_config(source_folder)
    family, architecture = family_of(config), base_architecture(settings)
    chosen = context.inputs["search"].facts["chosen"]
    student = Architecture(**chosen["architecture"])
    scores = scores_of(context.inputs["score"], settings)
    path = context.folder / PLAN_FILE
    plan = found_before(make_plan(architecture, student, tuple(chosen["kept_layers"]), scores), path)

    def on_plan(plan: PruningPlan) -> None:
        write_json(path, plan.to_json())

    on_plan(plan)

    source, compensated = Checkpoint(source_folder), settings.prune.method is PruneMethod.compensated
    for note in left_out(family, architecture, source.entries):
        context.console.say(f"    prune  {note}")
    base, removed = context.inputs[base_stage(settings)], removed_layers(plan)
    name = base.facts["name"]
    described = describe_cut(plan) + (" What is kept was refitted to the base's own activations." if compensated else "")
    title, lines = f"{name}, pruned to {chosen['id']}", [f"Cut from {name}: {described}", "Not distilled yet."]
    card = student_card(context, title, lines=lines, architecture=student, source=base)
    folder = context.folder / "checkpoint"
    sliced, made = write_cut(context, family, plan, folder, card=card, on_plan=on_plan)
    if made:
        check = made.check(family.hf_config(config, student))
        losses = damage(context, family, plan, sliced, folder)
        trained = {"local_training": made.local_training} if made.local_training else {}
        check, facts = f"{check}; {_describe_damage(losses)}", {"held_out_losses": losses, **trained}
        (context.folder / BASIS_FILE).unlink()
    else:
        check, facts = _check(family, plan, source, folder, config), {}
    parameters = count_total_parameters(student)
    sizes = f"{architecture.num_layers} → {student.num_layers} layers, {count_total_parameters(architecture):,} → {parameters:,} parameters"
    headline = f"{sizes}, {format_gib(sum(tensor.num_bytes for tensor in sliced))} written in {formats_of(sliced)}; {check}"
    facts |= {"parameters": parameters, "removed_layers": removed, "description": described}
    return {"headline": headline, "path": "checkpoint", **facts}


def found_before(plan: PruningPlan, path: Path) -> PruningPlan:
    """With what a compensated cut, interrupted, has found on its way: the neurons in the scores' place, by sublayer, since some of their layers may be written
    already, and where training served nothing."""
    written = json.loads(path.read_text()) if path.exists() else {}
    neurons = {layer: tuple(written["units"][FFN][str(layer)]) for layer in written.get("chosen_by_refit", ())}
    return replace(plan.with_neurons(neurons), trained_in_vain=frozenset(written.get("trained_in_vain", ())))


def write_cut(context: StageContext, family: Family, plan: PruningPlan, folder: Path, *, card: str,
              on_plan: Callable[[PruningPlan], None] = lambda _: None) -> tuple[list[PlannedTensor], MadeWeights | None]:  # fmt: skip
    """Writes a plan's checkpoint as prune.method says, config.json after the weights. Gives the plain slice's tensors, and what a compensated cut made.

    `on_plan` hears of a plan that a compensated cut has changed, before anything that follows from it is written.
    """
    source, config = Checkpoint(context.base_folder), read_config(context.base_folder)
    folder.mkdir(exist_ok=True)
    sliced, made = planned_tensors(family, plan, source), None
    if context.settings.prune.method is PruneMethod.compensated:
        made = write_compensated(context, family, plan, sliced, folder, on_plan=on_plan)
    else:
        _write(context, folder, sliced)
    write_companions(folder, config=family.hf_config(config, plan.student), companions=context.base_folder, card=card)
    return sliced, made


def _write(context: StageContext, folder: Path, planned: list[PlannedTensor]) -> None:
    with context.console.track("cutting", sum(tensor.num_bytes for tensor in planned) / GIB, "GiB") as advance:
        write_weights(folder, planned, max_shard_bytes=int(context.settings.prune.max_shard_gib * GIB), on_bytes=lambda num_bytes: advance(num_bytes / GIB))


def planned_tensors(family: Family, plan: PruningPlan, source: Checkpoint) -> list[PlannedTensor]:
    """The student's tensors, each read and cut only when its turn to be written comes. The teacher's dtypes are kept."""
    file_names = names_by_canonical(family, plan.teacher, source.entries)
    shapes = {name: source.entries[file_name].shape for name, file_name in file_names.items()}

    def planned(cut: TensorCut) -> PlannedTensor:
        entry = source.entries[file_names[cut.source]]

        def pieces() -> Iterator[torch.Tensor]:
            return (cut.apply_rows(rows, first) for first, rows in source.read_rows(entry.name))

        return PlannedTensor(family.file_name(cut.target), entry.dtype, cut.shape, pieces)

    return [planned(cut) for cut in plan_cuts(family, plan, shapes)]


def removed_layers(plan: PruningPlan) -> list[int]:
    return sorted(set(range(plan.teacher.num_layers)) - set(plan.kept_layers))


def describe_cut(plan: PruningPlan) -> str:
    """Every axis that became smaller, but for those that went with their last layer, and the layers that went; not from what: runs that share the cut may
    call that by other names."""
    sizes = [(SHORT_TITLES.get(axis.name, axis.title), axis.size(plan.teacher), axis.size(plan.student)) for axis in (*WIDTH_AXES, LAYERS)]
    changed = [f"{label} {before} → {after}" for label, before, after in sizes if before != after > 0]
    layers = removed_layers(plan)
    gone = f" Removed layers (from 0): {', '.join(map(str, layers))}." if layers else ""
    return f"{', '.join(changed) or 'nothing'}.{gone}"


def _check(family: Family, plan: PruningPlan, source: Checkpoint, folder: Path, config: dict) -> str:
    """Compare the written checkpoint with the cut in memory: the models' logits where both fit, else layer by layer."""
    if 3 * 4 * source.num_parameters < available_memory_bytes():
        stored = {name: source.read(name) for name in names_by_canonical(family, plan.teacher, source.entries).values()}
        with torch.device("meta"):
            student = family.build(family.hf_config(config, plan.student))
        load_tensors(family, student, {name: tensor.float().clone() for name, tensor in cut_state(family, plan, stored).items()})
        return f"reloaded, logits differ by {check_reload(folder, family, student.eval()):.1e}"
    check_layer_by_layer(folder, family, planned_tensors(family, plan, source), family.hf_config(config, plan.student))
    return "reloaded layer by layer, every tensor and every layer's output equal"


def _describe_damage(losses: dict[str, float]) -> str:
    added = {name: losses[name] - losses["base"] for name in ("compensated", "slice")}
    return f"held-out loss {added['compensated']:+.3f} nats/token, by the plain slice {added['slice']:+.3f}"
