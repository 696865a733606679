"""The training loop: one loop for distillation and for the tiny teacher's own training, told apart by their loss."""

import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from distill.batches import RowBatches, RowNumbers, count_counted, micro_batches
from distill.chunked_loss import LossRecipe
from distill.engines.engine import Engine, Unread
from distill.engines.launch import Launch
from distill.engines.opening import open_engine
from distill.engines.sharing import check_sharing
from distill.objectives import LossFunction, distillation_loss
from distill.plan import HOW, Phase, StepRecord, TrainPlan
from distill.schedule import learning_rate
from distill.states import BEST, newest_state, restore_state, save_state

SINGLE = Launch()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Rows, int64 batches [B, T], on which the loss is measured after every so many steps and after the last.

    Raises ValueError where none of their positions counts.
    """

    batches: Sequence[torch.Tensor]
    every_steps: int

    def __post_init__(self) -> None:
        if not any(map(count_counted, self.batches)):
            raise ValueError(f"held-out rows: of their {sum(map(len, self.batches))} none has a position at which something is learned; take more or others")


def distill(teacher: nn.Module, student: nn.Module, batches: RowBatches, plan: TrainPlan, *, folder: Path, on_step: Callable[[StepRecord], None],
            recipe: LossRecipe | None = None) -> StepRecord:  # fmt: skip
    """Train the student to the teacher's distribution, by forward KL on logits alone unless a recipe says otherwise (MT1, arXiv 2407.14679, §3)."""
    return train(student, batches, plan, distillation_loss(teacher, recipe), folder=folder, on_step=on_step)


def train(model: nn.Module, batches: RowBatches, plan: TrainPlan, loss_function: LossFunction, *, folder: Path,
          on_step: Callable[[StepRecord], None]) -> StepRecord:  # fmt: skip
    """Run one phase in this process alone; see train_phases."""
    return train_phases(model, [Phase(batches, plan)], loss_function, folder=folder, on_step=on_step)


def train_phases(model: nn.Module | Unread, phases: Sequence[Phase], loss_function: LossFunction, *, folder: Path, on_step: Callable[[StepRecord], None],
                 launch: Launch = SINGLE, counted_of: Callable[[torch.Tensor], int] = count_counted,
                 held_out: HeldOut | None = None) -> StepRecord:  # fmt: skip
    """Run the phases to their end, from the newest state saved in `folder` if there is one. Returns the last step's record.

    A step's loss is the mean over all positions of its batch that `counted_of` counts in rows, over processes and micro-batches, and 0 where there are
    none; what a step takes of the plan's tokens are real ones (RowBatches.tokens_per_step), counted or not.
    States (weights, optimiser, position) are saved every so many seconds or steps, when interrupted and at the end, by
    rename; resuming from one is exact. `on_step` is called in the first process alone. With an engine in slices the
    model is not whole afterwards: its weights are in the last state. Raises ValueError for what the plans or the states
    in `folder` refuse, FloatingPointError where the loss stops being finite.
    """
    return _Run(model, phases, loss_function, folder=folder, on_step=on_step, launch=launch, counted_of=counted_of, held_out=held_out).to_end()


class _Run:
    """One sitting of train_phases."""

    def __init__(self, model: nn.Module | Unread, phases: Sequence[Phase], loss_function: LossFunction, *, folder: Path, on_step: Callable[[StepRecord], None],
                 launch: Launch, counted_of: Callable[[torch.Tensor], int], held_out: HeldOut | None):  # fmt: skip
        self.phases, self.loss_function, self.folder, self.on_step = phases, loss_function, folder, on_step
        self.launch, self.counted_of, self.held_out = launch, counted_of, held_out
        for phase in phases:
            check_sharing(phase.batches.batch, phase.plan.micro_batch, launch.world_size, cached=isinstance(phase.batches, RowNumbers))
        self.total_steps = sum(phase.num_steps for phase in phases)
        self.engine: Engine = open_engine(launch, model, phases[0].plan)
        self.record, self.best, self.num_skipped = None, math.inf, 0
        self._resume()
        self.started = self.last_saved = time.monotonic()
        self.earlier_seconds = self.record.seconds if self.record else 0.0
        self.first_step = self.record.step + 1 if self.record else 0

    def _resume(self) -> None:
        state = newest_state(self.folder)
        if state is None:
            return
        check_same(state.facts["made_with"], self._made_with(), self.folder)
        restore_state(state, self.engine)
        self.record, self.best, self.num_skipped = StepRecord(**state.facts["record"]), state.facts["best"] or math.inf, state.facts["num_skipped"]
        self.engine.plan = self.phases[self.record.phase].plan

    def _made_with(self) -> list[dict]:
        """Of every phase what a state is bound to."""
        plans = [{name: value for name, value in asdict(phase.plan).items() if name not in HOW} for phase in self.phases]
        return [plan | phase.batches.identity for plan, phase in zip(plans, self.phases, strict=True)]

    def to_end(self) -> StepRecord:
        self.engine.model.train()
        # One process alone may stop anywhere but within an update; several must agree on the step after which they stop.
        with interrupts_wait() if self.launch.world_size > 1 else nullcontext([]) as held:
            try:
                for step in range(self.first_step, self.total_steps):
                    self._step(step, held)
                if self.record.step >= self.first_step:
                    self._save()
            except KeyboardInterrupt:
                if self.record and self.launch.world_size == 1:
                    with interrupts_wait():  # a scheduler that asks twice
                        self._save()
                raise
        self.engine.model.eval()
        return self.record

    def _step(self, step: int, held: list[int]) -> None:
        phase_number, phase, local_step, tokens_before = self._place(step)
        if local_step == 0 and step > 0:
            self.engine.start_phase(phase.plan)
        plan = phase.plan
        means, interrupted, due = self._gradients(phase, local_step, held)
        rate = learning_rate(plan, local_step, phase.num_steps)
        with interrupts_wait():  # weights, optimiser, record and its line move together or not at all
            norm = self.engine.update(rate) if math.isfinite(means["loss"]) else math.nan
            if not math.isfinite(norm):
                self._not_finite(step, phase, local_step, means["loss"])
                return
            tokens = tokens_before + (local_step + 1) * phase.batches.tokens_per_step
            if plan.balance_rate:
                self.engine.loads.balance(plan.balance_rate * rate / (plan.learning_rate or 1.0))
            self.record = self._next_record(step, phase_number, tokens, means, norm, rate)
            if self.launch.rank == 0:
                self.on_step(self.record)
        if self.record.watched.get("held_out_loss", math.inf) < self.best:
            self.best = self.record.watched["held_out_loss"]
            self._save(best=True)
        if interrupted or due or (plan.save_every_steps and (step + 1) % plan.save_every_steps == 0):
            self._save()
        if interrupted:
            raise KeyboardInterrupt

    def _place(self, step: int) -> tuple[int, Phase, int, int]:
        """A step's phase, its number in it, and the tokens of the phases before."""
        tokens = 0
        for number, phase in enumerate(self.phases):
            if step < phase.num_steps:
                return number, phase, step, tokens
            step -= phase.num_steps
            tokens += phase.num_steps * phase.batches.tokens_per_step
        raise AssertionError("a step beyond the last phase")

    def _gradients(self, phase: Phase, local_step: int, held: list[int]) -> tuple[dict[str, float], bool, bool]:
        """Puts the gradients of the batch's mean loss on the parameters; gives the means over the batch, with what Loads measures, whether any process was
        interrupted, and whether the first one's clock says to save."""
        batch = phase.batches.at(local_step)
        counted = max(self.counted_of(batch), 1)
        parts = micro_batches(batch, phase.plan.micro_batch, self.launch.rank, self.launch.world_size)
        sums: dict[str, torch.Tensor] = {}
        for number, rows_BT in enumerate(parts):
            share = self.counted_of(rows_BT) / counted
            with self.engine.micro_step(last=number == len(parts) - 1):
                measured = _named(self.engine.measure(self.loss_function, rows_BT))
                self.engine.backward(measured["loss"] * share)
            for name, value in measured.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() * share
        due = self.launch.rank == 0 and time.monotonic() - self.last_saved > phase.plan.save_every_seconds
        names, loads = sorted(sums), self.engine.loads
        interrupted, due, *values = self.engine.sum([float(bool(held)), float(due), *(float(sums[name]) for name in names), *loads.take()])
        means = dict(zip(names, values, strict=False))
        return means | loads.measure(values[len(names) :]), interrupted > 0, due > 0

    def _not_finite(self, step: int, phase: Phase, local_step: int, loss: float) -> None:
        """Passes over a step whose loss or gradient is not finite where the plan allows it and the weights are as before it."""
        rows = phase.batches.indices(local_step).tolist()
        self.num_skipped += 1
        if self.num_skipped <= phase.plan.skip_not_finite and not self.launch.engine.startswith("zero"):
            self.engine.drop_gradients()
            return
        state = newest_state(self.folder)
        kept = f"the last good state is {state.folder}" if state else "no state was saved before"
        what = f"loss is {loss}" if not math.isfinite(loss) else "gradient is not finite"
        raise FloatingPointError(f"{what} at step {step}, rows {rows} of phase {self.phases.index(phase)}; {kept}. A lower learning rate may help")

    def _next_record(self, step: int, phase_number: int, tokens: int, means: dict[str, float], norm: float, rate: float) -> StepRecord:
        last, loss = self.record, means.pop("loss")
        seconds = self.earlier_seconds + time.monotonic() - self.started
        recent = last.recent_loss + 0.05 * (loss - last.recent_loss) if last else loss
        done = step + 1 - self.first_step
        pace = (seconds - self.earlier_seconds) / done
        tokens_here = tokens - (last.tokens if last else 0)
        took = seconds - (last.seconds if last else 0.0)
        watched = means | self._held_out_means(step)
        return StepRecord(
            step, self.total_steps, tokens, loss, recent, norm, rate, seconds, phase_number,
            tokens_per_second=round(tokens_here / max(took, 1e-9), 1), seconds_left=round(pace * (self.total_steps - step - 1), 1),
            memory_gib=round(memory_gib(self.engine.device), 3), watched=watched,
        )  # fmt: skip

    def _held_out_means(self, step: int) -> dict[str, float]:
        """Means over the held-out rows where this step is one to measure after; the best weights so far are saved as states/best."""
        if self.held_out is None or ((step + 1) % self.held_out.every_steps and step + 1 < self.total_steps):
            return {}
        self.engine.model.eval()
        sums: dict[str, float] = {}
        counted = sum(map(self.counted_of, self.held_out.batches))
        for rows_BT in self.held_out.batches:  # every process measures all of them: a sharded model runs in all processes at once
            with torch.no_grad():
                measured = _named(self.engine.measure(self.loss_function, rows_BT))
            for name, value in measured.items():
                sums[name] = sums.get(name, 0.0) + value.item() * self.counted_of(rows_BT) / counted
        self.engine.model.train()
        return {f"held_out_{name}": value for name, value in sums.items()}

    def _save(self, *, best: bool = False) -> None:
        """The state after the newest step; with `best` its weights alone, as states/best."""
        facts = {"record": asdict(self.record), "made_with": self._made_with(), "best": self.best if math.isfinite(self.best) else None,
                 "num_skipped": self.num_skipped}  # fmt: skip
        if best:
            save_state(self.folder, self.engine, self.engine.weights(), facts, name=BEST)
            return
        name = f"step-{self.record.step + 1:09d}"
        save_state(self.folder, self.engine, self.engine.entries(), facts, name=name, keep=self.engine.plan.keep_states)
        self.last_saved = time.monotonic()


def _named(measured: torch.Tensor | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return measured if isinstance(measured, dict) else {"loss": measured}


def check_same(then: list[dict], now: list[dict], folder: Path) -> None:
    """Raises ValueError naming the first setting in which a saved state differs from this run."""
    remedy = "take another folder or the same settings"
    if len(then) != len(now):
        raise ValueError(f"the state in {folder} was made with {len(then)} phases, now there are {len(now)}; {remedy}")
    for number, (before, after) in enumerate(zip(then, now, strict=True)):
        for name in sorted(before | after):
            if before.get(name) != after.get(name):
                where = f" in phase {number}" if len(now) > 1 else ""
                raise ValueError(f"the state in {folder} was made with {name} {before.get(name)}{where}, now it is {after.get(name)}; {remedy}")


def memory_gib(device: torch.device) -> float:
    """The most memory this process has held so far, in GiB: of its GPU where it has one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30


@contextmanager
def interrupts_wait() -> Iterator[list[int]]:
    """Holds SIGINT and SIGTERM back until the block is through: one in the middle of an update would save half a step.

    Yields the list of those that came.
    """
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread alone
        yield held
        return
    before = {number: signal.signal(number, lambda number, _frame: held.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    for number in held[:1]:
        signal.raise_signal(number)
