"""The optimisers of a model's parameters."""

import math

import torch
from torch import nn

from distill.plan import TrainPlan

BETAS = (0.9, 0.95)


def build_optimizers(model: nn.Module, plan: TrainPlan) -> list[torch.optim.Optimizer]:
    """AdamW for everything, the same with 8-bit moments, or Muon for the layers' matrices and AdamW for the rest, by `plan.optimizer`.

    Muon's update is scaled to AdamW's size (match_rms_adamw), so one learning rate serves both. Weight decay falls
    on matrices only; norms, biases and Mamba's per-head vectors go without.
    """
    outside = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if num_dimensions(parameter) == 2 and id(parameter) not in outside]
    are_matrices = {id(parameter) for parameter in matrices}
    tables = [parameter for parameter in parameters if num_dimensions(parameter) >= 2 and id(parameter) not in are_matrices]
    vectors = [parameter for parameter in parameters if num_dimensions(parameter) < 2]
    adamw_matrices = tables if plan.optimizer == "muon" else tables + matrices
    groups = [{"params": adamw_matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if plan.optimizer == "adamw_8bit":
        return [_eight_bit()(groups, lr=plan.learning_rate, betas=BETAS)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=plan.learning_rate, betas=BETAS, fused=True)]
    if plan.optimizer == "muon" and matrices:
        muon = torch.optim.Muon if multiplies_bf16(parameters[0].device) else Float32Muon
        optimizers.append(muon(matrices, lr=plan.learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products of bf16 matrices are quick there: on GPUs, and on processors with AMX. AVX-512's instructions for bf16 make an update orthogonal in 1.8
    (1,024 × 2,048) to 3.6 times (64 × 128) the time that float32 takes."""
    return device.type != "cpu" or torch.cpu.get_capabilities().get("amx_bf16", False)


class Float32Muon(torch.optim.Muon):
    """Muon with adjust_lr_fn "match_rms_adamw", its updates made orthogonal in float32, with the same state.

    torch does that in bf16 whatever the parameters are, and on a processor without quick bf16 products it then is most of a small model's step.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One step; gives the closure's loss."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = _orthogonal(self._momentum(parameter, group), group)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-0.2 * math.sqrt(max(parameter.shape)) * group["lr"])
        return loss

    def _momentum(self, parameter: torch.Tensor, group: dict) -> torch.Tensor:
        state, gradient = self.state[parameter], parameter.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(mean, group["momentum"]) if group["nesterov"] else mean


def _orthogonal(matrix: torch.Tensor, group: dict) -> torch.Tensor:
    """The matrix with its singular values brought near 1, by Newton-Schulz iterations of the fifth order: X ← a·X + (b·G + c·G²)·X with G = XXᵀ."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    factor, gram_factor, square_factor = group["ns_coefficients"]
    found = wide.float() / wide.float().norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=gram_factor, alpha=square_factor), found, beta=factor)
    return found.T if wide is not matrix else found


def _eight_bit() -> type[torch.optim.Optimizer]:
    """bitsandbytes' AdamW: moments of tensors of 4,096 numbers and more in 8 bits, scaled block by block (arXiv 2110.02861)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(f"train.optimizer is adamw_8bit, which needs bitsandbytes ({error}): pip install 'minitron[eight-bit]'") from None
    return AdamW8bit


def num_dimensions(parameter: torch.Tensor) -> int:
    """Dimensions of the whole parameter; ZeRO-3 leaves an empty vector in its place and its shape beside it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
