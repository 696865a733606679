"""Layers that compute in float32 from matrices that stay as they are stored."""

import pytest
import torch
from torch import nn

from minitron.checkpoints.stored_linear import AT_ONCE, StoredLinear, load_to_compute

TOKENS, INPUTS, OUTPUTS = (2, 5), 24, AT_ONCE + 40  # more than one piece


def state(dtype: torch.dtype, *, bias: bool = False, prefix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {"weight": torch.randn(OUTPUTS, INPUTS, generator=generator)} | ({"bias": torch.randn(OUTPUTS, generator=generator)} if bias else {})
    return {prefix + name: tensor.to(dtype) for name, tensor in tensors.items()}


def loaded(tensors: dict[str, torch.Tensor], *, bias: bool = False) -> nn.Module:
    with torch.device("meta"):
        module = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    return load_to_compute(module, tensors, torch.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_widened_matrix(bias):
    tensors, x = state(torch.bfloat16, bias=bias), torch.randn(*TOKENS, INPUTS)
    wanted = nn.functional.linear(x, *(tensor.float() for tensor in tensors.values()))
    found = loaded(tensors, bias=bias)(x)
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    rounded = nn.functional.linear(x.bfloat16(), *tensors.values()).float()
    assert (rounded - wanted).abs().max() > 1e-4 * wanted.abs().max(), "computing in bf16 must be seen, or the comparison says nothing"


def test_the_gradient_of_the_input_is_that_of_the_widened_matrix():
    tensors, x, g = state(torch.bfloat16), torch.randn(*TOKENS, INPUTS, requires_grad=True), torch.randn(*TOKENS, OUTPUTS)
    (found,) = torch.autograd.grad(loaded(tensors)(x), x, g)
    wanted = g @ tensors["weight"].float()
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_the_matrix_stays_as_it_is_stored_and_all_else_is_widened():
    block = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, device="meta"), nn.LayerNorm(OUTPUTS, device="meta"))
    tensors = state(torch.bfloat16, bias=True, prefix="0.") | {"1.weight": torch.ones(OUTPUTS).bfloat16(), "1.bias": torch.zeros(OUTPUTS).bfloat16()}
    load_to_compute(block, tensors, torch.float32)
    assert block[0].weight.data_ptr() == tensors["0.weight"].data_ptr()
    assert [tensor.dtype for tensor in block.state_dict().values()] == [torch.bfloat16, *[torch.float32] * 3]


def test_what_is_stored_as_it_computes_is_a_linear_layer_as_ever():
    assert type(loaded(state(torch.float32))) is nn.Linear
    assert type(loaded(state(torch.bfloat16))) is StoredLinear
