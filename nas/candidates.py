"""Every architecture of the space, with its memory; formed from the memory calculator's own formulas on arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from memory_budget.architecture import Architecture
from memory_budget.calculator import memory_report
from memory_budget.parameters import count_total_parameters
from memory_budget.units import format_gib
from memory_budget.workload import Workload
from nas.space import SearchSpace

AXES = ("hidden", "ffn", "mamba_num_heads")


@dataclass(frozen=True, slots=True)
class Candidates:
    """Architectures as columns of one length; row i has depth `num_layers[i]` and the widths of the other columns."""

    teacher: Architecture
    kept_layers: Mapping[int, tuple[int, ...]]
    num_layers: np.ndarray
    hidden: np.ndarray
    ffn: np.ndarray
    mamba_num_heads: np.ndarray
    parameters: np.ndarray
    total_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.num_layers)

    def take(self, rows: np.ndarray) -> "Candidates":
        columns = {name: getattr(self, name)[rows] for name in ("num_layers", *AXES, "parameters", "total_bytes")}
        return replace(self, **columns)

    def architecture(self, row: int) -> Architecture:
        depth = int(self.num_layers[row])
        pattern = "".join(self.teacher.pattern[layer] for layer in self.kept_layers[depth])
        return replace(self.teacher, pattern=pattern, **{name: int(getattr(self, name)[row]) for name in AXES})

    def identifier(self, row: int) -> str:
        """Names a candidate by its sizes, e.g. L56-H4480-F15680-M128."""
        return f"L{self.num_layers[row]}-H{self.hidden[row]}-F{self.ffn[row]}-M{self.mamba_num_heads[row]}"


def enumerate_candidates(teacher: Architecture, space: SearchSpace, kept_layers: Mapping[int, tuple[int, ...]], workload: Workload) -> Candidates:
    """The whole space with parameters and total bytes under the workload. `kept_layers` maps each depth to its layers."""
    grid = np.meshgrid(*(np.array(getattr(space, name), dtype=np.int64) for name in AXES), indexing="ij")
    widths = dict(zip(AXES, (axis.reshape(-1) for axis in grid), strict=True))
    parts = []
    for depth in space.num_layers:
        pattern = "".join(teacher.pattern[layer] for layer in kept_layers[depth])
        many = replace(teacher, pattern=pattern, **widths)
        shape = widths["hidden"].shape
        parts.append(
            {
                "num_layers": np.full(shape, depth),
                **widths,
                "parameters": np.broadcast_to(count_total_parameters(many), shape),
                "total_bytes": np.broadcast_to(memory_report(many, workload).total, shape),
            }
        )
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Candidates(teacher=teacher, kept_layers=dict(kept_layers), **columns)


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
