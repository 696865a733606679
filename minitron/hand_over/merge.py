"""A weighted mean of checkpoints of one architecture, streamed from disk to disk."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.units import GIB, format_gib
from minitron.checkpoints.files import DTYPES, PIECE_BYTES, Checkpoint, PlannedTensor
from minitron.checkpoints.folder import content_digest
from minitron.checkpoints.publish import formats_of, model_card, write_planned
from minitron.families.base import Family
from minitron.families.config_json import transformers_config
from minitron.families.known import family_of
from minitron.families.table import left_out, names_by_canonical
from minitron.hand_over.merge_sweep import best_of, said_of, sweep_lines, try_weights
from minitron.settings.hand_over import MERGEABLE
from minitron.walk.stage import StageContext

SECOND_NAMES = {"torch_dtype", "rms_norm_eps", "rope_theta", "rope_scaling", "hybrid_override_pattern"}  # of what another key says
MOST_SHOWN = 60  # letters of a value


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint of a merge: what the settings call it, what a card calls it, and its weight; tensors by their canonical names."""

    label: str
    title: str
    share: float
    checkpoint: Checkpoint
    names: dict[str, str]

    @property
    def architecture(self) -> Architecture:
        return architecture_from_config(read_config(self.folder))

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder


def merge_checkpoints(context: StageContext) -> dict:
    """Writes checkpoint/: the weighted mean, with the first checkpoint's dtypes, config and tokenizer; read back before done."""
    first = read_config(_folder_of(context, context.settings.merge.checkpoints[0]))
    family, architecture = family_of(first), architecture_from_config(first)
    sources = _sources(context, family)
    for source in sources:
        for note in (*source.checkpoint.notes, *left_out(family, source.architecture, source.checkpoint.entries)):
            context.console.say(f"merge.checkpoints: {source.label}: {note}")
    for other in sources[1:]:
        check_same_kind(family, sources[0], other)
        if idle := idle_differences(family, sources[0], other):
            context.console.say(f"merge.checkpoints: {other.label} differs in what computes nothing, and {sources[0].label}'s is kept: {idle}")
    tried = []
    if context.settings.merge.candidates():
        tried = try_weights(context, family, first, lambda shares: merged_tensors(family, weighted(sources, shares)))
        sources = weighted(sources, best_of(tried)["weights"])
    planned = merged_tensors(family, sources)
    total = sum(tensor.num_bytes for tensor in planned)
    terms = [f"- {source.share:g} × {source.title} (`{content_digest(source.folder)}`)" for source in sources]
    lines = ["Weighted mean of these checkpoints, tensor by tensor (in brackets what tells each from others of its name):", "", *terms, *sweep_lines(tried)]
    name = f"merge of {len(sources)} checkpoints"
    card = model_card(name, lines=lines, architecture=architecture, base=None)
    with context.console.track("merging", total / GIB, "GiB") as advance:
        check = write_planned(context.folder / "checkpoint", family, planned, config=family.hf_config(first, architecture), companions=sources[0].folder,
                              card=card, max_shard_bytes=int(context.settings.prune.max_shard_gib * GIB),
                              on_bytes=lambda num_bytes: advance(num_bytes / GIB))  # fmt: skip
    merged = [{"checkpoint": source.label, "name": source.title, "weight": source.share} for source in sources]
    sum_of = " + ".join(f"{source.share:g} × {source.label}" for source in sources)
    headline = f"{sum_of}{said_of(tried)}, {format_gib(total)} written in {formats_of(planned)}; {check}"
    return {"headline": headline, "path": "checkpoint", "name": name, "merged": merged, **({"sweep": tried} if tried else {})}


def weighted(sources: Sequence[Source], shares: Sequence[float]) -> list[Source]:
    """The same checkpoints with other weights."""
    return [replace(source, share=share) for source, share in zip(sources, shares, strict=True)]


def _folder_of(context: StageContext, label: str) -> Path:
    return context.inputs[label].model_folder if label in MERGEABLE else Path(label).resolve()


def _sources(context: StageContext, family: Family) -> list[Source]:
    settings, found = context.settings.merge, []
    for label, share in zip(settings.checkpoints, settings.shares(), strict=True):
        checkpoint = Checkpoint(_folder_of(context, label))
        title = context.inputs[label].facts.get("name", "the pruned model") if label in MERGEABLE else checkpoint.folder.name
        config = read_config(checkpoint.folder)
        if (other := family_of(config)) is not family:
            raise ValueError(f"merge.checkpoints: {label} ({checkpoint.folder}) is a {other.model_type}, {settings.checkpoints[0]} a {family.model_type}; "
                             "all must be of one model")  # fmt: skip
        names = names_by_canonical(family, architecture_from_config(config), checkpoint.entries)
        found.append(Source(label, title, share, checkpoint, names))
    return found


def check_same_kind(family: Family, first: Source, other: Source) -> None:
    """Refuse two checkpoints that are not of one model: other tensors, shapes, config.json or vocabulary. Raises ValueError naming what differs."""
    said = f"merge.checkpoints: {other.label} ({other.folder})"
    for one, rest, text in ((first, other, "lacks"), (other, first, "also has")):
        for name in one.names:
            if name not in rest.names:
                raise ValueError(f"{said} {text} tensor {name}, compared with {first.label}; all must have the same tensors")
    for name in first.names:
        shape, expected = (list(source.checkpoint.entries[source.names[name]].shape) for source in (other, first))
        if shape != expected:
            raise ValueError(f"{said} has tensor {name} of shape {shape}, {first.label} of {expected}; all must have the same shapes")
    ours, theirs = _full_config(family, first.folder), _full_config(family, other.folder)
    for key in sorted(family.computing(ours) | family.computing(theirs)):
        if ours.get(key) != theirs.get(key):
            raise ValueError(f"{said} has {key} {theirs.get(key)!r} in its config.json, {first.label} {ours.get(key)!r}; all must compute alike")
    if _vocabulary(first.folder) != _vocabulary(other.folder):
        raise ValueError(f"{said} has another vocabulary in its tokenizer.json than {first.label}; all must number tokens alike")


def idle_differences(family: Family, first: Source, other: Source) -> str:
    """What two config.json say differently that no forward pass depends on, as a person reads it: "key theirs (not ours)"; empty where there is nothing."""
    ours, theirs = _full_config(family, first.folder), _full_config(family, other.folder)
    keys = (ours.keys() | theirs.keys()) - family.computing(ours) - family.computing(theirs) - SECOND_NAMES
    return ", ".join(f"{key} {_shown(theirs, key)} (not {_shown(ours, key)})" for key in sorted(keys) if ours.get(key) != theirs.get(key))


def _shown(config: dict, key: str) -> str:
    text = repr(config[key]) if key in config else "absent"
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"


def _full_config(family: Family, folder: Path) -> dict:
    """config.json with transformers' defaults where it says nothing, so that checkpoints of several writers compare."""
    config = read_config(folder)
    return transformers_config(family.hf_config(config, architecture_from_config(config))).to_dict()


def _vocabulary(folder: Path) -> object:
    """Numbers of the tokens that were learned from text; special ones may have been renamed since. None without a tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    vocabulary = json.loads(path.read_text(encoding="utf-8")).get("model", {}).get("vocab", {})
    return {token: number for token, number in vocabulary.items() if not token.startswith("<")} if isinstance(vocabulary, dict) else vocabulary


def merged_tensors(family: Family, sources: Sequence[Source]) -> list[PlannedTensor]:
    """The weighted mean of every tensor, read piece by piece when its turn to be written comes; dtypes are those of the first source.

    Raises ValueError for a tensor that has no mean: of integers, or of 8 bits, whose scale is another tensor.
    """
    planned = []
    for name, file_name in sources[0].names.items():
        entry = sources[0].checkpoint.entries[file_name]
        for source in sources:
            dtype = source.checkpoint.entries[source.names[name]].dtype
            if not DTYPES[dtype].is_floating_point or DTYPES[dtype].itemsize < 2:
                raise ValueError(f"merge.checkpoints: tensor {name} of {source.label} is {dtype}; only floating-point weights of 16 bits or more can be merged")
        planned.append(PlannedTensor(family.file_name(name), entry.dtype, entry.shape, functools.partial(_merged_pieces, sources, name)))
    return planned


def _merged_pieces(sources: Sequence[Source], name: str) -> Iterator[torch.Tensor]:
    """Σ wᵢ·xᵢ as x − Σ wᵢ·(x − xᵢ) with x of the largest weight: where the checkpoints agree, or one has all the weight, it is exact.

    Computed in float32, or float64 where a checkpoint is stored so.
    """
    main = max(sources, key=lambda source: source.share)
    others = [source for source in sources if source is not main and source.share]
    entries = [source.checkpoint.entries[source.names[name]] for source in (main, *others)]
    row_bytes = [entry.num_bytes // max(entry.shape[0], 1) for entry in entries]
    rows = max(1, PIECE_BYTES // max(1, *row_bytes))  # as many of every checkpoint, whatever its dtype
    streams = [source.checkpoint.read_rows(source.names[name], most_bytes=rows * size) for source, size in zip((main, *others), row_bytes, strict=True)]
    working = functools.reduce(torch.promote_types, (DTYPES[entry.dtype] for entry in entries), torch.float32)
    stored = DTYPES[sources[0].checkpoint.entries[sources[0].names[name]].dtype]
    for (_, piece), *pieces in zip(*streams, strict=True):
        mean = piece.to(working)
        difference = torch.zeros_like(mean)
        for source, (_, other) in zip(others, pieces, strict=True):
            difference.add_(mean - other.to(working), alpha=source.share)
        merged = mean.sub_(difference).to(stored)
        if not all(map(torch.isfinite, merged.aminmax())):  # both are NaN where one number is
            raise ValueError(f"merge.checkpoints: the mean of tensor {name} is not finite in {stored}; a checkpoint holds an infinity or NaN, or overflows it")
        yield merged
