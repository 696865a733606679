"""Settings of the evaluation, a group for everything that is measured."""

from dataclasses import dataclass, field

from minitron.settings.rules import at_least, how


@dataclass(kw_only=True, slots=True)
class SpeedSettings:
    """Lengths that speed and memory are measured at."""

    input_tokens: int = 32
    output_tokens: int = 64
    batch: int = 1

    @property
    def positions(self) -> int:
        """Tokens of the whole sequence."""
        return self.input_tokens + self.output_tokens


@dataclass(kw_only=True, slots=True)
class NeedleSettings:
    """The long-context probe; see minitron.measures.needle."""

    lengths: list[int] = field(default_factory=lambda: [128, 256, 512])
    depths: int = 3
    samples: int = 5
    alternatives: int = 8
    needles: int = 1

    def __post_init__(self) -> None:
        at_least(self, "evaluate.needle", 1, "depths", "samples", "needles")
        at_least(self, "evaluate.needle", 2, "alternatives")
        if self.needles > self.alternatives:
            raise ValueError(f"evaluate.needle.needles is {self.needles}; it must be at most evaluate.needle.alternatives, {self.alternatives}")


@dataclass(kw_only=True, slots=True)
class EvaluateSettings:
    samples: int = 128
    batch: int = how(8)
    speed: list[SpeedSettings] = field(default_factory=list)
    needle: NeedleSettings = field(default_factory=NeedleSettings)
    prompts: list[str] = field(default_factory=list)
    held_out_prompts: int = 0
    new_tokens: int = 48
    tasks: list[str] = field(default_factory=list)
    task_folders: list[str] = field(default_factory=list)
    task_limit: int | None = None

    def __post_init__(self) -> None:
        at_least(self, "evaluate", 1, "samples", "batch", "new_tokens", "task_limit")
        at_least(self, "evaluate", 0, "held_out_prompts")
        for number, lengths in enumerate(self.speed):
            at_least(lengths, f"evaluate.speed[{number}]", 1, "input_tokens", "output_tokens", "batch")
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("evaluate.prompts has one without text; each must say something to go on with")
        for name in ("prompts", "tasks", "task_folders"):
            twice = sorted({value for value in getattr(self, name) if getattr(self, name).count(value) > 1})
            if twice:
                raise ValueError(f"evaluate.{name} names {twice[0]!r} twice; each must be named once")

    def check_positions(self, positions: int) -> None:
        """Refuse sequences longer than the teacher's context, in tokens. Raises ValueError."""
        for number, lengths in enumerate(self.speed):
            if lengths.positions > positions:
                raise ValueError(f"evaluate.speed[{number}] has {lengths.input_tokens:,} input and {lengths.output_tokens:,} output tokens; "
                                 f"together they must be at most {positions:,}, the teacher's max_position_embeddings")  # fmt: skip
        for length in self.needle.lengths:
            if not 1 <= length <= positions:
                raise ValueError(f"evaluate.needle.lengths has {length:,}; it must be at least 1 and at most {positions:,}, "
                                 "the teacher's max_position_embeddings")  # fmt: skip
