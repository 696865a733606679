"""Every architecture of the space, with its memory; formed from the memory calculator's own formulas on arrays."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from memory_budget.architecture import Architecture
from memory_budget.calculator import memory_report
from memory_budget.parameters import count_active_parameters, count_total_parameters
from memory_budget.units import format_gib
from memory_budget.workload import Workload
from nas.axes import WIDTHS, identifier
from nas.couplings import QUERY_HEADS, combined, completed
from nas.depth import spelled
from nas.filters import Filters, nothing_passes
from nas.space import SearchSpace
from nas.throughput import Serving, tokens_per_second

BLOCK_POINTS = 2**16  # architectures evaluated at once: half a MiB an array, which stays in a core's cache

Widths = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Architectures as columns of one length; row i has depth `num_layers[i]` and the widths of the other columns.

    The last columns are the teacher's value in every row when left out.
    """

    teacher: Architecture
    kept_layers: Mapping[int, tuple[int, ...]]
    num_layers: np.ndarray
    hidden: np.ndarray
    ffn: np.ndarray
    mamba_num_heads: np.ndarray
    parameters: np.ndarray
    total_bytes: np.ndarray
    mamba_head_dim: np.ndarray | None = None
    num_attention_heads: np.ndarray | None = None
    num_key_value_heads: np.ndarray | None = None
    moe_num_experts: np.ndarray | None = None
    moe_ffn: np.ndarray | None = None
    moe_shared_ffn: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in WIDTHS:
            if getattr(self, name) is None:  # a view of one number, which takes no memory
                object.__setattr__(self, name, np.broadcast_to(np.int64(getattr(self.teacher, name)), self.num_layers.shape))

    def __len__(self) -> int:
        return len(self.num_layers)

    def take(self, rows: np.ndarray) -> "Candidates":
        columns = {name: getattr(self, name)[rows] for name in ("num_layers", *WIDTHS, "parameters", "total_bytes")}
        return replace(self, **columns)

    def pattern(self, depth: int) -> str:
        """The pattern that the kept layers of that depth spell."""
        return spelled(self.teacher, self.kept_layers[depth])

    def architecture(self, row: int) -> Architecture:
        widths = {name: int(getattr(self, name)[row]) for name in WIDTHS}
        return replace(self.teacher, pattern=self.pattern(int(self.num_layers[row])), **widths)

    def identifier(self, row: int) -> str:
        """Names a candidate by its sizes (nas.axes)."""
        return identifier(self.teacher, {name: int(getattr(self, name)[row]) for name in ("num_layers", *WIDTHS)})

    def active_parameters(self) -> np.ndarray:
        """Parameters that one token passes through, of every row, [rows]."""
        return self._column(count_active_parameters, np.int64)

    def tokens_per_second(self, workload: Workload, serving: Serving) -> np.ndarray:
        """Modelled throughput of every row (nas.throughput), [rows]."""
        return self._column(lambda many: tokens_per_second(many, workload, serving), float)

    def _column(self, of: Callable[[Architecture], np.ndarray], dtype: type) -> np.ndarray:
        """A number of every row, [rows], from architectures of one depth at once."""
        column = np.empty(len(self), dtype=dtype)
        for depth in np.unique(self.num_layers).tolist():
            rows = np.flatnonzero(self.num_layers == depth)
            column[rows] = of(replace(self.teacher, pattern=self.pattern(depth), **{name: getattr(self, name)[rows] for name in WIDTHS}))
        return column


def enumerate_candidates(teacher: Architecture, space: SearchSpace, kept_layers: Mapping[int, tuple[int, ...]], workload: Workload) -> Candidates:
    """The whole space with parameters and total bytes under the workload. `kept_layers` maps each depth to its layers."""
    parts = [block.candidates(block.allowed()) for block in _blocks(teacher, space, kept_layers, workload)]
    return _joined(parts)


def enumerate_fitting(
    teacher: Architecture, space: SearchSpace, kept_layers: Mapping[int, tuple[int, ...]], workload: Workload, filters: Filters
) -> tuple[Candidates, int]:
    """Those of the space that pass every filter, in the order of `enumerate_candidates`, and how many architectures were looked at.

    The space is gone through block by block, so only what passes takes memory. Raises ValueError where nothing does, saying how
    many each filter removed, the smallest candidate, and which axis would help.
    """
    parts, removed, num_looked_at, smallest = [], Counter(), 0, None
    for block in _blocks(teacher, space, kept_layers, workload):
        num_looked_at += block.total_bytes.size
        part = block.passing(filters, removed, workload)
        if len(part):
            parts.append(part)
        elif not parts:
            allowed = block.allowed()
            least = block.candidates(allowed[[np.argmin(block.total_bytes.reshape(-1)[allowed])]] if len(allowed) else allowed)
            smallest = least if len(least) and (smallest is None or least.total_bytes[0] < smallest.total_bytes[0]) else smallest
    if smallest is None and not parts:
        raise ValueError(f"none of the {num_looked_at:,} candidates keeps to {' and '.join(removed)}; other options of search.* would")
    if not parts:
        raise ValueError(nothing_passes(removed, smallest.architecture(0), smallest.identifier(0), workload=workload, space=space, filters=filters))
    return _joined(parts), num_looked_at


def filter_fitting(candidates: Candidates, budget_bytes: int) -> Candidates:
    """Those within the budget. Raises ValueError with the smallest candidate's size where nothing fits."""
    rows = np.flatnonzero(candidates.total_bytes <= budget_bytes)
    if len(rows) == 0:
        smallest = int(np.argmin(candidates.total_bytes))
        raise ValueError(
            f"budget of {format_gib(budget_bytes)} fits none of the {len(candidates)} candidates; the smallest, "
            f"{candidates.identifier(smallest)}, needs {format_gib(int(candidates.total_bytes[smallest]))}"
        )
    return candidates.take(rows)


@dataclass(frozen=True, slots=True)
class _Block:
    """All combinations of some options at one depth; parameters and total_bytes have one dimension per axis of width."""

    teacher: Architecture
    kept_layers: Mapping[int, tuple[int, ...]]
    depth: int
    widths: Widths
    parameters: np.ndarray
    total_bytes: np.ndarray
    space: SearchSpace
    many: Architecture

    def of_couplings(self) -> dict[str, np.ndarray]:
        """Mask of who keeps to it, per equation that some options break."""
        masks = {f"{coupling} (no loader of {self.teacher.model_type} takes another)": coupling for coupling in self.space.couplings}
        masks = {name: coupling.holds(self.many, self.teacher) for name, coupling in {**masks, str(QUERY_HEADS): QUERY_HEADS}.items()}
        return {name: np.broadcast_to(mask, self.total_bytes.shape) for name, mask in masks.items() if not np.all(mask)}

    def active_parameters(self) -> np.ndarray:
        return np.broadcast_to(count_active_parameters(self.many), self.total_bytes.shape)

    def allowed(self) -> np.ndarray:
        """Flat positions of those that keep to all equations."""
        masks = list(self.of_couplings().values())
        return np.flatnonzero(np.logical_and.reduce(masks)) if masks else np.arange(self.total_bytes.size)

    def passing(self, filters: Filters, removed: Counter, workload: Workload) -> Candidates:
        """Those that pass; adds to `removed` how many each filter took from what the ones before it left."""
        passes, num_left = None, self.total_bytes.size
        for limit, mask in {**self.of_couplings(), **filters.of_sizes(self.parameters, self.total_bytes, self.active_parameters)}.items():
            passes = mask if passes is None else passes & mask
            num_left, before = int(np.count_nonzero(passes)), num_left
            removed[limit] += before - num_left
        part = self.candidates(np.flatnonzero(passes))
        if filters.min_tokens_per_second is None or not len(part):
            return part
        rows = np.flatnonzero(part.tokens_per_second(workload, filters.serving) >= filters.min_tokens_per_second)
        removed[f"search.min_tokens_per_second of {filters.min_tokens_per_second:g} on {filters.serving.device.name}"] += num_left - len(rows)
        return part.take(rows)

    def candidates(self, points: np.ndarray) -> Candidates:
        """Columns of the points given by their flat positions."""
        places = np.unravel_index(points, self.total_bytes.shape)
        columns = {name: np.array(options, dtype=np.int64)[place] for (name, options), place in zip(self.widths.items(), places, strict=True)}
        many = completed(replace(self.teacher, **columns), self.teacher, self.space.follows)
        return Candidates(
            teacher=self.teacher,
            kept_layers=self.kept_layers,
            num_layers=np.full(len(points), self.depth),
            parameters=self.parameters.reshape(-1)[points],
            total_bytes=self.total_bytes.reshape(-1)[points],
            **{name: getattr(many, name) for name in WIDTHS},
        )


def _blocks(teacher: Architecture, space: SearchSpace, kept_layers: Mapping[int, tuple[int, ...]], workload: Workload) -> Iterator[_Block]:
    """The space, depth by depth, in blocks of at most BLOCK_POINTS; depths that spell one pattern are one architecture, looked at once.

    An axis's options lie along a dimension of their own, so each term of the calculator's formulas is worked out on the axes
    that it depends on, and only the last sums on all.
    """
    depth_of_pattern = {}
    for depth in space.num_layers:
        depth_of_pattern.setdefault(spelled(teacher, kept_layers[depth]), depth)
    layers = {depth: kept_layers[depth] for depth in depth_of_pattern.values()}
    for pattern, depth in depth_of_pattern.items():
        for widths in _split(space.widths(teacher)):
            shape = tuple(len(options) for options in widths.values())
            many = replace(combined(teacher, widths, space.follows), pattern=pattern)
            sizes = (count_total_parameters(many), memory_report(many, workload).total)
            yield _Block(teacher, layers, depth, widths, *(np.broadcast_to(size, shape) for size in sizes), space, many)


def _split(widths: Widths) -> Iterator[Widths]:
    """Halves the first axis that has several options until a block is small; the order of the combinations stays."""
    if np.prod([len(options) for options in widths.values()]) <= BLOCK_POINTS:
        yield widths
        return
    name = next(name for name, options in widths.items() if len(options) > 1)
    middle = len(widths[name]) // 2
    yield from _split({**widths, name: widths[name][:middle]})
    yield from _split({**widths, name: widths[name][middle:]})


def _joined(parts: list[Candidates]) -> Candidates:
    names = ("num_layers", *WIDTHS, "parameters", "total_bytes")
    return replace(parts[0], **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
