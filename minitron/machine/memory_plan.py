"""What a stage will hold at once in one process, by what it is for: counted before anything is loaded, printed, and refused where it cannot fit."""

from collections.abc import Mapping
from dataclasses import dataclass

from memory_budget.units import format_gib


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by part, of the stage's moment that needs most; `advice` says what would make it less."""

    stage: str
    parts: Mapping[str, int]
    advice: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def describe(self) -> str:
        """One line for the terminal."""
        parts = ", ".join(f"{name} {format_gib(num_bytes)}" for name, num_bytes in self.parts.items() if num_bytes)
        return f"each process will hold about {format_gib(self.total)}: {parts}"

    def check(self, available_bytes: int, place: str) -> None:
        """Raises ValueError where a process has less than the plan wants."""
        if self.total > available_bytes:
            raise ValueError(f"{self.stage}: {self.describe()}; {place} has {format_gib(available_bytes)}. {self.advice}")
