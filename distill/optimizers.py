"""The optimisers of a model's parameters."""

import torch
from torch import nn

from distill.plan import TrainPlan


def build_optimizers(model: nn.Module, plan: TrainPlan) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the layers' matrices and AdamW for the rest, by `plan.optimizer`.

    Muon's update is scaled to AdamW's size (match_rms_adamw), so one learning rate serves both. Weight decay falls
    on matrices only; norms, biases and Mamba's per-head vectors go without.
    """
    outside = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if num_dimensions(parameter) == 2 and id(parameter) not in outside]
    tables = [parameter for parameter in parameters if num_dimensions(parameter) >= 2 and not any(parameter is matrix for matrix in matrices)]
    vectors = [parameter for parameter in parameters if num_dimensions(parameter) < 2]
    adamw_matrices = tables if plan.optimizer == "muon" else tables + matrices
    groups = [{"params": adamw_matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = parameters[0].device.type == "cuda"
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=fused or None)]
    if plan.optimizer == "muon" and matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=plan.learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def num_dimensions(parameter: torch.Tensor) -> int:
    """Dimensions of the whole parameter; ZeRO-3 leaves an empty vector in its place and its shape beside it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
