"""DeepSpeed's ZeRO-2 and ZeRO-3 as engines. AdamW only: ZeRO flattens parameters into vectors, Muon needs matrices.

DeepSpeed keeps float32 weights and AdamW's two moments in flat slices. They are read and set through its own
`safe_get…`/`safe_set…` functions, one parameter at a time.
"""

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distill.engines.engine import Caller, Engine, Entry, Stored, choices_of
from distill.optimizers import build_optimizers
from distill.plan import TrainPlan

MOMENTS = ("exp_avg", "exp_avg_sq")
KEPT_WHOLE = {"stage3_param_persistence_threshold": 100_000}  # parameters of at most so many numbers stay whole in every process: DeepSpeed's own default


@cache
def load_deepspeed() -> ModuleType:
    """DeepSpeed, started and without its chatter.

    Raises ValueError where it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # it calls functions that torch has renamed
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"accelerate's distributed_type is DEEPSPEED, but deepspeed cannot be imported ({error}); pip install deepspeed") from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference on CPUs alone; each environment would compile it for a minute
    with redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(verbose=False)
    return deepspeed


class Zero(Engine):
    """Gradients and optimiser in slices (stage 2), weights too (stage 3). Of `frozen` parameters, which DeepSpeed casts, the numbers that they came with are kept.
    """

    def _wrap(self, caller: Caller) -> nn.Module:
        if self.plan.optimizer != "adamw":
            raise ValueError(f"train.optimizer is {self.plan.optimizer}; under DeepSpeed it must be adamw")
        (optimizer,) = build_optimizers(caller.model, self.plan)
        _fetch_together(caller)
        self.frozen = {name: parameter.detach().cpu().clone() for name, parameter in caller.model.named_parameters() if not parameter.requires_grad}
        with _float_buffers_kept(caller):
            self.deepspeed, *_ = load_deepspeed().initialize(model=caller, optimizer=optimizer, config=_config(self.launch.engine, self.plan))
        if self.launch.is_sharded:
            _keep_output_matrix(caller)
        self.zero = self.deepspeed.optimizer
        self.optimizers = [self.zero.optimizer]
        return self.deepspeed

    def measure(self, function: Callable[..., Any], rows_BT: torch.Tensor) -> Any:
        return self.wrapped(function, rows_BT)  # its own config says the precision

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self.deepspeed.step()

    def backward(self, loss: torch.Tensor) -> None:
        self.deepspeed.backward(loss * self.launch.world_size, scale_wrt_gas=False)

    def update(self, rate: float) -> float:
        """As every engine's, but DeepSpeed tells the norm afterwards: where that is not finite, the weights are spoilt."""
        for group in self.zero.param_groups:
            group["lr"] = rate
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm())

    def drop_gradients(self) -> None:
        self.deepspeed.zero_grad()
        self.zero.zero_grad()

    def start_phase(self, plan: TrainPlan) -> None:
        self._keep_activations(plan)
        self.plan = plan
        for state in self.zero.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def weights(self) -> list[Entry]:
        stored, utils = set(self.model.state_dict()), load_deepspeed().utils
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if name in stored}
        kept = {**self.frozen, **buffers}
        return [
            Entry(f"model.{name}", _shape(parameter), torch.float32, lambda parameter=parameter: utils.safe_get_full_fp32_param(parameter).cpu())
            for name, parameter in self.parameters.items() if name not in kept
        ] + [Entry(f"model.{name}", tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor.cpu()) for name, tensor in kept.items()]  # fmt: skip

    def optimizer_state(self) -> list[Entry]:
        if not self.zero.optimizer.state:
            return []
        self._link_moments()
        steps = torch.tensor(float(next(iter(self.zero.optimizer.state.values()))["step"]))
        entries, utils = [], load_deepspeed().utils
        for name, parameter in self.parameters.items():
            if name in self.frozen:
                continue
            entries.append(Entry(f"optimizer.{name}.step", (), torch.float32, lambda: steps))
            for key in MOMENTS:
                gather = lambda parameter=parameter, key=key: utils.safe_get_full_optimizer_state(parameter, key).cpu()  # noqa: E731
                entries.append(Entry(f"optimizer.{name}.{key}", _shape(parameter), torch.float32, gather))
        return entries

    @torch.no_grad()
    def restore(self, stored: Stored) -> None:
        name, names, read = next(iter(self.parameters)), set(stored.names()), stored.whole
        self._make_moments(read(f"optimizer.{name}.step") if f"optimizer.{name}.step" in names else torch.tensor(0.0))
        for name, parameter in self.parameters.items():
            whole = read(f"model.{name}").float()
            if name in self.frozen:
                self.frozen[name] = whole
            else:
                self._set(parameter, whole, None)
            with load_deepspeed().zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                if parameter.numel():
                    parameter.data.copy_(whole)
            for key in MOMENTS:
                if f"optimizer.{name}.{key}" in names:
                    self._set(parameter, read(f"optimizer.{name}.{key}"), key)
        for name, buffer in self.model.named_buffers():
            if f"model.{name}" in names:
                buffer.copy_(read(f"model.{name}"))

    def _make_moments(self, steps: torch.Tensor) -> None:
        """AdamW's state as its first step would make it, which DeepSpeed has not taken yet."""
        flats = self.zero.fp32_partitioned_groups_flat if self.launch.is_sharded else self.zero.single_partition_of_fp32_groups
        fused = self.zero.optimizer.defaults.get("fused")
        for flat in flats:
            step = steps.clone().to(flat.device if fused else "cpu")
            self.zero.optimizer.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        self._link_moments()

    def _link_moments(self) -> None:
        """Lets `safe_…_optimizer_state` see the moments; DeepSpeed does so once, which can be before they are there."""
        if not self.launch.is_sharded:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, whole: torch.Tensor, key: str | None) -> None:
        """Set a parameter's float32 weights, or with a key that moment, to a whole tensor."""
        whole, utils = whole.to(self.device), load_deepspeed().utils
        if self.launch.is_sharded:
            # DeepSpeed's own setter of a whole tensor fails where the number of processes does not divide its length.
            length = parameter.ds_tensor.numel()
            padded = F.pad(whole.flatten(), (0, length * self.launch.world_size - whole.numel()))
            whole = padded[length * self.launch.rank : length * (self.launch.rank + 1)]
        part = "local" if self.launch.is_sharded else "full"
        if key is None:
            getattr(utils, f"safe_set_{part}_fp32_param")(parameter, whole)
        else:
            getattr(utils, f"safe_set_{part}_optimizer_state")(parameter, whole, key)


def place_in_slices(caller: Caller) -> nn.Module:
    """A frozen model under ZeRO-3: a layer is whole only while it runs."""
    bf16 = next(caller.parameters()).dtype == torch.bfloat16
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **KEPT_WHOLE}, "bf16": {"enabled": bf16}, "steps_per_print": 2**31}
    _fetch_together(caller)
    with _float_buffers_kept(caller):
        placed, *_ = load_deepspeed().initialize(model=caller, config=config)
    _keep_output_matrix(caller)
    return placed


def _fetch_together(caller: Caller) -> None:
    """Has stage 3 fetch all experts of a layer before any is called: every process takes part in every fetch, though its tokens go to others."""
    for choices in choices_of(caller.model):
        load_deepspeed().utils.set_z3_leaf_module(choices, True)


@contextmanager
def _float_buffers_kept(caller: Caller) -> Iterator[None]:
    """DeepSpeed casts buffers with the weights; the frequencies of rotary positions must stay as exact as they are."""
    exact = {name: (buffer, buffer.clone()) for name, buffer in caller.named_buffers() if buffer.is_floating_point()}
    yield
    for name, buffer in caller.named_buffers():
        if name in exact and buffer.dtype != exact[name][1].dtype:
            buffer.data = exact[name][1].to(buffer.device)


def _keep_output_matrix(caller: Caller) -> None:
    """Have the output matrix whole throughout the caller's forward and backward: losses use it without its module."""
    load_deepspeed().zero.register_external_parameter(caller, caller.model.get_output_embeddings().weight)


def _config(engine: str, plan: TrainPlan) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,  # rows are shared out by the trainer, which marks the boundaries of accumulation itself
        "gradient_clipping": plan.clip_norm,
        "zero_optimization": {"stage": int(engine[-1]), **KEPT_WHOLE, "overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": plan.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # else micro-steps add up in bf16, where small ones vanish
        "steps_per_print": 2**31,
    }


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
