"""Settings of the problems that teach reasoning, and of how well a student answers them. What each means stands in conf/run.yaml."""

from dataclasses import dataclass, field

from minitron.settings.rules import at_least


@dataclass(kw_only=True, slots=True)
class ArithmeticSettings:
    """Problems in place of text: minitron.sources.arithmetic."""

    problems: int = 0
    most_operands: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, "data.arithmetic", 0, "problems", "seed")
        if self.most_operands < 2:
            raise ValueError(f"data.arithmetic.most_operands is {self.most_operands}; it must be at least 2")


@dataclass(kw_only=True, slots=True)
class ReasoningSettings:
    """Accuracy against the thinking budget, of teacher, student, and a student that learned from whole traces alone."""

    enabled: bool = False
    problems: int = 512
    batch: int = field(default=256, metadata={"how": True})
    budgets: list[int] = field(default_factory=lambda: [0, 1, 2, 4, 8, 16, 32])

    def __post_init__(self) -> None:
        at_least(self, "reasoning", 1, "problems", "batch")
        if not self.budgets or any(budget < 0 for budget in self.budgets) or sorted(set(self.budgets)) != list(self.budgets):
            raise ValueError(f"reasoning.budgets is {list(self.budgets)}; it must be numbers of tokens, at least 0 and each above the one before")
