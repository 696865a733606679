"""The training loop: one loop for distillation and for the tiny teacher's own training, told apart by their loss."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from distill.batches import RowBatches, split_padding
from distill.losses import forward_kl
from distill.schedule import learning_rate_share

STATE_FILE = "state.pt"
# Of a model and rows [B, T] that may end in padding.
LossFunction = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """How one run of the loop goes. Tokens are rounded down to whole steps of the batches' size."""

    tokens: int
    optimizer: str
    learning_rate: float
    final_learning_rate_share: float
    warmup_share: float
    weight_decay: float
    clip_norm: float
    save_every_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did. loss in nats per token, recent_loss its running mean over about the last 20 steps; seconds since
    the run began, earlier sittings included; tokens so far, where rows are padded those of batches of the mean size.
    """

    step: int
    total_steps: int
    tokens: int
    loss: float
    recent_loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float


def distill(teacher: nn.Module, student: nn.Module, batches: RowBatches, plan: TrainPlan, *, temperature: float, folder: Path,
            on_step: Callable[[StepRecord], None]) -> StepRecord:  # fmt: skip
    """Train the student to the teacher's distribution by forward KL on logits alone (MT1, arXiv 2407.14679, §3)."""
    teacher.eval().requires_grad_(False)

    def loss(model: nn.Module, rows_BT: torch.Tensor) -> torch.Tensor:
        ids_BT, mask_BT = split_padding(rows_BT)
        with torch.no_grad():
            teacher_logits = teacher(ids_BT, use_cache=False).logits
        return forward_kl(model(ids_BT, use_cache=False).logits, teacher_logits, temperature=temperature, mask_BT=mask_BT)

    return train(student, batches, plan, loss, folder=folder, on_step=on_step)


def train(model: nn.Module, batches: RowBatches, plan: TrainPlan, loss_function: LossFunction, *, folder: Path,
          on_step: Callable[[StepRecord], None]) -> StepRecord:  # fmt: skip
    """Run the loop to its end, from the state saved in `folder` if there is one. Returns the last step's record.

    The state (weights, optimiser, position) is saved every so many seconds and when interrupted, by rename; resuming
    from it is exact. Raises ValueError for too few tokens, FloatingPointError where the loss stops being finite.
    """
    total_steps = plan.tokens // batches.tokens_per_step
    if total_steps < 1:
        raise ValueError(f"train.tokens is {plan.tokens}; it must be at least one batch, {batches.tokens_per_step} tokens")
    device = next(model.parameters()).device
    optimizers = build_optimizers(model, plan)
    record, earlier_seconds = _load_state(folder / STATE_FILE, model, optimizers)
    started = last_saved = time.monotonic()
    model.train()
    try:
        for step in range(record.step + 1 if record else 0, total_steps):
            rate = plan.learning_rate * learning_rate_share(step, total_steps, warmup_share=plan.warmup_share, final_share=plan.final_learning_rate_share)
            loss = _gradients(model, loss_function, batches.at(step).to(device), step)
            with _interrupts_wait():  # weights, optimiser, record and its line move together or not at all
                norm = _update(model, optimizers, rate, plan.clip_norm)
                seconds = earlier_seconds + time.monotonic() - started
                recent = record.recent_loss + 0.05 * (loss - record.recent_loss) if record else loss
                record = StepRecord(step, total_steps, (step + 1) * batches.tokens_per_step, loss, recent, norm, rate, seconds)
                on_step(record)
            if time.monotonic() - last_saved > plan.save_every_seconds:
                _save_state(folder / STATE_FILE, model, optimizers, record)
                last_saved = time.monotonic()
    except KeyboardInterrupt:
        if record:
            _save_state(folder / STATE_FILE, model, optimizers, record)
        raise
    model.eval()
    return record


def _gradients(model: nn.Module, loss_function: LossFunction, rows_BT: torch.Tensor, step: int) -> float:
    """Puts the loss's gradients on the parameters; returns the loss."""
    loss = loss_function(model, rows_BT)
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"loss is {value} at step {step}; the state saved before it is untouched. A lower learning rate may help")
    loss.backward()
    return value


def _update(model: nn.Module, optimizers: list[torch.optim.Optimizer], rate: float, clip_norm: float) -> float:
    """Moves the weights by their gradients; returns the gradients' norm before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm).item()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back until the block is through: one in the middle of an update would save half a step."""
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread alone
        yield
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: held.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    for number in held[:1]:
        signal.raise_signal(number)


def build_optimizers(model: nn.Module, plan: TrainPlan) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the layers' matrices and AdamW for the rest, by `plan.optimizer`.

    Muon's update is scaled to AdamW's size (match_rms_adamw), so one learning rate serves both. Weight decay falls
    on matrices only; norms, biases and Mamba's per-head vectors go without.
    """
    outside = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim == 2 and id(parameter) not in outside]
    tables = [parameter for parameter in parameters if parameter.ndim >= 2 and not any(parameter is matrix for matrix in matrices)]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    adamw_matrices = tables if plan.optimizer == "muon" else tables + matrices
    groups = [{"params": adamw_matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95))]
    if plan.optimizer == "muon" and matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=plan.learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _save_state(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], record: StepRecord) -> None:
    partial = path.with_suffix(".partial")
    fields = {name: getattr(record, name) for name in StepRecord.__slots__}
    torch.save({"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers], "record": fields}, partial)
    os.replace(partial, path)


def _load_state(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[StepRecord | None, float]:
    if not path.exists():
        return None, 0.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    record = StepRecord(**state["record"])
    return record, record.seconds
