"""mamba-ssm's own Triton kernels on a CPU: Triton's interpreter runs them, and causal-conv1d's compiled part is replaced by its own reference in torch.

`install` comes before mamba_ssm or transformers' model is imported, in a process of its own. What it cannot show: products of bf16 (the interpreter
computes them wrongly), TF32, tiles chosen by autotuning, the order of atomic additions, and causal-conv1d's CUDA code.
"""

import contextlib
import os
import sys
import types

import torch

EIGHT = 8  # values that the compiled convolution reads at once


def install() -> None:
    """One configuration a kernel, since choosing one needs a driver; no compiled modules; the questions about the GPU that the launchers ask."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["MAMBA_DETERMINISTIC"] = "1"
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        sys.modules[name] = types.ModuleType(name)
    import causal_conv1d.causal_conv1d_interface as interface
    import causal_conv1d.cpp_functions as compiled

    for module in (interface, compiled):
        module.causal_conv1d_fwd_function = _forward
        module.causal_conv1d_bwd_function = _backward
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=4)


def _reference(x, weight, bias, seq_idx, initial_states, silu):
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    return causal_conv1d_ref(x, weight, bias, initial_states=initial_states, activation="silu" if silu else None, seq_idx=seq_idx)


def _forward(x, weight, bias, seq_idx, initial_states, final_states, silu):
    """As the compiled function: the layouts and dtypes that it asks for are asserted, and what it gives has the layout of its input."""
    channel_last = x.stride(1) == 1 and x.stride(2) > 1
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and channel_last), "seq_idx must be int32 and needs a channel-last layout"
    assert not channel_last or (x.stride(0) % EIGHT == 0 and x.stride(2) % EIGHT == 0), f"channel-last strides must be multiples of 8: {x.stride()}"
    assert not channel_last or x.shape[1] % EIGHT == 0, f"channels must be a multiple of 8: {x.shape[1]}"
    assert bias is None or bias.dtype == weight.dtype, "bias and weight must be of one dtype"
    made = _reference(x, weight, bias, seq_idx, initial_states, silu)
    return made.transpose(1, 2).contiguous().transpose(1, 2) if channel_last else made.contiguous()


def _backward(x, weight, bias, gradient, seq_idx, initial_states, final_states_gradient, x_gradient, wants_initial_states, silu):
    """Gradients of x (into `x_gradient` where that is given), weight and bias; none of a state."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    with torch.enable_grad():
        made = _reference(inputs[0], inputs[1], inputs[2] if bias is not None else None, seq_idx, None, silu)
    found = torch.autograd.grad(made, inputs, gradient)
    x_gradient = found[0] if x_gradient is None else x_gradient.copy_(found[0])
    return x_gradient, found[1], found[2] if bias is not None else None, None
