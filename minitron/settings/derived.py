"""What follows from settings and the teacher's config.json alone: floors, options per axis, a fixed architecture, which stages there are."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from memory_budget.architecture import WINDOWED, Architecture
from memory_budget.budget import PRESETS, Budget
from memory_budget.workload import Workload
from minitron.families.known import FAMILIES, family_of
from minitron.settings.names import did_you_mean
from minitron.settings.run import PruneMethod, Settings
from minitron.settings.search import AxisSettings
from minitron.settings.teachers import base_architecture
from nas.axes import AXES, WIDTHS, axes_of, usual_step
from nas.couplings import Coupling, completed, following
from nas.exchange import read_export_config
from nas.space import Floors, axis_options
from nas.throughput import DEVICES

TOKENS_PER_INPUT, MOST_CALIBRATION_TOKENS = 43, 2**18  # docs/compensated.md has what fewer and more are worth
KIND_LETTERS = {"mamba": "M", "attention": "*", "ffn": "-", "moe": "E"}


def couplings_of(architecture: Architecture) -> tuple[Coupling, ...]:
    """Equations between sizes that every candidate of this teacher must keep: those of its family that it keeps itself."""
    family = FAMILIES.get(architecture.model_type)
    return tuple(one for one in family.couplings if one.holds(architecture, architecture)) if family else ()


def floors(settings: Settings, base: Architecture | None = None) -> Floors:
    """Least number of layers per kind; `base` where it is known, else as the settings name it."""
    return by_kind(settings.search.floors, (base or base_architecture(settings)).layer_kinds)


def by_kind(numbers: Mapping[str, int], kinds: Sequence[str]) -> dict[str, int]:
    """Numbers of layers by what the kinds of a model's layers are called: a mixer's letter, or those of the blocks that have it where others have not."""
    found = {}
    for mixer, number in numbers.items():
        letter = KIND_LETTERS[mixer]
        with_it = {kind for kind in kinds if letter in kind.replace(WINDOWED, "*")}
        found[with_it.pop() if len(with_it) == 1 < len(set(kinds)) else letter] = number
    return found


def base_stage(settings: Settings) -> str:
    """The stage whose model is cut: the teacher itself, or a base of its own."""
    return "teacher" if settings.base.path is None else "base"


def has_ladder(settings: Settings) -> bool:
    """Whether finalists are distilled before one is chosen: not without weights, nor where there is one candidate only."""
    search = settings.search
    return bool(search.finalists) and search.shortlist_size > 1 and not search.layer_order and not search.fixed.given()


def rotates(settings: Settings, base: Architecture | None = None) -> bool:
    """Whether a compensated cut writes the stream in another basis: as asked, else wherever that keeps the function."""
    if settings.prune.rotate is not None:
        return settings.prune.rotate
    return not (base or base_architecture(settings)).post_norms


def check_rotates(settings: Settings) -> None:
    """Refuse a rotation of a model that it would make another one. Raises ValueError."""
    if settings.prune.method is PruneMethod.compensated and settings.prune.rotate and (base := base_architecture(settings)).post_norms:
        raise ValueError(f"prune.rotate is true, but a {base.model_type} has a norm behind every mixer, which weighs the channels of what is added to the "
                         "stream: in another basis it would be another model; it must be false, or left out")  # fmt: skip


def ranks_rotated(settings: Settings, base: Architecture | None = None) -> bool:
    """Whether candidates are ranked zero-shot in the stream's principal directions: as they will be cut, where any hidden size is cut at all."""
    return _ranks_compensated(settings, base, "hidden") and rotates(settings, base)


def ranks_refitted(settings: Settings, base: Architecture | None = None) -> bool:
    """Whether candidates are ranked zero-shot with what writes to the stream refitted for fewer units, where any are cut at all."""
    return bool(refitted_widths(settings, base))


def refitted_widths(settings: Settings, base: Architecture | None = None) -> tuple[str, ...]:
    """The widths that it is refitted for; of the number of experts nothing is (pruning/width_refits.py)."""
    prune = settings.prune
    asked = {"hidden": False, "moe_num_experts": False, "moe_ffn": prune.refit_experts, "moe_shared_ffn": prune.refit_shared}
    return tuple(width for width in WIDTHS if asked.get(width, prune.refit_writing) and _ranks_compensated(settings, base, width))


def _ranks_compensated(settings: Settings, base: Architecture | None, *widths: str) -> bool:
    """Whether there is something to rank that will be cut compensated, and along one of these widths."""
    if settings.prune.method is not PruneMethod.compensated or settings.search.layer_order or settings.search.fixed.given():
        return False
    base = base or base_architecture(settings)
    narrowest = replace(base, **{field: axis_of(settings, name, base)[0] for field, name in WIDTHS.items()})
    narrowest = completed(narrowest, base, following(couplings_of(base), given_widths(settings)))
    return any(getattr(narrowest, width) < getattr(base, width) for width in widths)


def asked_candidate_samples(settings: Settings) -> int | None:
    """Calibration rows that candidates are ranked and cut on, as keys say it: the chosen one's own cut may have more; None: by their width."""
    return settings.prune.samples if settings.screen.cut_samples is None else settings.screen.cut_samples


def candidate_samples(settings: Settings, base: Architecture | None = None) -> int:
    """The number of them; `base` where it is known, else as the settings name it."""
    return _samples(settings, asked_candidate_samples(settings), base)


def calibration_samples(settings: Settings, base: Architecture | None = None) -> int:
    """Calibration rows of the chosen candidate's cut."""
    return _samples(settings, settings.prune.samples, base)


def _samples(settings: Settings, asked: int | None, base: Architecture | None) -> int:
    """As asked, else TOKENS_PER_INPUT for every input of the base's widest matrix that a cut may refit; of an expert's, as many that are sent to it."""
    if asked is not None:
        return asked
    base = base or base_architecture(settings)
    of_expert = -(-base.moe_ffn * base.moe_num_experts // max(1, base.moe_experts_per_token))
    inputs = {"*": base.num_attention_heads * base.attention_head_dim, "-": base.ffn, "M": base.mamba_inner, "E": max(of_expert, base.moe_shared_ffn)}
    widest = max(base.hidden, *(number for letter, number in inputs.items() if letter in base.mixers))
    return -(-min(TOKENS_PER_INPUT * widest, MOST_CALIBRATION_TOKENS) // settings.data.sequence_length)


def fixed_sizes(settings: Settings, teacher: Architecture) -> dict[str, int | str]:
    """What `search.fixed` asks for, its file's sizes first and the settings of its own, with what follows from them, over those; "num_layers" where only
    the depth is known. Raises ValueError for sizes from which no other can follow."""
    given = settings.search.fixed.given()
    path = given.pop("file", None)
    for name in given.keys() & WIDTHS.keys():
        if not AXES[WIDTHS[name]].size(teacher):
            raise _no_such_axis(f"search.fixed.{WIDTHS[name]}", teacher)
    given |= _following_sizes(teacher, {name: value for name, value in given.items() if name in WIDTHS})
    if path is None:
        return given
    try:
        imported = read_export_config(Path(path), teacher)
    except ValueError as error:
        raise ValueError(f"search.fixed.file: {error}") from None
    sizes = {name: value for name, value in imported.sizes.items() if value != getattr(teacher, name)}
    depth = {"num_layers": imported.num_layers} if imported.pattern is None else {"pattern": imported.pattern}
    return {**sizes, **depth, **given}


def _following_sizes(teacher: Architecture, given: dict[str, int]) -> dict[str, int]:
    """What follows from widths that are given. Raises ValueError where the equation has no size for it."""
    follows = {field: coupling for field, coupling in following(couplings_of(teacher), given).items() if AXES[WIDTHS[field]].size(teacher)}
    student = completed(replace(teacher, **given), teacher, follows)
    for field, coupling in follows.items():
        if not getattr(student, field) and min(given.values()) > 0:
            named = [name for name in coupling.fields if name in given]
            said = " and ".join(f"{WIDTHS[name]} ({given[name]})" for name in named)
            nearest = _nearest(given[named[0]], coupling.unit(named[0], teacher), getattr(teacher, named[0])) if len(named) == 1 else ""
            raise ValueError(f"search.fixed has {said}, from which no {WIDTHS[field]} follows at the teacher's proportions: {coupling}{nearest}")
    return {field: getattr(student, field) for field in follows}


def _nearest(size: int, unit: int, most: int) -> str:
    below = size // unit * unit
    return f"; it must be a multiple of {unit}, nearest: {', '.join(str(one) for one in (below, below + unit) if 0 < one <= most)}"


def fewest_layers(settings: Settings, base: Architecture | None = None) -> int:
    """The depth that layer removal must reach: the smallest option of the search, or the fixed one's."""
    base = base or base_architecture(settings)
    if settings.search.fixed.given():
        fixed = fixed_sizes(settings, base)
        return len(fixed["pattern"]) // base.sublayers_per_layer if "pattern" in fixed else fixed.get("num_layers", base.num_layers)
    return axis_of(settings, "layers", base)[0]


def given_widths(settings: Settings) -> frozenset[str]:
    """The widths, by the architecture's fields, whose axes somebody gave options; others may follow from them."""
    return frozenset(field for field, name in WIDTHS.items() if getattr(settings.search, name) != AxisSettings())


def axis_of(settings: Settings, axis: str, teacher: Architecture) -> tuple[int, ...]:
    """Options of one axis of the search. Bounds up to 1 are shares of the teacher's value, rounded up to whole steps below it."""
    value, given = AXES[axis].size(teacher), getattr(settings.search, axis)
    if not value:
        if given != AxisSettings():
            family_of({"model_type": teacher.model_type})  # what cannot be pruned at all says so first
            raise _no_such_axis(f"search.{axis}", teacher)
        return (getattr(teacher, AXES[axis].field),)
    step = usual_step(AXES[axis], teacher, couplings_of(teacher)) if given.step is None else given.step

    def bound(number: float | None) -> int | None:
        if number is None or number > 1:
            return None if number is None else int(number)
        return size_at(number, value, step)

    return axis_options(axis, value, given.values, bound(given.low), bound(given.high), step)


def _no_such_axis(setting: str, teacher: Architecture) -> ValueError:
    return ValueError(f"{setting} is given, but a {teacher.model_type} has no such axis; it has {', '.join(axes_of(teacher))}")


def size_at(share: float, value: int, step: int) -> int:
    """The smallest size at or above a share of the teacher's, whole steps below it."""
    return value - int(value * (1 - share) + 1e-9) // max(step, 1) * step


def workload_of(settings: Settings) -> Workload:
    return Workload(**asdict(settings.workload))


def budget_of(settings: Settings) -> Budget:
    """The budget of the settings. Raises ValueError where its name and numbers say two things, or nothing."""
    given = settings.budget
    own = {name: value for name in ("cushion_fraction", "set_aside_gib") if (value := getattr(given, name)) is not None}
    preset = PRESETS.get((given.name or "").lower())
    if given.device_gib is None:
        if preset is None:
            said = "null" if given.name is None else repr(given.name)
            raise ValueError(f"budget.name is {said}; without budget.device_gib it must be one of {', '.join(PRESETS)}"
                             + did_you_mean(given.name or "", PRESETS))  # fmt: skip
        return replace(preset, **own)
    if preset is not None and given.device_gib != preset.device_gib:
        raise ValueError(f"budget.name is {given.name!r}, a card of {preset.device_gib:g} GiB, but budget.device_gib is {given.device_gib:g}; give one of "
                         f"them, or the device another name (budget={given.name} on the command line takes the card and all its numbers)")  # fmt: skip
    return Budget(given.name or f"{given.device_gib:g} GiB", given.device_gib, **own)


def serving_device(settings: Settings) -> str | None:
    """The device whose speed is modelled: the named one, else the budget's where it is a card that is known."""
    name = settings.throughput.device or settings.budget.name
    return name if settings.throughput.device or (name or "").lower() in DEVICES else None
