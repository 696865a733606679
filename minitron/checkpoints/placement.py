"""Where the teacher is while it is scored: whole on a device, or streamed from disk one layer at a time.

Both give the same three things: embedded tokens, layers to visit in order, and the output head. The
arithmetic is the same modules on the same shapes, so on CPU the scores are equal bit for bit.
"""

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from distill.batches import split_padding
from distill.products import as_head_takes, logits_of
from memory_budget.architecture import Architecture
from minitron.checkpoints.files import Checkpoint, PlannedWeights
from minitron.checkpoints.stored_linear import StoredLinear, load_to_compute
from minitron.checkpoints.streamed_experts import StreamedExperts
from minitron.families.base import Family
from minitron.families.experts import experts_of
from minitron.families.state import model_tensors
from minitron.families.table import expert_of, names_by_canonical, split_layer

ROWS_BYTES = 2**25  # of a vocabulary's matrix, which is never in memory whole where it is only looked up and rewritten


def ids_and_mask(rows_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids that a model takes and the mask of real tokens, both [B, T]; None where all are real, which is cheaper to sum."""
    ids_BT, mask_BT = split_padding(rows_BT)
    return ids_BT, None if bool(mask_BT.all()) else mask_BT


@dataclass(frozen=True, slots=True)
class Head:
    """Final norm and output projection."""

    norm: nn.Module
    projection: nn.Module

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] to float32 logits [..., V]; on a GPU they are never rounded to less."""
        normed = self.norm(hidden)
        if isinstance(self.projection, StoredLinear):  # which computes in its input's dtype
            return self.projection(normed).float()
        if normed.device.type != "cuda":
            return self.projection(as_head_takes(normed, self.projection.weight)).float()
        return logits_of(normed.flatten(0, -2), self.projection.weight).unflatten(0, normed.shape[:-1])


def look_up(ids_BT: torch.Tensor, first: int, rows_VD: torch.Tensor, into_BTD: torch.Tensor, scale: float = 1.0) -> None:
    """Embeds the ids that some rows of a table, from `first` on, have, times a number, in the dtype of what they are written to."""
    here_BT = (ids_BT >= first) & (ids_BT < first + len(rows_VD))
    looked_up = rows_VD[ids_BT[here_BT] - first].to(into_BTD.dtype)
    into_BTD[here_BT] = looked_up if scale == 1 else looked_up * torch.tensor(scale, dtype=into_BTD.dtype, device=into_BTD.device)


class _Given(Exception):  # noqa: N818
    """What a part of a layer is given, on its way out of the layer."""


def given_to(part: nn.Module, block: nn.Module, residual: torch.Tensor) -> torch.Tensor:
    """What a part of a layer is given where the layer is given `residual`; nothing from there on is computed."""

    def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        raise _Given(args[0])

    handle = part.register_forward_pre_hook(stop)
    try:
        block(residual)
    except _Given as found:
        return found.args[0]
    finally:
        handle.remove()
    raise AssertionError(f"{type(block).__name__} does not use {type(part).__name__}")


def run_layer(block: nn.Module, residuals: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a layer makes of every batch [B, T, D]. One with experts takes all rows at once, so that each of them is read once and asked once."""
    if experts_of(block) is None:
        return [block(residual_BTD) for residual_BTD in residuals]
    return list(block(torch.cat(list(residuals))).split([len(residual_BTD) for residual_BTD in residuals]))


class PlacedModel(Protocol):
    """A model that can be walked layer by layer."""

    family: Family
    architecture: Architecture
    device: torch.device

    def embed(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Ids [B, T] to hidden states [B, T, D], for every batch."""

    def stored_rows(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor outside the layers, by its canonical name and as it is stored, some rows at a time, each time with the number of the first."""

    def visit(self, layers: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        """The given layers in order, each ready to run; one is valid until the next is asked for."""

    def open_head(self):
        """Context manager giving the Head."""


class WholeModel:
    """placement=device: everything in memory."""

    def __init__(self, family: Family, model: nn.Module, architecture: Architecture):
        self.family, self.architecture = family, architecture
        self.model, self.parts = model.eval(), family.parts(model)
        self.device = next(model.parameters()).device
        self.float32_stream = family.float32_stream(model.config.to_dict())

    def embed(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        embedded = (self.parts.embed(ids_BT) for ids_BT in batches)
        return [residual_BTD.float() if self.float32_stream else residual_BTD for residual_BTD in embedded]

    def stored_rows(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        yield 0, model_tensors(self.family, self.model)[name]

    def visit(self, layers: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        for layer in layers:
            yield layer, self.parts.layers[layer]

    @contextmanager
    def open_head(self) -> Iterator[Head]:
        yield Head(self.parts.norm, self.parts.head)


class StreamedModel:
    """placement=stream: one layer in memory, the next one being read, and of its experts one and the next; embeddings and head only while they are used.

    `weights` is where tensors are read from, the folder when None.
    """

    def __init__(self, family: Family, folder: Path, config: Mapping, architecture: Architecture, device: torch.device, *,
                 weights: PlannedWeights | None = None):  # fmt: skip
        self.family, self.architecture, self.config, self.device = family, architecture, dict(config), device
        self.checkpoint = weights or Checkpoint(folder)
        self.names = names_by_canonical(family, architecture, self.checkpoint.entries)
        self._of_layers: dict[int | None, dict[str, str]] = defaultdict(dict)  # by layer, names in the files by those in the layer
        for name, file_name in self.names.items():
            layer, suffix = split_layer(name)
            self._of_layers[layer][suffix] = file_name
        self.dtype = _model_dtype(self.config, self.checkpoint)
        keep_freed_memory()

    def embed(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        dtype = torch.float32 if self.family.float32_stream(self.config) else self.dtype
        residuals = [torch.empty(*ids_BT.shape, self.architecture.hidden, dtype=dtype, device=self.device) for ids_BT in batches]
        for first, rows_VD in self.stored_rows(f"{self.family.outside_names['embed']}weight"):
            for ids_BT, residual_BTD in zip(batches, residuals, strict=True):
                look_up(ids_BT, first, rows_VD, residual_BTD, self.family.embed_scale(self.architecture))
        multiplier = self.family.embed_multiplier(self.config)
        return residuals if multiplier == 1 else [residual_BTD.mul_(multiplier) for residual_BTD in residuals]

    def stored_rows(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        for first, rows in self.checkpoint.read_rows(self.names[name], ROWS_BYTES):
            yield first, rows.to(self.device)

    def visit(self, layers: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        with ThreadPoolExecutor(max_workers=1) as reader:
            begun = None
            for layer, following in zip(layers, [*layers[1:], None], strict=True):
                stored = (begun or self._begin_reading(reader, layer)).result()
                begun = None if following is None else self._begin_reading(reader, following)
                block = self._load(lambda layer=layer: self.family.build_layer(self.config, layer), stored)
                del stored
                if (experts := experts_of(block)) is not None:
                    experts.source = StreamedExperts(experts, self._named(layer, experts=True), self.checkpoint, self.dtype, self.device)
                yield layer, block
                del block, experts

    @contextmanager
    def open_head(self) -> Iterator[Head]:
        give_back_memory()  # a vocabulary's matrix does not fit where layers were
        yield Head(*(self._load_outside(part) for part in ("norm", "head")))

    def _begin_reading(self, reader: ThreadPoolExecutor, layer: int) -> Future[dict[str, torch.Tensor]]:
        """A layer's tensors as stored, but for its experts'. Their memory is asked for here, in the thread that lets it go again: another thread's does not
        come back to it."""
        names = self._named(layer, experts=False)
        return reader.submit(self._fill, names, self._empty(names))

    def _named(self, layer: int, *, experts: bool) -> dict[str, str]:
        """Names in the files by those in a layer: of its experts, or of all else."""
        return {name: file_name for name, file_name in self._of_layers[layer].items() if (expert_of(name) is not None) == experts}

    def _empty(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        return {name: self.checkpoint.empty(file_name) for name, file_name in names.items()}

    def _fill(self, names: Mapping[str, str], empty: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self.checkpoint.read(names[name], into=tensor).to(self.device) for name, tensor in empty.items()}

    def _load_outside(self, part: str) -> nn.Module:
        prefix = self.family.outside_names["embed" if part == "head" and self.architecture.tied_embeddings else part]
        names = {name[len(prefix) :]: file_name for name, file_name in self._of_layers[None].items() if name.startswith(prefix)}
        return self._load(lambda: self.family.build_outside(self.config, part), self._fill(names, self._empty(names)))

    def _load(self, build: Callable[[], nn.Module], state: dict[str, torch.Tensor]) -> nn.Module:
        """A module of these tensors that computes in the model's dtype."""
        with torch.device("meta"):
            module = build()
        return load_to_compute(module, state, self.dtype)


def _model_dtype(config: Mapping, checkpoint: Checkpoint | PlannedWeights) -> torch.dtype:
    """The dtype that from_pretrained(dtype="auto") gives: config.json's, else that of the first floating point tensor."""
    from minitron.checkpoints.files import DTYPES

    named = config.get("dtype") or config.get("torch_dtype")
    if named is not None:
        return getattr(torch, named)
    return next(DTYPES[entry.dtype] for entry in checkpoint.entries.values() if DTYPES[entry.dtype].is_floating_point)


def keep_freed_memory() -> None:
    """What this process frees stays with it for what it needs next, where the C library is glibc; elsewhere nothing happens.

    For layers that come and go: given back and asked for anew, their pages are emptied one by one by the kernel, which on a virtual machine was half
    of the time of a walk through a 12B. (The numbers are malloc.h's M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD.)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-8, 1)
        mallopt(-4, 0)
        mallopt(-1, -1)


def give_back_memory() -> None:
    """Undoes what keep_freed_memory has kept so far."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
