"""Which rows a phase of distillation draws from, and how much from each. Loads no torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any

from minitron.settings.data import DataSettings
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings
from minitron.settings.training import Form, PhaseSettings, SourceSettings
from minitron.sources.source import source_identity

# Of DataSettings: what source_identity answers for.
SOURCE_SETTINGS = ("files", "dataset", "dataset_config", "dataset_revision", "dataset_split", "text_field", "arithmetic", "embedded")
CONVERSATIONS_VERSION = 3  # counts up when minitron.generation.conversations writes them out otherwise
DATA_ROWS = "train"  # the data stage's own


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one source in a phase: the file's name, the settings that make it, and its share of the blend."""

    name: str
    data: DataSettings
    weight: float


def phase_parts(settings: Settings) -> list[list[Part]]:
    """What every phase draws from; without phases, the data stage's rows."""
    phases = settings.distill.phases or [PhaseSettings()]
    return [_parts(settings.data, phase) for phase in phases]


def rows_to_make(settings: Settings) -> Mapping[str, DataSettings]:
    """The settings of all rows that the data stage has not made, by name."""
    return {part.name: part.data for parts in phase_parts(settings) for part in parts if part.name != DATA_ROWS}


def without_truncation(settings: Settings) -> Settings:
    """The same distillation on whole reasoning traces alone."""
    phases = settings.distill.phases or [PhaseSettings(tokens=settings.distill.train.tokens)]
    whole = [replace(phase, truncated_share=None if phase.blend else 0.0, blend=[replace(source, truncated_share=0.0) for source in phase.blend])
             for phase in phases]  # fmt: skip
    return replace(settings, distill=replace(settings.distill, phases=whole))


def _parts(data: DataSettings, phase: PhaseSettings) -> list[Part]:
    length, rows = phase.sequence_length or data.sequence_length, phase.rows or data.rows
    if not phase.blend:
        share = data.truncated_share if phase.truncated_share is None else phase.truncated_share
        own = replace(data, rows=rows, sequence_length=length, truncated_share=share)
        if own == data:
            return [Part(DATA_ROWS, data, 1.0)]
        return [_part(replace(own, max_train_tokens=None, max_heldout_tokens=None), phase, 1.0)]
    total = sum(source.weight for source in phase.blend)
    return [_part(replace(_data_of(source, data, length), rows=rows), phase, source.weight / total) for source in phase.blend]


def _part(data: DataSettings, phase: PhaseSettings, share: float) -> Part:
    """No more rows than the phase will draw."""
    limited = replace(data, max_train_tokens=max(ceil(phase.tokens * share / data.sequence_length), 1) * data.sequence_length)
    return Part(hashlib.sha256(json.dumps(rows_identity(limited)).encode()).hexdigest()[:12], limited, share)


def rows_identity(data: DataSettings) -> dict[str, Any]:
    """What a key says of the rows made from a source: how they are cut, and the source's contents instead of where it lies."""
    absent = () if data.key_value_share else ("key_value_share",)  # which keys of earlier versions do not have
    may_be_conversations = (data.files or data.dataset) and data.form is not Form.text
    written = {"conversations": CONVERSATIONS_VERSION} if may_be_conversations else {}
    own = {name: value for name, value in key_settings(data).items() if name not in (*SOURCE_SETTINGS, *absent)}
    return own | written | {"source": source_identity(data)}


def _data_of(source: SourceSettings, data: DataSettings, length: int) -> DataSettings:
    own = {f.name: getattr(source, f.name) for f in fields(SourceSettings) if f.name not in ("weight", "answers_only")}
    answers_only = data.answers_only if source.answers_only is None else source.answers_only
    return DataSettings(rows=data.rows, sequence_length=length, vocab=data.vocab, answers_only=answers_only, refused=data.refused, processes=data.processes,
                        **own)  # fmt: skip
