"""Muon in float32: torch's own step but for the rounding of its products."""

import pytest
import torch

from distill.optimizers import Float32Muon

SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
SHAPES = ((12, 40), (40, 12), (16, 16))


def after_steps(optimizer_class: type[torch.optim.Optimizer], steps: int = 3, **settings) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters and momenta."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = optimizer_class(parameters, **SETTINGS | settings)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters], [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]


def differences(ones: list[torch.Tensor], others: list[torch.Tensor]) -> list[float]:
    return [(one - other).abs().max().item() for one, other in zip(ones, others, strict=True)]


@pytest.mark.parametrize("settings", [{}, {"nesterov": False}, {"momentum": 0.5, "weight_decay": 0.0}])
def test_a_step_is_torchs_where_torch_is_made_to_multiply_in_float32(settings, monkeypatch):
    rounded, _ = after_steps(torch.optim.Muon, **settings)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    wanted, momenta = after_steps(torch.optim.Muon, **settings)
    found, found_momenta = after_steps(Float32Muon, **settings)
    assert max(differences(found, wanted)) <= 1e-6
    assert max(differences(found_momenta, momenta)) == 0
    assert min(differences(rounded, wanted)) > 1e-5, "bf16 must be seen, or the first comparison says nothing"


def test_a_state_of_torchs_goes_on(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    ours, theirs = Float32Muon(parameters, **SETTINGS), torch.optim.Muon(parameters, **SETTINGS)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    assert differences([ours.state[parameter]["momentum_buffer"] for parameter in parameters], [0.05 * parameter.grad for parameter in parameters]) == [0, 0, 0]


def test_a_closure_is_asked_for_its_loss_with_gradients():
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = Float32Muon([parameter], **SETTINGS)

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 24
    assert (parameter != 1).all()
