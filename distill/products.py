"""Products of matrices whose results are float32 whatever the matrices are: logits rounded to bf16 are too coarse to compare.

N tokens, V vocabulary, D hidden.
"""

import torch

# A product as small as this some BLAS kernels (MKL's for AVX2) add up term after term: over a vocabulary of 140,000 that is 1e-5 off. So many terms at a time.
SMALL_VALUES, TERMS = 2**12, 512


def as_head_takes(hidden: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Hidden states as transformers hands them to an output matrix: rounded to its dtype where they are wider, as those of a float32 residual stream are."""
    return hidden.to(weight_VD.dtype) if hidden.itemsize > weight_VD.itemsize else hidden


def logits_of(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Float32 logits [N, V]: on a GPU summed and kept in float32; on a CPU, which has no such product of bf16 matrices, as its own product gives them."""
    hidden_ND = as_head_takes(hidden_ND, weight_VD)
    if hidden_ND.device.type != "cuda" or hidden_ND.dtype == torch.float32:
        return (hidden_ND @ weight_VD.t()).float()
    return torch.mm(hidden_ND, weight_VD.t(), out_dtype=torch.float32)


def operands(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two in the dtype that they are multiplied in: the hidden state's on a GPU, whose products sum in float32, else float32."""
    dtype = hidden_ND.dtype if hidden_ND.device.type == "cuda" else torch.float32
    return hidden_ND.to(dtype), weight_VD.to(dtype)


def multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """out = left · right in float32, without rounding to the operands' dtype."""
    if left.dtype != out.dtype:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif out.numel() <= SMALL_VALUES and left.shape[1] > TERMS:
        out.zero_()
        for some_left, some_right in zip(left.split(TERMS, 1), right.split(TERMS), strict=True):
            out += some_left @ some_right
    else:
        torch.mm(left, right, out=out)


def multiply_add(left: torch.Tensor, right: torch.Tensor, total: torch.Tensor) -> None:
    """total += left · right, in float32 as well."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
