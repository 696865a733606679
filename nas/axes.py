"""The axes that a model may be cut along: one table for settings, search and reports.

Which of them a model has follows from its architecture: one with a size of 0 is not there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lcm

from memory_budget.architecture import Architecture
from nas.couplings import Coupling


@dataclass(frozen=True, slots=True)
class Axis:
    """`name` is the setting search.<name>, `field` the architecture's, `letter` what candidates' ids say; `step` is the usual distance of two options.

    `kind` is the letter of the mixers whose size it is ("": of all of them); `always_said` is an axis that an id says even where it is not cut.
    """

    name: str
    field: str
    letter: str
    title: str
    step: Callable[[Architecture], int]
    kind: str = ""
    always_said: bool = False

    def size(self, architecture: Architecture) -> int:
        """The axis's size; 0 where no layer of the model has it, whatever the field says."""
        return getattr(architecture, self.field) if self.kind in architecture.mixers else 0


LAYERS = Axis("layers", "num_layers", "L", "layers", lambda _: 1, always_said=True)
# Axes of width, in the order in which they are enumerated.
WIDTH_AXES = (
    Axis("hidden", "hidden", "H", "hidden size", lambda one: 128 if one.hidden >= 2048 else 16, always_said=True),
    Axis("ffn", "ffn", "F", "FFN neurons", lambda _: 64, "-", always_said=True),
    Axis("mamba_heads", "mamba_num_heads", "M", "Mamba-2 heads", lambda one: one.mamba_num_groups, "M", always_said=True),
    Axis("mamba_channels", "mamba_head_dim", "P", "channels of a Mamba-2 head", lambda _: 8, "M"),
    Axis("attention_heads", "num_attention_heads", "A", "query heads", lambda one: one.num_key_value_heads, "*"),
    Axis("key_value_heads", "num_key_value_heads", "K", "KV heads", lambda _: 1, "*"),
    # A 16th of the experts, in whole routing groups: their number is seldom worth more options.
    Axis("experts", "moe_num_experts", "E", "routed experts", lambda one: one.moe_groups * max(1, one.moe_num_experts // one.moe_groups // 16), "E"),
    Axis("expert_ffn", "moe_ffn", "X", "neurons of an expert", lambda one: 64 if one.moe_ffn >= 512 else 16, "E"),
    Axis("shared_ffn", "moe_shared_ffn", "S", "neurons of the shared expert", lambda one: 64 if one.moe_shared_ffn >= 512 else 16, "E"),
)
AXES = {axis.name: axis for axis in (LAYERS, *WIDTH_AXES)}
WIDTHS = {axis.field: axis.name for axis in WIDTH_AXES}


def axes_of(architecture: Architecture) -> tuple[str, ...]:
    """The names of the axes that a model has."""
    return tuple(name for name, axis in AXES.items() if axis.size(architecture))


def identifier(teacher: Architecture, sizes: dict[str, int]) -> str:
    """Names a candidate by its sizes, e.g. L56-H4480-F15680-M128; other axes (-A32, -K2, -E96) only where they are not the teacher's."""
    parts = []
    for axis in AXES.values():
        own = axis.size(teacher)
        if own and (axis.always_said or sizes[axis.field] != own):
            parts.append(f"{axis.letter}{sizes[axis.field]}")
    return "-".join(parts)


def usual_step(axis: Axis, teacher: Architecture, couplings: Sequence[Coupling] = ()) -> int:
    """The distance of two options of an axis, where no other is asked for; one that couplings allow: hidden in multiples of the query heads, say."""
    step = axis.step(teacher)
    for coupling in couplings:
        if axis.field in coupling.fields and (unit := coupling.unit(axis.field, teacher)) > 1:
            step = lcm(step, unit) if lcm(step, unit) <= axis.size(teacher) // 6 else min(lcm(step, unit), lcm(8, unit))
    return step
