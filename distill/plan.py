"""What a training run is told, and what it tells after every step."""

from dataclasses import dataclass, field

from distill.batches import BlendBatches, RowBatches


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """How one phase of training goes. Tokens are rounded down to whole steps of the batches' size.

    Parameters whose names end in `frozen` stay as they are: no gradient, no state of an optimiser; all phases have the same. `balance_rate`: how far a step at
    the peak of the learning rate moves the biases that keep experts evenly busy (engines.loads); None leaves them.
    `micro_batch` is the rows a process computes at once, None all of its share. `gradient_checkpointing` is False, True (of every
    `checkpoint_every`-th layer only the input is kept for the backward pass) or "host" (that input is in the host's memory). Everything
    from micro_batch on changes no result but for rounding.
    """

    tokens: int
    optimizer: str
    learning_rate: float
    final_learning_rate_share: float
    warmup_share: float
    weight_decay: float
    clip_norm: float
    schedule: str = "cosine"
    decay_share: float = 0.2
    precision: str = "float32"
    skip_not_finite: int = 0
    frozen: str | None = None
    balance_rate: float | None = None
    micro_batch: int | None = None
    gradient_checkpointing: bool | str = False
    checkpoint_every: int = 1
    save_every_seconds: float = 60.0
    save_every_steps: int | None = None
    keep_states: int = 1


# Of TrainPlan: what a saved state may differ in from the run that goes on with it.
HOW = ("micro_batch", "gradient_checkpointing", "checkpoint_every", "save_every_seconds", "save_every_steps", "keep_states")


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of a run: its rows, with their batch and length, and its plan. Each begins with a fresh optimiser."""

    batches: RowBatches | BlendBatches
    plan: TrainPlan

    @property
    def num_steps(self) -> int:
        """Whole steps in the plan's tokens. Raises ValueError where there is none."""
        steps = self.plan.tokens // self.batches.tokens_per_step
        if steps < 1:
            raise ValueError(f"train.tokens is {self.plan.tokens}; it must be at least one batch, {self.batches.tokens_per_step} tokens")
        return steps


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did. loss in nats per token, recent_loss its running mean over about the last 20 steps; seconds since
    the run began, earlier sittings included; tokens so far, where rows are padded those of batches of the mean size.

    `watched` holds what else the loss function measured, and on some steps the held-out loss; `memory_gib` is the most
    that the first process has held so far, on its GPU where it has one.
    """

    step: int
    total_steps: int
    tokens: int
    loss: float
    recent_loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    phase: int = 0
    tokens_per_second: float = 0.0
    seconds_left: float = 0.0
    memory_gib: float = 0.0
    watched: dict[str, float] = field(default_factory=dict)
