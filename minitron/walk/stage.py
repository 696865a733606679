"""What a stage is: what its module declares, what it is given, and what a walk through stages leaves.

Every module of minitron/stages/ has a STAGE, one of the two kinds below. The walk knows no stage by anything else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.settings.derived import base_stage
from minitron.settings.run import Settings
from minitron.walk.console import Console
from minitron.walk.store import Result


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a stage is given: the settings, its own folder, its inputs' results and the terminal."""

    settings: Settings
    folder: Path
    inputs: Mapping[str, Result]
    console: Console

    @property
    def base_folder(self) -> Path:
        """The checkpoint that is cut: the teacher's, or the one of base.path."""
        return self.inputs[base_stage(self.settings)].model_folder

    def goes_on(self, place: str) -> None:
        """Say from where an interrupted run's work is taken up."""
        self.console.headline(self.folder.parent.name, f"goes on from {place}")


@dataclass(frozen=True, slots=True)
class Lap:
    """One walk through the stages: its settings and what it has by now. A result of a stage that is done once for each candidate is named "stage ID"."""

    settings: Settings
    results: dict[str, Result]
    cached: dict[str, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class PerCandidate:
    """For a stage that is done once for each candidate: with `settings.candidate` set, and its result named "stage ID".

    `wanted` gives the candidates to do it for, `also` those whose results count too where they are there. `on_found` hears of a candidate
    that was asked for by itself and is done already.
    """

    wanted: Callable[[Lap], Sequence[str]]
    also: Callable[[Lap], Sequence[str]]
    on_found: Callable[[Lap, Result], None]


def _never(_settings: Settings) -> bool:
    return False


def _nothing(_settings: Settings) -> None:
    """There is nothing to check."""


def identities(_settings: Settings, inputs: Mapping[str, Result]) -> dict[str, Any]:
    """All that the inputs are."""
    return {label: result.identity for label, result in inputs.items()}


def _any_rows(_settings: Settings, _rows: int, _told: str) -> None:
    """The stage takes as many rows as there are."""


def _silent(_settings: Settings, _console: Console) -> None:
    """Nothing is said before other stages work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredStage:
    """A stage whose result is kept in the store.

    `version` rises when results change for the same settings; `needs` names the stages whose results are its inputs; `what` gives, as plain values,
    the settings that its results follow from; `check` refuses what can be refused before any work (ValueError); `run` works in the context's folder and
    returns plain facts, "headline" and, where it leaves a model, "path" among them. Only `run` may import what brings torch. `check_rows` refuses, as soon as
    it is known how many train rows of the data there are, or at most ("only" or "at most" is said of the number), what needs more of them.

    `of_inputs` gives, as plain values, what of the inputs the results follow from: as a rule all that they are. Who takes less shares its results between
    runs whose inputs differ in the rest, so nothing of the rest may be in them, not in the headline either. A checkpoint that was handed over says in its
    facts, as "identity", what its contents are; anything else is known by its key.

    A `parallel` stage runs in every process of `accelerate launch`; the others run in the first while the rest wait. `ends_all` says whether stage=all
    includes it for its own sake, `ends_first_lap` whether it, asked for by name, is the first of two laps' last one, `in_one_lap` whether the walk to it has
    one lap under these settings, whatever depth_lap says.
    """

    version: int
    needs: Callable[[Settings], tuple[str, ...]]
    what: Callable[[Settings], Any]
    run: Callable[[StageContext], dict]
    check: Callable[[Settings], None] = _nothing
    check_rows: Callable[[Settings, int, str], None] = _any_rows
    of_inputs: Callable[[Settings, Mapping[str, Result]], Mapping[str, Any]] = identities
    parallel: bool = False
    per_candidate: PerCandidate | None = None
    ends_all: Callable[[Settings], bool] = _never
    ends_first_lap: bool = False
    in_one_lap: Callable[[Settings], bool] = _never


@dataclass(frozen=True, slots=True, kw_only=True)
class UsingStage:
    """A stage that uses what is done: it has no other stage run and keeps nothing in the store. Of the laps that it is given the last is the run's; one that
    `looks_ahead` is given none, and needs no runs folder. `before`, in every process, says and refuses what it can before any stored stage works."""

    run: Callable[[Settings, Sequence[Lap], Console], None]
    check: Callable[[Settings], None] = _nothing
    looks_ahead: bool = False
    before: Callable[[Settings, Console], None] = _silent
