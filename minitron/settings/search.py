"""Settings of the search: the space, its filters, the shortlist, the choice, and the throughput model."""

from dataclasses import dataclass, field, fields
from typing import Any

from minitron.settings.rules import Choice, added, at_least, check_kinds, how
from nas.axes import AXES


class Shortlist(Choice):
    diversified = "diversified"
    largest = "largest"


class Select(Choice):
    lowest_loss = "lowest_loss"
    loss_within = "loss_within"
    weighted = "weighted"


class Aggregation(Choice):
    mean = "mean"
    l2 = "l2"


class RankExperts(Choice):
    reap = "reap"
    activation = "activation"
    frequency = "frequency"


@dataclass(kw_only=True, slots=True)
class AxisSettings:
    """Options of one axis; low and high up to 1 are shares of the teacher's value, a null step is the axis's own."""

    values: list[int] | None = None
    low: float | None = None
    high: float | None = None
    step: int | None = None


@dataclass(kw_only=True, slots=True)
class FixedSettings:
    """An architecture the user already knows, by the architecture's fields or by the names of the axes; None keeps the teacher's value, all None means
    none is given. Raises ValueError for a size given by both names."""

    file: str | None = None
    pattern: str | None = None
    hidden: int | None = None
    ffn: int | None = None
    mamba_num_heads: int | None = None
    mamba_head_dim: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = added(None)
    num_layers: int | None = added(None)
    layers: int | None = added(None)
    mamba_heads: int | None = added(None)
    mamba_channels: int | None = added(None)
    attention_heads: int | None = added(None)
    key_value_heads: int | None = added(None)
    experts: int | None = added(None)
    expert_ffn: int | None = added(None)
    shared_ffn: int | None = added(None)
    moe_num_experts: int | None = added(None)
    moe_ffn: int | None = added(None)
    moe_shared_ffn: int | None = added(None)

    def __post_init__(self) -> None:
        for axis in AXES.values():
            value = getattr(self, axis.name)
            if axis.name == axis.field or value is None:
                continue
            if getattr(self, axis.field) is not None:
                raise ValueError(f"search.fixed has {axis.name} ({value}) and {axis.field} ({getattr(self, axis.field)}), two names of one size; give one")
            setattr(self, axis.field, value)  # so that a key is the same for both names
            setattr(self, axis.name, None)
        if self.pattern is not None and self.num_layers is not None:
            raise ValueError(f"search.fixed has a pattern and layers ({self.num_layers}); the pattern says how many, give one")

    def given(self) -> dict[str, int | str]:
        """The values that are set, by the architecture's fields."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


@dataclass(kw_only=True, slots=True)
class LaterWidthsSettings:
    """Widths that a later cut will reach, against which the budget is held; None: the candidate's own."""

    hidden: int | None = None
    ffn: int | None = None
    mamba_num_heads: int | None = None
    num_attention_heads: int | None = added(None)
    num_key_value_heads: int | None = added(None)
    moe_num_experts: int | None = added(None)
    moe_ffn: int | None = added(None)
    moe_shared_ffn: int | None = added(None)

    def given(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


CHOOSING = ("finalists", "select", "noise", "loss_within", "weights")  # of SearchSettings, those that the shortlist does not know


@dataclass(kw_only=True, slots=True)
class SearchSettings:
    layers: AxisSettings = field(default_factory=AxisSettings)
    hidden: AxisSettings = field(default_factory=AxisSettings)
    ffn: AxisSettings = field(default_factory=AxisSettings)
    mamba_heads: AxisSettings = field(default_factory=AxisSettings)
    mamba_channels: AxisSettings = field(default_factory=AxisSettings)
    attention_heads: AxisSettings = field(default_factory=AxisSettings)
    key_value_heads: AxisSettings = added(default_factory=AxisSettings)
    experts: AxisSettings = added(default_factory=AxisSettings)
    expert_ffn: AxisSettings = added(default_factory=AxisSettings)
    shared_ffn: AxisSettings = added(default_factory=AxisSettings)
    floors: dict[str, int] = field(default_factory=dict)
    layer_order: str | None = None
    fixed: FixedSettings = field(default_factory=FixedSettings)
    later_widths: LaterWidthsSettings = field(default_factory=LaterWidthsSettings)
    max_parameters: int | None = None
    max_active_parameters: int | None = added(None)
    min_gib: float | None = None
    max_gib: float | None = None
    min_tokens_per_second: float | None = None
    aggregate_tokens: Aggregation = Aggregation.mean
    aggregate_samples: Aggregation = Aggregation.l2
    rank_experts: RankExperts = added(RankExperts.reap)
    protect_experts: dict[Any, list[int]] = added(default_factory=dict)  # layers are numbers in YAML, and text on the command line; text from here on
    shortlist: Shortlist = Shortlist.diversified
    shortlist_size: int = 8
    screen_samples: int = 16
    finalists: int = 4
    select: Select = Select.lowest_loss
    noise: float = 0.005
    loss_within: float = 0.02
    weights: dict[str, float] = field(default_factory=dict)
    listed: int = how(100_000)
    even_if_it_fits: bool = how(False)

    def __post_init__(self) -> None:
        at_least(self, "search", 1, "shortlist_size", "screen_samples", "max_parameters", "max_active_parameters", "listed")
        at_least(self, "search", 0, "finalists", "noise", "loss_within", "min_gib", "max_gib", "min_tokens_per_second")
        check_kinds("search.floors", self.floors)
        if not self.floors.get("moe"):
            self.floors.pop("moe", None)  # it came later than keys that are in use
        self.protect_experts = {str(layer): list(experts) for layer, experts in self.protect_experts.items()}
        for layer, experts in self.protect_experts.items():
            if not layer.isdecimal() or not experts or min(experts) < 0 or len(set(experts)) < len(experts):
                raise ValueError(f"search.protect_experts has {layer}: {experts}; it must name layers and the experts of each, every one once, all from 0")
        for name, weight in self.weights.items():
            if name not in ("loss", "memory", "throughput"):
                raise ValueError(f"search.weights names {name!r}; it must be loss, memory or throughput")
            if not weight >= 0:
                raise ValueError(f"search.weights.{name} is {weight}; it must be at least 0")


@dataclass(kw_only=True, slots=True)
class ThroughputSettings:
    """A roofline: what the named device could reach at best; without a name it is the budget's, where that is a preset."""

    device: str | None = None
    gb_per_second: float | None = None
    tflops: float | None = None
    input_tokens: int = 8192
    output_tokens: int = 16384
    batch: int | None = None

    def __post_init__(self) -> None:
        at_least(self, "throughput", 1, "input_tokens", "output_tokens", "batch")
        if (self.gb_per_second is None) != (self.tflops is None):
            raise ValueError("throughput.gb_per_second and throughput.tflops belong together; give both for a device of your own, or neither")
        for name in ("gb_per_second", "tflops"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"throughput.{name} is {getattr(self, name)}; it must be above 0")
