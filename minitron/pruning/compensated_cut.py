"""The compensated cut of the prune stage: the base walked from disk one layer at a time, the student's layers written as they are made.

A run that was interrupted goes on behind the last whole shard: what is on disk is the student's, the walk goes over it without solving again.
"""

import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import nn

from distill.batches import count_tokens
from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.units import GIB
from minitron.checkpoints.files import DTYPES, Checkpoint, PlannedTensor, PlannedWeights, bytes_of
from minitron.checkpoints.placement import StreamedModel, ids_and_mask
from minitron.checkpoints.shards import write_weights
from minitron.families.base import Family
from minitron.machine.device import pick_device, process_memory_bytes
from minitron.machine.pace import pace_here
from minitron.pruning.basis import Basis
from minitron.pruning.compensate import CompensatedCut, build_compensated
from minitron.pruning.cut_cost import CutCost
from minitron.pruning.damage import walked_loss
from minitron.pruning.directions import stream_basis
from minitron.pruning.plan import PruningPlan, Recipe, recipe_of
from minitron.settings.derived import calibration_samples, candidate_samples
from minitron.text.samples import batches_of, screening_rows, spread_rows
from minitron.walk.integrity import synced, usual_mode
from minitron.walk.stage import StageContext

BASIS_FILE = "basis.safetensors"
RESIDUALS_FOLDER = "residuals"
SHARD_BYTES = 2**30  # at most: what an interrupted run loses
SAME_RESIDUALS = 1e-4  # of the largest, after all layers, the same sums in another order


def write_compensated(context: StageContext, family: Family, plan: PruningPlan, sliced: list[PlannedTensor], folder: Path, *,
                      on_plan: Callable[[PruningPlan], None]) -> "MadeWeights":  # fmt: skip
    """Writes the weights of the compensated cut to `folder`: the plain slice's tensors by name, shape and dtype.

    Raises ValueError as CompensatedCut does, and before anything is loaded where the device's memory is too small for it.
    """
    settings, source, device = context.settings.prune, context.base_folder, pick_device(context.settings)
    rows, recipe = calibration_rows(context, calibration_samples(context.settings)), recipe_of(settings, plan.student)
    base = _streamed(family, source, read_config(source), plan.teacher, device)
    widest = max(dtype.itemsize for dtype in _stored_dtypes(base).values())
    cost = CutCost(plan.teacher, plan.student, recipe, len(rows), count_tokens(rows), widest)
    cost.check_memory(*process_memory_bytes(device))
    batches = batches_of(rows, settings.batch, device)
    context.console.say(f"    prune  {cost.line(pace_here(str(device.type)))}")
    if note := cost.few_tokens_note():
        context.console.say(f"    prune  {note}")
    kept_basis = context.folder / BASIS_FILE
    turns = plan.student.hidden < plan.teacher.hidden and not kept_basis.exists()
    walks = 1 + turns * {"loss": 2, "variance": 1, None: 0}[recipe.directions]
    with context.console.track("compensating", plan.teacher.num_sublayers * walks, "layers") as advance:
        if not kept_basis.exists():
            scratch = context.folder / RESIDUALS_FOLDER
            basis = stream_basis(base, plan, batches, directions=recipe.directions, config=base.config, samples=recipe.direction_samples,
                                 scratch=scratch, on_layer=lambda: advance(1))  # fmt: skip
            shutil.rmtree(scratch, ignore_errors=True)
            write_basis(basis, kept_basis)
        made = MadeWeights(base, plan, batches, read_basis(kept_basis, device), recipe, folder, on_layer=lambda: advance(1), on_plan=on_plan)
        if made.stored:
            context.console.say(f"    prune  {len(made.stored)} tensors are written already; going on behind them")
        made.write(sliced, max_shard_bytes=min(SHARD_BYTES, int(settings.max_shard_gib * GIB)))
    if kept := made.cut.feed_forward_kept:
        undone = "; elsewhere it did not serve rows held back, and the fit stayed" if sum(kept) < len(kept) else ""
        left = made.cut.not_trained
        behind = f"; the {left} behind them were not trained" if left else ""
        context.console.say(f"    prune  training feed-forward layers on their own outputs helped in {sum(kept)} of {len(kept)}{undone}{behind}")
    if trained := made.local_training:
        undone = trained["tried"] - trained["kept"]
        note = f"; {undone:,} times of {trained['tried']:,} it did not lower it, and the fit stayed" if undone else ""
        context.console.say(f"    prune  training each expert on its layer's output left {trained['error_left']:.2f} of the error behind the fit{note}")
    return made


def write_basis(basis: Basis, path: Path) -> None:
    named = {"matrix": basis.matrix_DK, **dict(zip(("left", "right"), basis.factors or (), strict=False))}
    unfinished = path.with_suffix(".partial")
    with usual_mode(unfinished):
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, unfinished)
    synced(unfinished)
    os.replace(unfinished, path)


def read_basis(path: Path, device: torch.device) -> Basis:
    tensors = load_file(path, device=str(device))
    return Basis(tensors["matrix"], (tensors["left"], tensors["right"]) if "left" in tensors else None)


class MadeWeights:
    """The tensors of a compensated cut, each written once it is made, and what is known of them afterwards."""

    def __init__(self, base: StreamedModel, plan: PruningPlan, batches: Sequence[torch.Tensor], basis: Basis, recipe: Recipe, folder: Path, *,
                 on_layer: Callable[[], None] = lambda: None, on_plan: Callable[[PruningPlan], None] = lambda _: None):  # fmt: skip
        self.family, self.plan, self.batches, self.folder = base.family, plan, batches, folder
        self.stored = {
            self.family.canonical_name(entry.name): partial(Checkpoint(folder, file=path.name).read, entry.name)
            for path in sorted(folder.glob("*.safetensors")) for entry in Checkpoint(folder, file=path.name).entries.values()
        }  # fmt: skip
        self.cut = CompensatedCut(base, plan, batches, basis, recipe, config=base.config, dtypes=_stored_dtypes(base), stored=self.stored, on_layer=on_layer,
                                  on_plan=on_plan)  # fmt: skip
        self.tensors = self.cut.tensors()
        self.waiting: dict[str, list[torch.Tensor]] = {}  # made, and not yet asked for: of one layer at most
        self.checksums: dict[str, int] = {}

    def write(self, sliced: Sequence[PlannedTensor], *, max_shard_bytes: int) -> None:
        """In the order in which they are made; whole shards of an interrupted run are kept."""
        order = sorted(sliced, key=lambda tensor: self._place(self.family.canonical_name(tensor.name)))
        planned = [replace(tensor, pieces=partial(self._take, self.family.canonical_name(tensor.name))) for tensor in order]
        write_weights(self.folder, planned, max_shard_bytes=max_shard_bytes)
        assert not list(self.tensors), "the walk made tensors that the plan does not have"  # goes to its end where all were stored

    def _place(self, name: str) -> int:
        """Where the walk comes by: embeddings, layers, the rest."""
        if name.startswith(self.family.outside_names["embed"]):
            return -1
        return int(name.split(".")[1]) if name.startswith("layers.") else self.plan.student.num_sublayers

    def _take(self, name: str) -> Iterator[torch.Tensor]:
        if name in self.stored:  # in a shard of another size
            yield self.stored[name]()
            return
        while name not in self.waiting:
            made, pieces = next(self.tensors)
            if made == name:
                yield from self._summed(name, pieces)
                return
            self.waiting[made] = list(pieces)
        yield from self._summed(name, self.waiting.pop(name))

    def _summed(self, name: str, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        checksum = xxhash.xxh3_64()
        for piece in pieces:
            piece = piece.cpu()
            checksum.update(bytes_of(piece))
            yield piece
        self.checksums[name] = checksum.intdigest()

    @property
    def local_training(self) -> dict[str, float] | None:
        """Of the layers made now, how often an expert was trained and how often that was `kept`, and the mean over layers of the share of the error left; None
        where none was."""
        layers = [layer for layer in self.cut.trained if layer.tried]
        if not layers:
            return None
        left = statistics.fmean(layer.after / layer.before if layer.before else 1.0 for layer in layers)
        return {"tried": sum(layer.tried for layer in layers), "kept": sum(layer.kept for layer in layers), "error_left": left}

    @torch.no_grad()
    def check(self, config: Mapping) -> str:
        """Holds the folder, read back, against what was made: the bits of every tensor made in this run, and the residuals behind the last layer.

        `config` is the config.json planned for it. Gives a sentence on what was found; raises RuntimeError where something differs.
        """
        written = Checkpoint(self.folder)
        for name, wanted in self.checksums.items():
            found = xxhash.xxh3_64()
            for _, rows in written.read_rows(self.family.file_name(name)):
                found.update(bytes_of(rows))
            if found.intdigest() != wanted:
                raise RuntimeError(f"{self.folder}: tensor {self.family.file_name(name)}, read back, is not what was made")
        if architecture_from_config(read_config(self.folder)) != architecture_from_config(config):
            raise RuntimeError(f"{self.folder}/config.json, read back, describes another architecture than was planned")
        expected, device = self.cut.streams.student[0], self.cut.base.device
        model = _streamed(self.family, self.folder, read_config(self.folder), self.plan.student, device)
        (found,) = model.embed([ids_and_mask(self.batches[0])[0]])
        for _, block in model.visit(range(self.plan.student.num_sublayers)):
            found = block(found)
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if not difference <= SAME_RESIDUALS:
            raise RuntimeError(f"{self.folder}, read back, gives residuals that differ by {difference:.1e} of the largest from those it was made with")
        compared = f"the {len(self.checksums)} tensors made now" if self.stored else "every tensor"
        return f"read back: {compared} equal, residuals of {found.shape[0] * found.shape[1]:,} tokens differ by {difference:.1e}"


def compensated_model(context: StageContext, family: Family, plan: PruningPlan) -> nn.Module:
    """A candidate as the prune stage would write it, float32 and in memory, cut on the rows that candidates have. Raises ValueError as CompensatedCut does."""
    settings, source = context.settings.prune, context.base_folder
    base = _streamed(family, source, read_config(source), plan.teacher, pick_device(context.settings))
    batches = batches_of(calibration_rows(context, candidate_samples(context.settings)), settings.batch, base.device)
    return build_compensated(base, plan, batches, recipe_of(settings, plan.student), config=base.config, dtypes=_stored_dtypes(base))


def calibration_rows(context: StageContext, number: int) -> np.ndarray:
    """Rows of the train split, padding -1, that basis and refits are measured on."""
    return spread_rows(np.load(context.inputs["data"].folder / "train.npy", mmap_mode="r"), number)


def damage(context: StageContext, family: Family, plan: PruningPlan, sliced: list[PlannedTensor], folder: Path) -> dict[str, float]:
    """Held-out loss in nats per token of the base, of its plain slice and of the compensated cut in `folder`, on the rows that screen candidates."""
    settings, source = context.settings, context.base_folder
    device, config = pick_device(settings), read_config(folder)
    rows = np.load(context.inputs["data"].folder / "heldout.npy", mmap_mode="r")
    batches = batches_of(spread_rows(screening_rows(rows), settings.search.screen_samples), settings.prune.batch, device)
    models = {
        "base": _streamed(family, source, read_config(source), plan.teacher, device),
        "slice": _streamed(family, source, config, plan.student, device, weights=PlannedWeights(sliced)),
        "compensated": _streamed(family, folder, config, plan.student, device),
    }
    return {name: walked_loss(model, batches) for name, model in models.items()}


def _streamed(family: Family, folder: Path, config: Mapping, architecture: Architecture, device: torch.device, *,
              weights: PlannedWeights | None = None) -> StreamedModel:  # fmt: skip
    """A model that computes in float32 whatever it is stored in: a refit measures differences."""
    return StreamedModel(family, folder, {**config, "dtype": "float32"}, architecture, device, weights=weights)


def _stored_dtypes(base: StreamedModel) -> dict[str, torch.dtype]:
    """By canonical name."""
    return {name: DTYPES[base.checkpoint.entries[file_name].dtype] for name, file_name in base.names.items()}
