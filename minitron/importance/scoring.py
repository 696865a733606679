"""Width importance and block influence by one walk, layer importance by leaving layers out."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from memory_budget.hf_config import read_config
from memory_budget.units import GIB
from minitron.checkpoints.files import stored_bytes
from minitron.checkpoints.placement import PlacedModel, StreamedModel, WholeModel
from minitron.families.base import EXPERT, EXPERT_FFN
from minitron.families.known import family_of
from minitron.importance import experts
from minitron.importance.activations import measure_width
from minitron.importance.layers import Block, RoundSums, SweepLimits, measure_round
from minitron.importance.memory import ScoringNeeds
from minitron.importance.removal import Removal, layer_rules, rank_iteratively, rank_once
from minitron.importance.scores import SCORES_FILE, WidthSums, aggregate, load_sums
from minitron.machine.device import pick_device, process_memory_bytes
from minitron.machine.processes import rank, sum_over_processes, world_size
from minitron.settings.derived import base_stage, fewest_layers
from minitron.settings.run import Criterion, Placement
from minitron.settings.teachers import base_architecture
from minitron.text.samples import batches_of, spread_rows
from minitron.walk.stage import StageContext
from minitron.walk.store import write_json

LAYERS_FILE = "layers.json"


def score_model(context: StageContext) -> dict:
    """Writes scores.safetensors (sums per site), layers.json (order of removal with every round's scores) and, of a model with experts, ranking.jsonl."""
    settings = context.settings
    needs = _checked_needs(context)
    model = _placed(context)
    rows = np.load(context.inputs["data"].folder / "train.npy", mmap_mode="r")
    width = _width(context, model, spread_rows(rows, settings.scoring.samples))
    tokens = needs.depth_block_tokens(settings.scoring, _available(context, model))
    removals = _depth(context, model, spread_rows(rows, settings.scoring.layer_samples), width, tokens)
    order = [removal.layer for removal in removals]
    influence = (width.block_influence / width.num_tokens).tolist()
    how_made = {"criterion": settings.scoring.criterion.name, "normalised": settings.scoring.normalised, "width_tokens": width.num_tokens,
                "width_samples": width.num_samples, "data": context.inputs["data"].key, "model": context.inputs[base_stage(settings)].identity}  # fmt: skip
    layers = {"pattern": model.architecture.pattern, "removal_order": order, "rounds": [removal.to_json() for removal in removals]}
    layers |= {"block_influence": influence, "width_curves": _width_curves(width), "how_made": how_made}
    of_experts = experts.expert_scores(width, model.architecture)
    if rank() == 0:
        for others in context.folder.glob("parts-*"):  # of a sitting of another number of processes
            if others.name != f"parts-{world_size()}":
                shutil.rmtree(others)
        width.save(context.folder / SCORES_FILE)
        write_json(context.folder / LAYERS_FILE, layers | ({"experts": of_experts} if of_experts else {}))
    reached = {"experts": _reached(context, of_experts, width)} if of_experts else {}
    first = f"; by {settings.scoring.criterion.name} layers go in the order {' '.join(map(str, order))}" if order else ""
    described = "".join(f"; {experts.describe_reach(one)}" for one in reached.values())
    headline = f"{len(width.sums)} sites scored from {width.num_tokens:,} tokens{described}{first}"
    return {"headline": headline, "removal_order": order, "removal_scores": [r.score for r in removals], "tokens": width.num_tokens, **reached}


def _reached(context: StageContext, of_experts: Mapping[int, Mapping[str, list[float]]], width: WidthSums) -> dict[str, int]:
    """Writes the experts' ranking, and says where too few tokens reached one."""
    reached = experts.reach(of_experts, context.settings.scoring.least_expert_tokens)
    if rank() == 0:
        experts.write_ranking(context.folder / experts.RANKING_FILE, of_experts)
    if note := experts.few_tokens_note(reached, context.settings.scoring, width.num_samples):
        context.console.say(f"    score  {note}")
    return reached


def _width_curves(width: WidthSums) -> dict[str, dict[str, list[float]]]:
    """Per axis and layer the sorted scores as shares of the highest, at 21 evenly spread ranks: how much there is to cut. Of experts' neurons the mean over
    the experts that tokens reached, each of which ranks its own."""
    curves: dict[str, dict[str, list[float]]] = {}
    scores = aggregate(width)
    for (axis, layer), values in sorted(scores.sites.items()):
        if axis == EXPERT_FFN:
            units = values[values.max(1) > 0]
        elif axis == EXPERT:
            units = scores.experts(layer)[None]
        else:
            units = (np.linalg.norm(values, axis=1) if values.ndim == 2 else values)[None]
        ranked = np.sort(units)[:, ::-1][:, np.linspace(0, units.shape[1] - 1, 21).round().astype(int)]
        shares = (ranked / np.maximum(ranked[:, :1], np.finfo(float).tiny)).mean(0) if len(units) else np.zeros(21)
        curves.setdefault(axis, {})[str(layer)] = shares.round(4).tolist()
    return curves


def _checked_needs(context: StageContext) -> ScoringNeeds:
    """What memory scoring needs; on a GPU it is said, and refused where there is too little even for one row at a time."""
    settings, architecture = context.settings, base_architecture(context.settings)
    needs = ScoringNeeds(architecture, settings.data.sequence_length, stored_bytes(context.base_folder), world_size())
    device = pick_device(settings)
    if device.type == "cuda":
        available, place = process_memory_bytes(device)
        plan = needs.plan(settings.scoring, needs.depth_block_tokens(settings.scoring, available))
        context.console.say(f"    score  {plan.describe()}")
        plan.check(available, place)
    return needs


def _available(context: StageContext, model: PlacedModel) -> int:
    """Memory for all of scoring, what the model holds by now included."""
    held = sum(tensor.nbytes for tensor in model.model.state_dict().values()) if isinstance(model, WholeModel) else 0
    return process_memory_bytes(model.device)[0] + held


def _placed(context: StageContext) -> PlacedModel:
    settings = context.settings
    folder = context.base_folder
    config, device = read_config(folder), pick_device(settings)
    family, architecture = family_of(config), base_architecture(settings)
    if settings.scoring.placement is Placement.stream:
        return StreamedModel(family, folder, config, architecture, device)
    return WholeModel(family, family.load(folder, device=str(device)), architecture)


def _blocks(context: StageContext, model: PlacedModel, rows: np.ndarray, block_tokens: int) -> dict[str, list[torch.Tensor]]:
    """This process's share of the rows as blocks of batches, by the rows they hold; each block walks the layers together."""
    scoring, share = context.settings.scoring, rows[rank() :: world_size()]
    per_block = max(1, block_tokens // rows.shape[1])
    starts = range(0, len(share), per_block)
    return {f"{start}-{min(start + per_block, len(share))}": batches_of(share[start : start + per_block], scoring.batch, model.device) for start in starts}


def _width(context: StageContext, model: PlacedModel, rows: np.ndarray) -> WidthSums:
    """The sums over all rows; a finished block of an interrupted run is read back."""
    blocks, total = _blocks(context, model, rows, context.settings.scoring.block_tokens), None
    paths = {name: _part(context, f"width-{name}-of-{len(rows)}.safetensors") for name in blocks}
    if there := sum(path.exists() for path in paths.values()):
        context.goes_on(f"{there} of {len(paths)} blocks of rows (width importance)")
    with context.console.track("width importance", len(blocks) * model.architecture.num_sublayers, "layers") as advance:
        for name, block in blocks.items():
            path = paths[name]
            if path.exists():
                sums = load_sums(path)
                advance(model.architecture.num_sublayers)
            else:
                sums = measure_width(model, block, lambda: advance(1))
                sums.save(path)
            total = sums if total is None else total + sums
    return _reduced(total, model)


def _reduced(total: WidthSums | None, model: PlacedModel) -> WidthSums:
    """Summed over processes, through one flat array."""
    assert total is not None, "every process has at least one row"
    sites = sorted(total.sums)
    flat = np.concatenate([total.sums[site].reshape(-1) for site in sites] + [total.block_influence, [total.num_samples, total.num_tokens]])
    flat = sum_over_processes(flat)
    sums, offset = {}, 0
    for site in sites:
        size = total.sums[site].size
        sums[site] = flat[offset : offset + size].reshape(total.sums[site].shape)
        offset += size
    return WidthSums(sums, flat[offset:-2], int(flat[-2]), int(flat[-1]))


def _depth(context: StageContext, model: PlacedModel, rows: np.ndarray, width: WidthSums, block_tokens: int) -> list[Removal]:
    """The order of removal by the criterion of the settings; finished rounds of an interrupted run are read back."""
    scoring, kinds = context.settings.scoring, model.architecture.layer_kinds
    target, rules = fewest_layers(context.settings), layer_rules(context.settings, kinds)
    if scoring.criterion is Criterion.block_influence:
        return rank_once(kinds, target, rules, dict(enumerate((width.block_influence / width.num_tokens).tolist())))
    blocks = [Block(batches) for batches in _blocks(context, model, rows, block_tokens).values()]
    limits = SweepLimits(scoring.branch_tokens, scoring.logits_tokens, int(scoring.reuse_gib * GIB / max(1, len(blocks))))
    distance = scoring.criterion.name.removeprefix("iterative_")

    def ask(kept: Sequence[int], removable: Sequence[int]) -> Mapping[int, float]:
        total = sum((measure_round(model, block, kept, removable, distance, limits) for block in blocks[1:]),
                    start=measure_round(model, blocks[0], kept, removable, distance, limits))  # fmt: skip
        return _reduced_round(total).scores(distance, normalised=scoring.normalised)

    if not scoring.criterion.name.startswith("iterative_"):
        everything = range(len(kinds))
        return rank_once(kinds, target, rules, ask(everything, everything)) if target < len(kinds) else []
    done = _read_rounds(context)
    if done:
        context.goes_on(f"layer {len(done)} of {len(kinds) - target} that go (layer importance)")
    with context.console.track("layer importance", len(kinds) - target, "layers", done=len(done)) as advance:
        finished = list(done)

        def on_round(removal: Removal) -> None:
            finished.append(removal)
            if rank() == 0:
                write_json(_part(context, "rounds.json"), [round.to_json() for round in finished])
            advance(1, f"layer {removal.layer} goes, {removal.score:.3f}")

        return rank_iteratively(kinds, target, rules, ask, on_round, done)


def _reduced_round(total: RoundSums) -> RoundSums:
    layers = sorted(total.numerators)
    flat = sum_over_processes(np.array([*(total.numerators[layer] for layer in layers), total.full_squares, total.logits, total.tokens]))
    return RoundSums(dict(zip(layers, flat.tolist(), strict=False)), *flat[-3:].tolist())


def _part(context: StageContext, name: str) -> Path:
    """A file of this process for resuming; the number of processes is in its name, since it decides who has which rows."""
    folder = context.folder / f"parts-{world_size()}" / str(rank())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def _read_rounds(context: StageContext) -> list[Removal]:
    path = context.folder / f"parts-{world_size()}" / "0" / "rounds.json"
    rounds = json.loads(path.read_text()) if path.exists() else []
    return [Removal(entry["layer"], entry["score"], {int(layer): score for layer, score in entry["scores"].items()}) for entry in rounds]
