"""Linear layers that compute more exactly than their matrices are stored, without a wider copy of them.

A layer of a large model that comes from disk, takes a few tokens and goes again would spend more on widening its matrices than on its products; here they
are widened some rows at a time, and each piece is multiplied while it is in the processor's cache. For few tokens the matrix stands on the left: BLAS
then takes it as it lies, 64 tokens at twice the rate.

Letters: N tokens, I inputs, O outputs.
"""

from collections.abc import Mapping

import torch
from torch import nn

AT_ONCE = 256  # rows of a matrix


class _Product(torch.autograd.Function):
    """x [N, I] times the transpose of a matrix [O, I] in x's dtype, [N, O]; the matrix has no gradient."""

    @staticmethod
    def forward(ctx, x_NI, matrix_OI):
        ctx.save_for_backward(matrix_OI)
        result_ON = x_NI.new_empty(len(matrix_OI), len(x_NI))
        for rows, result in zip(matrix_OI.split(AT_ONCE), result_ON.split(AT_ONCE), strict=True):
            torch.mm(rows.to(x_NI.dtype), x_NI.T, out=result)
        return result_ON.T.contiguous()

    @staticmethod
    def backward(ctx, gradient_NO):
        (matrix_OI,) = ctx.saved_tensors
        total_NI = gradient_NO.new_zeros(len(gradient_NO), matrix_OI.shape[1])
        for rows, gradient in zip(matrix_OI.split(AT_ONCE), gradient_NO.split(AT_ONCE, 1), strict=True):
            total_NI.addmm_(gradient, rows.to(gradient.dtype))
        return total_NI, None


class StoredLinear(nn.Linear):
    """nn.Linear in the dtype of its input, whatever that of its matrix, which is not trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        result = _Product.apply(x.reshape(-1, self.in_features), self.weight).view(*x.shape[:-1], -1)
        return result if self.bias is None else result + self.bias.to(x.dtype)


def load_to_compute(module: nn.Module, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """Gives a module built without memory (on the meta device) these tensors, to compute in a floating point dtype, in eval mode and without gradients.

    Matrices of linear layers stay as they are stored where that is narrower; buffers become float32, all other floating point tensors `dtype`. A tensor that
    `state` lacks stays without memory.
    """
    linears = {f"{name}.weight".lstrip("."): part for name, part in module.named_modules() if type(part) is nn.Linear and f"{name}.weight".lstrip(".") in state}
    buffers = {name for name, _ in module.named_buffers()}
    narrow = {name: part for name, part in linears.items() if state[name].itemsize < dtype.itemsize}
    for part in narrow.values():
        part.__class__ = StoredLinear  # the same parameters; only its product is another
    widened = {name: tensor.to(torch.float32 if name in buffers else dtype) if tensor.is_floating_point() and name not in narrow else tensor
               for name, tensor in state.items()}  # fmt: skip
    module.load_state_dict(widened, assign=True, strict=len(state) == len(module.state_dict()))
    return module.eval().requires_grad_(False)
