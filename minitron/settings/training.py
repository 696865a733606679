"""The settings of everything that trains: a loop, its rows, and distillation's phases and loss. What each means stands in conf/run.yaml."""

from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from minitron.settings.rules import Choice, added, at_least, check_share, how


class Rows(Choice):
    windows = "windows"
    documents = "documents"
    packed = "packed"


class Form(Choice):
    """What a record of a source is: minitron.sources.forms."""

    auto = "auto"
    text = "text"
    messages = "messages"
    sharegpt = "sharegpt"
    prompt_answer = "prompt_answer"
    alpaca = "alpaca"
    preference = "preference"


class Optimizer(Choice):
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    muon = "muon"


class Schedule(Choice):
    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"


class Precision(Choice):
    float32 = "float32"
    bf16 = "bf16"


class Router(Choice):
    """Whether the routers of a mixture of experts learn."""

    trained = "trained"
    frozen = "frozen"


class Balance(Choice):
    """What keeps a mixture's experts evenly busy: nothing, or their routers' correction biases, moved against the load (arXiv 2408.15664)."""

    none = "none"
    bias = "bias"


class Divergence(Choice):
    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"


@dataclass(kw_only=True, slots=True)
class TrainSettings:
    """One training loop: shared by the tiny teacher's own training and by distillation."""

    tokens: int = 65536
    batch: int = 8
    optimizer: Optimizer = Optimizer.adamw
    learning_rate: float = 1e-3
    final_learning_rate_share: float = 0.1
    warmup_share: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    schedule: Schedule = Schedule.cosine
    decay_share: float = 0.2
    precision: Precision = Precision.float32
    skip_not_finite: int = 0
    router: Router = added(Router.trained)
    balance: Balance = added(Balance.none)
    balance_rate: float = added(0.001)
    micro_batch: int | None = how(None)
    gradient_checkpointing: Any = how(False)  # true, false, host or auto, which no Enum takes together
    checkpoint_every: int = how(1)
    save_every_seconds: float = how(60.0)
    save_every_steps: int | None = how(None)
    keep_states: int = how(1)

    def check(self, name: str) -> None:
        """Refuse values out of range; `name` is where these settings stand, e.g. distill.train."""
        at_least(self, name, 1, "tokens", "batch", "micro_batch", "checkpoint_every", "save_every_steps", "keep_states")
        if self.gradient_checkpointing not in (True, False, "host", "auto"):
            raise ValueError(f"{name}.gradient_checkpointing is {self.gradient_checkpointing!r}; it must be true, false, host or auto")
        at_least(self, name, 0, "skip_not_finite")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"{name}.decay_share is {self.decay_share}; it must be above 0 and at most 1")
        at_least(self, name, 0, "learning_rate", "final_learning_rate_share", "warmup_share", "weight_decay", "save_every_seconds")
        if self.balance_rate <= 0:
            raise ValueError(f"{name}.balance_rate is {self.balance_rate}; it must be above 0")
        if self.clip_norm <= 0:
            raise ValueError(f"{name}.clip_norm is {self.clip_norm}; it must be above 0")


@dataclass(kw_only=True, slots=True)
class SourceSettings:
    """One source of a blend: the settings of the same names under data, and its share of the rows, in any unit."""

    weight: float = 1.0
    files: list[str] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset_split: str = "train"
    text_field: str = "text"
    messages_field: str | None = None
    form: Form = Form.auto
    prompt_field: str | None = None
    answer_field: str | None = None
    system_field: str | None = None
    answers_only: bool | None = None  # None: as in data
    cut_kib: int | None = None
    truncated_share: float = 0.0


@dataclass(kw_only=True, slots=True)
class PhaseSettings:
    """One phase of distillation; what is None is that of distill.train or data."""

    tokens: int = 0
    sequence_length: int | None = None
    rows: Rows | None = None
    truncated_share: float | None = None
    batch: int | None = None
    learning_rate: float | None = None
    final_learning_rate_share: float | None = None
    warmup_share: float | None = None
    schedule: Schedule | None = None
    decay_share: float | None = None
    micro_batch: int | None = how(None)
    blend: list[SourceSettings] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class LossSettings:
    """What a student is trained for: distill.chunked_loss.LossRecipe."""

    divergence: Divergence = Divergence.forward_kl
    beta: float = 0.5
    cross_entropy_weight: float = 0.0
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"distill.loss.beta is {self.beta}; it must be above 0 (forward_kl's) and below 1 (reverse_kl's)")
        check_share("distill.loss.cross_entropy_weight", self.cross_entropy_weight)
        at_least(self, "distill.loss", 0, "hidden_weight")


@dataclass(kw_only=True, slots=True)
class DistillSettings:
    temperature: float = 1.0
    cached: bool = False
    loss: LossSettings = field(default_factory=LossSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    phases: list[PhaseSettings] = field(default_factory=list)
    max_positions: int | None = how(None)
    max_hours: float | None = how(48.0)
    held_out_every: int | None = how(None)
    held_out_samples: int = how(32)

    def __post_init__(self) -> None:
        self.train.check("distill.train")
        at_least(self, "distill", 1, "max_positions", "held_out_every", "held_out_samples")
        at_least(self, "distill", 0, "max_hours")
        for number, phase in enumerate(self.phases):
            name = f"distill.phases[{number}]"
            at_least(phase, name, 2, "sequence_length")
            if phase.truncated_share is not None:
                check_share(f"{name}.truncated_share", phase.truncated_share)
                if phase.blend:
                    raise ValueError(f"{name}.truncated_share is {phase.truncated_share} and blend is given; with a blend each source has its own")
            for source in phase.blend:
                if not source.weight > 0:
                    raise ValueError(f"{name}.blend has a source of weight {source.weight}; it must be above 0")
                check_share(f"{name}.blend truncated_share", source.truncated_share)
                if bool(source.files) == bool(source.dataset):
                    raise ValueError(f"{name}.blend has a source with files {source.files} and dataset {source.dataset}; exactly one of them must be given")
        for number, train in enumerate(self.trains() if self.phases else []):
            train.check(f"distill.phases[{number}]")
        if self.temperature <= 0:
            raise ValueError(f"distill.temperature is {self.temperature}; it must be above 0")
        if self.cached:
            self._check_cached()

    def _check_cached(self) -> None:
        """Refuse what the teacher's likeliest tokens at temperature 1 on the data stage's rows do not serve."""
        wanted = {"temperature": 1.0, "loss.divergence": Divergence.forward_kl, "loss.hidden_weight": 0.0, "phases": [], "held_out_every": None}
        given = {"temperature": self.temperature, "loss.divergence": self.loss.divergence, "loss.hidden_weight": self.loss.hidden_weight, "phases": self.phases,
                 "held_out_every": self.held_out_every}  # fmt: skip
        for name, value in wanted.items():
            if given[name] != value:
                shown, must = (item.value if isinstance(item, Enum) else "null" if item is None else item for item in (given[name], value))
                shown = "given" if name == "phases" else shown
                raise ValueError(f"distill.{name} is {shown}, but distill.cached is true: the teacher cache serves only {name} {must}")

    def trains(self) -> list[TrainSettings]:
        """The training settings of every phase; without phases those of the one there is."""
        names = [f.name for f in fields(PhaseSettings) if f.name not in ("sequence_length", "rows", "truncated_share", "blend")]
        given = [{name: getattr(phase, name) for name in names if getattr(phase, name) is not None} for phase in self.phases]
        return [replace(self.train, **values) for values in given] or [self.train]
