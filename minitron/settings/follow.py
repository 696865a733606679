"""Settings that follow from the model and the budget: of experiment=own, every setting that conf/experiment/own.yaml leaves open as ${follows:}.

What a result follows from (tokens, rows, rates, ranges of the search) is decided by the teacher's config.json, the workload and the budget alone, so that the
same command means the same everywhere; how it is computed (rows at once) may look at the launch. A setting that is given, on the command line or in an
experiment of one's own, stays as it is.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memory_budget.architecture import Architecture
from memory_budget.budget import Budget
from memory_budget.calculator import memory_report
from memory_budget.parameters import count_total_parameters
from memory_budget.workload import Workload
from minitron.settings.derived import couplings_of, size_at
from minitron.settings.run import Settings, TeacherSettings
from nas.axes import AXES, usual_step
from nas.couplings import completed, following

MOST_CONTEXT = 131072  # tokens: what a model with a longer promise is planned for
# Widths shrink together, at the pace of the published cuts: 12B to 9B kept 0.90 of the layers, 0.875 of the hidden size and 0.77 of the FFN (arXiv 2508.14444,
# §4.1). Shares that one unit of pace takes off each axis, and the least that is left.
PACES = {"layers": (0.35, 0.5), "hidden": (0.4, 0.4), "ffn": (0.65, 0.25), "mamba_heads": (0.35, 0.4), "experts": (0.5, 0.25), "expert_ffn": (0.5, 0.25)}
KEY_VALUE_PACE = {"key_value_heads": (0.5, 0.25)}  # where the cache is what does not fit
ROOM = 0.85  # of the budget: what the smallest candidate may take, so that there are different ways to fit
STEPS_AT_ONCE = 8192  # tokens that a forward or backward pass of models below LARGE takes at once
LARGE = 1_000_000_000  # parameters
TOKENS_PER_PARAMETER, LEAST_TOKENS = 1 / 50, 262_144  # to distil on: an evening of one GPU at 8B. The published job took 5 a parameter.
STEPS = 512  # of a distillation: so many batches make its tokens up


@dataclass(frozen=True, slots=True)
class Model:
    """What is followed: the model's sizes, its longest sequence in tokens, and what must fit where."""

    architecture: Architecture
    positions: int
    workload: Workload
    budget: Budget
    processes: int = 1

    @property
    def parameters(self) -> int:
        return count_total_parameters(self.architecture)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row: longer for models that make something of them."""
        usual = next(tokens for below, tokens in ((1e8, 512), (1e9, 1024), (4e9, 2048), (float("inf"), 4096)) if self.parameters < below)
        return min(usual, self.positions, self.workload.context_tokens)

    @property
    def tokens(self) -> int:
        """To distil on, whole batches."""
        rows = max(LEAST_TOKENS, int(self.parameters * TOKENS_PER_PARAMETER)) // self.row_tokens
        return max(1, rows // self.batch) * self.batch * self.row_tokens

    @property
    def batch(self) -> int:
        """Rows of a step of distillation, a power of two."""
        rows = max(LEAST_TOKENS, int(self.parameters * TOKENS_PER_PARAMETER)) // self.row_tokens
        return 1 << max(0, (rows // STEPS).bit_length() - 1 if rows >= STEPS else 0)

    @property
    def rows_at_once(self) -> int:
        return 1 if self.parameters >= LARGE else max(1, STEPS_AT_ONCE // self.row_tokens)

    @property
    def micro_batch(self) -> int:
        """Rows of a step that a process computes at once."""
        return 1 << max(0, min(self.rows_at_once, self.batch // self.processes).bit_length() - 1)

    @property
    def learning_rate(self) -> float:
        """1e-4 at 135M parameters, where it was measured (docs/real_teacher.md), and less for larger models: by the fourth root, to two digits."""
        return float(f"{1e-4 * (135e6 / self.parameters) ** 0.25:.1e}")

    @property
    def lows(self) -> dict[str, float | None]:
        """The lower end of every axis of the search, as a share of the teacher's size; None for axes that are left alone."""
        return axis_lows(self.architecture, self.workload, self.budget.bytes)


def axis_lows(teacher: Architecture, workload: Workload, budget_bytes: int) -> dict[str, float | None]:
    """How far each axis must be open so that the smallest candidate takes ROOM of the budget: all go down together, the pace from 0.2 up.

    KV heads come in only where nothing else is enough: at long contexts the cache may be all that does not fit. An axis that follows from one before it is
    left alone.
    """
    for paces in (PACES, PACES | KEY_VALUE_PACE):
        there = _open(teacher, paces)
        for pace in range(4, 33):
            shares = {name: max(least, round(1 - per_unit * pace / 20, 2)) for name, (per_unit, least) in there.items()}
            if memory_report(_at_shares(teacher, shares), workload).total <= ROOM * budget_bytes:
                break
        else:
            continue
        break
    return {name: shares.get(name) for name in AXES}


def _open(teacher: Architecture, paces: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Those of the axes that the model has, without what follows from the ones before."""
    found: dict[str, tuple[float, float]] = {}
    for name, pace in paces.items():
        if name in AXES and AXES[name].size(teacher) and AXES[name].field not in following(couplings_of(teacher), [AXES[one].field for one in found]):
            found[name] = pace
    return found


def _at_shares(teacher: Architecture, shares: Mapping[str, float]) -> Architecture:
    """About the smallest candidate of a search that is open so far; of its layers every kind loses as much, but never its last one."""

    def size(name: str) -> int:
        return size_at(shares[name], AXES[name].size(teacher), usual_step(AXES[name], teacher, couplings_of(teacher)))

    sizes = {AXES[name].field: size(name) for name in shares if name != "layers"}
    kinds = teacher.layer_kinds
    kept = [kind * max(1, round(kinds.count(kind) * size("layers") / teacher.num_layers)) for kind in dict.fromkeys(kinds)]
    return completed(replace(teacher, pattern="".join(kept), **sizes), teacher, following(couplings_of(teacher), sizes))


def _few_that_attend(teacher: Architecture) -> int:
    """Layers with attention in a model where others have Mamba-2 in its place."""
    return sum(kind == "*" or (kind.startswith("*") and "M" in teacher.pattern) for kind in teacher.layer_kinds)


# Every setting that may be left open, in the order of conf/run.yaml.
RULES: dict[str, Callable[[Model], Any]] = {
    "data.sequence_length": lambda model: model.row_tokens,
    "scoring.samples": lambda model: max(32, 65_536 // model.row_tokens),
    "scoring.layer_samples": lambda model: 16 if model.parameters < LARGE else 8,
    "scoring.batch": lambda model: model.rows_at_once,
    "scoring.criterion": lambda model: "iterative_mse" if model.parameters < 50_000_000 else "block_influence",
    "throughput.input_tokens": lambda model: min(8192, max(1, model.workload.context_tokens // 3)),
    "throughput.output_tokens": lambda model: min(16384, max(1, model.workload.context_tokens // 3)),
    "search.floors.attention": lambda model: -(-2 * _few_that_attend(model.architecture) // 3),
    **{f"search.{name}.low": lambda model, name=name: model.lows[name] for name in AXES},
    "prune.batch": lambda model: model.rows_at_once,
    "screen.cache_batch": lambda model: model.rows_at_once,
    "screen.train.tokens": lambda model: max(1, model.tokens // 8 // (model.batch * model.row_tokens)) * model.batch * model.row_tokens,
    "evaluate.samples": lambda model: max(16, 65_536 // model.row_tokens),
    "evaluate.batch": lambda model: model.rows_at_once,
    "evaluate.speed": lambda model: [{"input_tokens": model.row_tokens // 2, "output_tokens": min(64, model.row_tokens // 2), "batch": 1}],
    "evaluate.needle.lengths": lambda model: [length for length in (model.row_tokens // 2, model.row_tokens) if length >= 64],
    "distill.train.tokens": lambda model: model.tokens,
    **{f"{stage}.train.{name}": rule for stage in ("screen", "distill") for name, rule in {
        "batch": lambda model: model.batch,
        "learning_rate": lambda model: model.learning_rate,
        "precision": lambda model: "float32" if model.parameters < LARGE else "bf16",
        "micro_batch": lambda model: model.micro_batch,
    }.items()},
}  # fmt: skip


def run_name_of(teacher: TeacherSettings) -> str:
    """The teacher's own name as a folder's: of SmolLM2-135M.gguf, meta-llama/Llama-3.2-1B or models/own/ the last part."""
    given = teacher.path or teacher.gguf or (teacher.package or "").partition("==")[0]
    name = Path(given).absolute().name if teacher.path else Path(given).stem if teacher.gguf else given
    name = re.sub(r"[/\\\s]+", "-", name).lstrip(".")
    return name if name and name != "store" else f"{name or 'own'}-run"


def followed(model: Model, missing: Collection[str]) -> dict[str, Any]:
    """Values for those of the missing settings that have a rule here, by their full names."""
    return {name: rule(model) for name, rule in RULES.items() if name in missing}


def has_own_space(settings: Settings) -> bool:
    """Whether somebody said what to cut: an axis of the search has options, and not because they followed from the budget."""
    given = (name for name in AXES if getattr(settings.search, name) != type(settings.search.hidden)())
    return any(f"search.{name}.low" not in settings.followed for name in given)
