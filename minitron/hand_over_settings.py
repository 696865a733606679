"""Settings of the two stages that make a model folder out of finished ones: merge and export."""

import math
from dataclasses import dataclass, field
from enum import Enum

from minitron.setting_rules import how

MERGEABLE = ("teacher", "base", "prune", "distill")  # stages whose checkpoint merge.checkpoints may name
SUM_TOLERANCE = 1e-6


class StudentState(Enum):
    student = "student"
    newest = "newest"
    best = "best"


@dataclass(kw_only=True, slots=True)
class MergeSettings:
    checkpoints: list[str] = field(default_factory=list)
    weights: list[float] | None = None

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        if len(self.weights) != len(self.checkpoints):
            raise ValueError(f"merge.weights has {len(self.weights)} numbers for {len(self.checkpoints)} merge.checkpoints; it must have one for each")
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"merge.weights is {list(self.weights)}; every weight must be a finite number")
        if abs(math.fsum(self.weights) - 1) > SUM_TOLERANCE:
            raise ValueError(f"merge.weights sum to {math.fsum(self.weights):g}; they must sum to 1 (null gives equal weights)")

    def shares(self) -> list[float]:
        """The weight of every checkpoint; equal ones where none are given."""
        return [1 / len(self.checkpoints)] * len(self.checkpoints) if self.weights is None else list(self.weights)

    def stages(self) -> tuple[str, ...]:
        """The stages that are named among the checkpoints."""
        return tuple(name for name in MERGEABLE if name in self.checkpoints)


@dataclass(kw_only=True, slots=True)
class ExportSettings:
    folder: str | None = how(None)
    state: StudentState = StudentState.student
    overwrite: bool = how(False)
    push: str | None = how(None)
