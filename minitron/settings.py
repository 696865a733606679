"""Every setting, typed and checked. What each means stands beside its default in conf/.

A setting is *what* (it changes results and is part of a stage's key) or *how* (devices, logging, shard
sizes), marked by `how()`. The checks run when the settings are built, before any work.
"""

from dataclasses import dataclass, field, fields, replace
from enum import Enum

from minitron.search_settings import SearchSettings, ThroughputSettings
from minitron.setting_rules import at_least, check_kinds, check_share, how


class Stage(Enum):
    data = "data"
    teacher = "teacher"
    score = "score"
    shortlist = "shortlist"
    teacher_cache = "teacher_cache"
    screen = "screen"
    search = "search"
    prune = "prune"
    phase_rows = "phase_rows"
    distill = "distill"
    evaluate = "evaluate"
    report = "report"
    all = "all"


class Rows(Enum):
    windows = "windows"
    documents = "documents"


class Optimizer(Enum):
    adamw = "adamw"
    muon = "muon"


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"


class Precision(Enum):
    float32 = "float32"
    bf16 = "bf16"


class Divergence(Enum):
    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"


class Criterion(Enum):
    iterative_mse = "iterative_mse"
    iterative_kl = "iterative_kl"
    mse = "mse"
    kl = "kl"
    loss = "loss"
    block_influence = "block_influence"


class Placement(Enum):
    device = "device"
    stream = "stream"


class PruneMethod(Enum):
    slice = "slice"
    compensated = "compensated"


class Tracking(Enum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


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
    micro_batch: int | None = how(None)
    gradient_checkpointing: bool = how(False)
    save_every_seconds: float = how(60.0)
    save_every_steps: int | None = how(None)
    keep_states: int = how(1)

    def check(self, name: str) -> None:
        """Refuse values out of range; `name` is where these settings stand, e.g. distill.train."""
        at_least(self, name, 1, "tokens", "batch", "micro_batch", "save_every_steps", "keep_states")
        at_least(self, name, 0, "skip_not_finite")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"{name}.decay_share is {self.decay_share}; it must be above 0 and at most 1")
        at_least(self, name, 0, "learning_rate", "final_learning_rate_share", "warmup_share", "weight_decay", "save_every_seconds")
        if self.clip_norm <= 0:
            raise ValueError(f"{name}.clip_norm is {self.clip_norm}; it must be above 0")


@dataclass(kw_only=True, slots=True)
class TinyTeacherSettings:
    pattern: str = ""
    hidden: int = 0
    ffn: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    attention_head_dim: int = 0
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_num_groups: int = 0
    mamba_state_size: int = 0
    mamba_conv_kernel: int = 4


@dataclass(kw_only=True, slots=True)
class TeacherSettings:
    path: str | None = None
    revision: str | None = None
    config: str | None = None
    tiny: TinyTeacherSettings = field(default_factory=TinyTeacherSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        self.train.check("teacher.train")


@dataclass(kw_only=True, slots=True)
class DataSettings:
    files: list[str] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset_split: str = "train"
    text_field: str = "text"
    messages_field: str | None = None
    truncated_share: float = 0.0
    max_documents: int | None = None
    rows: Rows = Rows.windows
    sequence_length: int = 256
    vocab: int = 2048
    max_train_tokens: int | None = None
    max_heldout_tokens: int | None = None

    def __post_init__(self) -> None:
        at_least(self, "data", 2, "sequence_length")
        at_least(self, "data", 300, "vocab")  # 256 bytes and the special tokens come first
        at_least(self, "data", 1, "max_documents")
        at_least(self, "data", self.sequence_length, "max_train_tokens", "max_heldout_tokens")  # of one row
        check_share("data.truncated_share", self.truncated_share)
        if self.files and self.dataset:
            raise ValueError(f"data.files and data.dataset ({self.dataset!r}) are both given; one of them must be null")
        for name in ("dataset_config", "dataset_revision"):
            if getattr(self, name) is not None and not self.dataset:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}, but data.dataset is not given; both must be, or neither")


@dataclass(kw_only=True, slots=True)
class ScoringSettings:
    samples: int = 64
    batch: int = how(4)
    layer_samples: int = 32
    criterion: Criterion = Criterion.iterative_mse
    normalised: bool = True
    protect: list[int] = field(default_factory=list)
    ceilings: dict[str, int | None] = field(default_factory=dict)
    placement: Placement = how(Placement.device)
    block_tokens: int = how(65536)
    branch_rows: int = how(64)
    logits_tokens: int = how(256)
    reuse_gib: float = how(1.0)

    def __post_init__(self) -> None:
        at_least(self, "scoring", 1, "samples", "batch", "layer_samples", "block_tokens", "branch_rows", "logits_tokens")
        at_least(self, "scoring", 0, "reuse_gib")
        check_kinds("scoring.ceilings", self.ceilings)


@dataclass(kw_only=True, slots=True)
class WorkloadSettings:
    context_tokens: int = 131072
    batch: int = 1
    weights_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    ssm_dtype: str = "float32"
    activation_tokens: int = 0


@dataclass(kw_only=True, slots=True)
class BudgetSettings:
    name: str = "a10g"
    device_gib: float | None = None
    cushion_fraction: float = 0.05
    set_aside_gib: float = 0.0


@dataclass(kw_only=True, slots=True)
class ScreenSettings:
    """The short distillation that every finalist gets, from one shared cache of teacher outputs or beside the teacher itself."""

    cached: bool = True
    top_k: int = 128
    cache_batch: int = how(8)
    new_tokens: int = 32
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        at_least(self, "screen", 1, "top_k", "cache_batch", "new_tokens")
        self.train.check("screen.train")


@dataclass(kw_only=True, slots=True)
class BaseSettings:
    path: str | None = None


@dataclass(kw_only=True, slots=True)
class DepthLapSettings:
    """The first of two laps: depth alone is cut and distilled, then widths are cut from that checkpoint."""

    enabled: bool = False
    tokens: int = 65536
    screen_tokens: int = 65536

    def __post_init__(self) -> None:
        at_least(self, "depth_lap", 1, "tokens", "screen_tokens")


@dataclass(kw_only=True, slots=True)
class PruneSettings:
    """The cut; what stands between method and max_shard_gib is of the compensated one."""

    method: PruneMethod = PruneMethod.slice
    samples: int = 64
    rotate: bool = True
    refit_reading: bool = True
    refit_writing: bool = True
    ridge: float = 1e-3
    batch: int = how(8)
    max_shard_gib: float = how(4.5)

    def __post_init__(self) -> None:
        at_least(self, "prune", 1, "samples", "batch")
        at_least(self, "prune", 0, "ridge")
        if self.max_shard_gib <= 0:
            raise ValueError(f"prune.max_shard_gib is {self.max_shard_gib}; it must be above 0")


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
    truncated_share: float = 0.0


@dataclass(kw_only=True, slots=True)
class PhaseSettings:
    """One phase of distillation; what is None is that of distill.train or data."""

    tokens: int = 0
    sequence_length: int | None = None
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

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"distill.loss.beta is {self.beta}; it must be above 0 (forward_kl's) and below 1 (reverse_kl's)")
        check_share("distill.loss.cross_entropy_weight", self.cross_entropy_weight)


@dataclass(kw_only=True, slots=True)
class DistillSettings:
    temperature: float = 1.0
    loss: LossSettings = field(default_factory=LossSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    phases: list[PhaseSettings] = field(default_factory=list)
    max_positions: int | None = how(None)
    held_out_every: int | None = how(None)
    held_out_samples: int = how(32)

    def __post_init__(self) -> None:
        self.train.check("distill.train")
        at_least(self, "distill", 1, "max_positions", "held_out_every", "held_out_samples")
        for number, phase in enumerate(self.phases):
            name = f"distill.phases[{number}]"
            at_least(phase, name, 2, "sequence_length")
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

    def trains(self) -> list[TrainSettings]:
        """The training settings of every phase; without phases those of the one there is."""
        names = [f.name for f in fields(PhaseSettings) if f.name not in ("sequence_length", "blend")]
        given = [{name: getattr(phase, name) for name in names if getattr(phase, name) is not None} for phase in self.phases]
        return [replace(self.train, **values) for values in given] or [self.train]


@dataclass(kw_only=True, slots=True)
class EvaluateSettings:
    samples: int = 256
    batch: int = how(8)
    prompt_tokens: int = 32
    new_tokens: int = 64

    def __post_init__(self) -> None:
        at_least(self, "evaluate", 1, "samples", "batch", "prompt_tokens", "new_tokens")


@dataclass(kw_only=True, slots=True)
class Settings:
    stage: Stage = Stage.all
    candidate: str | None = None
    run_name: str = "tiny"
    runs_folder: str = "runs"
    seed: int = 0
    device: str = how("auto")
    tracking: Tracking = how(Tracking.disabled)
    data: DataSettings = field(default_factory=DataSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    base: BaseSettings = field(default_factory=BaseSettings)
    depth_lap: DepthLapSettings = field(default_factory=DepthLapSettings)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    workload: WorkloadSettings = field(default_factory=WorkloadSettings)
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    screen: ScreenSettings = field(default_factory=ScreenSettings)
    throughput: ThroughputSettings = field(default_factory=ThroughputSettings)
    prune: PruneSettings = field(default_factory=PruneSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)

    def __post_init__(self) -> None:
        if not self.run_name or "/" in self.run_name or self.run_name.startswith(".") or self.run_name == "store":
            raise ValueError(f"run_name is {self.run_name!r}; it must be one folder name, not starting with a dot, and not 'store'")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be auto, cpu or cuda")
