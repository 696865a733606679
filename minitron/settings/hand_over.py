"""Settings of the two stages that make a model folder out of finished ones, merge and export, and of the cards beside weights."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from minitron.settings.hub import HUB_ID
from minitron.settings.rules import Choice, at_least, how

MERGEABLE = ("teacher", "base", "prune", "distill")  # stages whose checkpoint merge.checkpoints may name
SUM_TOLERANCE = 1e-6


class StudentState(Choice):
    student = "student"
    newest = "newest"
    best = "best"


@dataclass(kw_only=True, slots=True)
class MergeSettings:
    checkpoints: list[str] = field(default_factory=list)
    weights: list[float] | None = None
    sweep: list[Any] = field(default_factory=list)  # of lists of numbers, of which OmegaConf would refuse whole ones
    steps: int | None = None
    samples: int = 128
    batch: int = how(8)

    def __post_init__(self) -> None:
        if sum((self.weights is not None, bool(self.sweep), self.steps is not None)) > 1:
            raise ValueError("merge takes one of merge.weights, merge.sweep and merge.steps; more than one is given")
        if self.weights is not None:
            self._check("merge.weights", self.weights)
        for number, weights in enumerate(self.sweep):
            if not isinstance(weights, list) or not all(isinstance(weight, int | float) for weight in weights):
                raise ValueError(f"merge.sweep[{number}] is {weights}; it must be a list of weights, one for each of merge.checkpoints")
            self._check(f"merge.sweep[{number}]", weights)
        if self.steps is not None and (self.steps < 1 or len(self.checkpoints) != 2):
            raise ValueError(f"merge.steps is {self.steps} for {len(self.checkpoints)} merge.checkpoints; it must be at least 1, between two of them")
        at_least(self, "merge", 1, "samples", "batch")

    def _check(self, name: str, weights: list[float]) -> None:
        if len(weights) != len(self.checkpoints):
            raise ValueError(f"{name} has {len(weights)} numbers for {len(self.checkpoints)} merge.checkpoints; it must have one for each")
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"{name} is {list(weights)}; every weight must be a finite number")
        if abs(math.fsum(weights) - 1) > SUM_TOLERANCE:
            raise ValueError(f"{name} sum to {math.fsum(weights):g}; they must sum to 1")

    def shares(self) -> list[float]:
        """The weight of every checkpoint where there is nothing to choose; equal ones where none are given."""
        return [1 / len(self.checkpoints)] * len(self.checkpoints) if self.weights is None else list(self.weights)

    def candidates(self) -> list[list[float]]:
        """The weights to choose from by evaluation, none where they are given."""
        if self.steps is not None:
            return [[1 - step / self.steps, step / self.steps] for step in range(self.steps + 1)]
        return [[float(weight) for weight in weights] for weights in self.sweep]

    def stages(self) -> tuple[str, ...]:
        """The stages that are named among the checkpoints."""
        return tuple(name for name in MERGEABLE if name in self.checkpoints)


@dataclass(kw_only=True, slots=True)
class ExportSettings:
    folder: str | None = how(None)
    state: StudentState = StudentState.student
    overwrite: bool = how(False)
    push: str | None = how(None)


@dataclass(kw_only=True, slots=True)
class CardSettings:
    base_model: str | None = how(None)
    licence: str | None = how(None)

    def __post_init__(self) -> None:
        if self.base_model is not None and not HUB_ID.match(self.base_model):
            raise ValueError(f"card.base_model is {self.base_model!r}; it must be a Hub id of the form owner/name")
        if self.licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.licence):
            raise ValueError(f"card.licence is {self.licence!r}; it must be an id as the Hub has them, in lower case: apache-2.0, mit, llama3.1, other")
