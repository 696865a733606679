"""NemotronH's convolution, norms and activation on a CPU, forward and backward, a block of tokens at a time.

autograd would make and read a dozen tensors of the whole batch for each; here a block passes through all of them while it
lies in the processor's cache, and what the backward pass needs is computed again rather than kept. float32 throughout.

Letters: B batch, T tokens, t tokens of a block, E channels, K convolution kernel, W width, G groups of the gated norm.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CORE_NUMBERS = 2**17  # float32 numbers of a block for every core: half a MiB, so that the few in use stay near it
GPU_NUMBERS = 2**27


def block_numbers(device: torch.device) -> int:
    """How large a block is, in float32 numbers. On a GPU without Mamba's kernels few large blocks are best: every operation costs a launch."""
    return CORE_NUMBERS * torch.get_num_threads() if device.type == "cpu" else GPU_NUMBERS


class Buffers:
    """Float32 tensors by name and shape; a name gives the same memory again, with what was left in it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.tensors: dict[tuple, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        if (name, shape) not in self.tensors:
            self.tensors[name, shape] = torch.empty(shape, device=self.device)
        return self.tensors[name, shape]


def _blocks(tokens: int, width: int) -> Iterator[slice]:
    step = max(1, 8 * CORE_NUMBERS * torch.get_num_threads() // width)
    return (slice(first, min(first + step, tokens)) for first in range(0, tokens, step))


# The depthwise causal convolution: oneDNN's, which is quickest where channels lie side by side, as they do here.


def convolve(x_BTE: torch.Tensor, taps_EK: torch.Tensor, bias_E: torch.Tensor) -> torch.Tensor:
    """Σ_k taps_k · x_{t − (K − 1) + k} + bias as [B, T, E], zeros before the first token."""
    weight_E11K = taps_EK[:, None, None].contiguous(memory_format=torch.channels_last)
    total_BE1S = F.conv2d(x_BTE.transpose(1, 2)[:, :, None], weight_E11K, bias_E, padding=(0, taps_EK.shape[1] - 1), groups=len(taps_EK))
    return total_BE1S[:, :, 0, : x_BTE.shape[1]].transpose(1, 2)


def convolve_back(g_BSE: torch.Tensor, x_BTE: torch.Tensor, taps_EK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of convolve's inputs [B, T, E], taps [E, K] and bias [E] from that of its outputs: contiguous, with K − 1 zeros after the last
    token (S = T + K − 1)."""
    (rows, tokens, channels), kernel = x_BTE.shape, taps_EK.shape[1]
    step = min(tokens, max(1, block_numbers(g_BSE.device) // (kernel * rows * channels)))
    g_taps_KBtE = g_BSE.new_zeros(kernel, rows, step, channels)  # by how far back the token lies; still to be summed over rows and t
    for start in range(0, tokens, step):
        block = x_BTE[:, start : start + step]
        later_KBtE = g_BSE.as_strided((kernel, *block.shape), (channels, *g_BSE.stride()), start * channels)
        g_taps_KBtE[:, :, : block.shape[1]].addcmul_(later_KBtE, block)
    weight_E11K = taps_EK.flip(1)[:, None, None].contiguous(memory_format=torch.channels_last)
    gx_BE1T = F.conv2d(g_BSE.transpose(1, 2)[:, :, None], weight_E11K, groups=channels)
    return gx_BE1T[:, :, 0].transpose(1, 2), g_taps_KBtE.sum((1, 2)).flip(0).t(), g_BSE.sum((0, 1))


def _scales(u_tGw: torch.Tensor, epsilon: torch.Tensor, out_tG: torch.Tensor) -> torch.Tensor:
    """1/√(mean of u² over a group + ε), [t, G, 1]."""
    norms_tG = torch.linalg.vector_norm(u_tGw, dim=-1)
    return torch.addcmul(epsilon, norms_tG, norms_tG, value=1 / u_tGw.shape[-1], out=out_tG).rsqrt_()[..., None]


# The gated norm: u · scale with u = x · silu(gate), group by group.


def gated_norm(x_tW, gate_tW, epsilon: torch.Tensor, out_tW, scale_tG, buffers: Buffers) -> None:
    """Fills out and the scales."""
    u_tW, split = torch.ops.aten.silu.out(gate_tW, out=buffers("gated", *gate_tW.shape)).mul_(x_tW), (*scale_tG.shape, -1)
    u_tGw = u_tW.view(split)
    torch.mul(u_tGw, _scales(u_tGw, epsilon, scale_tG), out=out_tW.view(split))


def gated_norm_back(g_tW, x_tW, gate_tW, scale_tG, gx_tW, g_gate_tW, buffers: Buffers) -> None:
    """Fills the gradients of x and the gate: that of u is s·g − u·s³·mean(g·u)."""
    silu = torch.ops.aten.silu.out(gate_tW, out=buffers("silu", *gate_tW.shape))
    u, g_u, split = torch.mul(x_tW, silu, out=buffers("gated", *x_tW.shape)), buffers("g u", *x_tW.shape), (*scale_tG.shape, -1)
    u_tGw, scale_tG1 = u.view(split), scale_tG[..., None]
    dots = torch.mul(g_tW, u, out=g_u).view(split).sum(-1, keepdim=True).mul_(scale_tG1**3)
    torch.mul(g_tW.view(split), scale_tG1, out=g_u.view(split)).addcmul_(u_tGw, dots, value=-1 / u_tGw.shape[-1])
    torch.mul(g_u, silu, out=gx_tW)
    torch.ops.aten.silu_backward.grad_input(g_u.mul_(x_tW), gate_tW, grad_input=g_gate_tW)


class Norm(torch.autograd.Function):
    """weight · RMSNorm(x) of rows [T, W]."""

    @staticmethod
    def forward(ctx, x_TW, weight_W, epsilon):
        output, scale_T1, epsilon = torch.empty_like(x_TW), x_TW.new_empty(len(x_TW), 1), x_TW.new_tensor(epsilon)
        for block in _blocks(*x_TW.shape):
            x, out = x_TW[block], output[block]
            torch.mul(x, _scales(x[:, None], epsilon, scale_T1[block])[:, 0], out=out).mul_(weight_W)
        ctx.save_for_backward(x_TW, weight_W, scale_T1)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """That of x is s·g·w − x·s³·mean(g·w·x); sums over channels and over tokens are products with vectors."""
        x_TW, weight_W, scale_T1 = ctx.saved_tensors
        gx, g_weight, buffers = torch.empty_like(x_TW), torch.zeros_like(weight_W), Buffers(x_TW.device)
        for block in _blocks(*x_TW.shape):
            x, g, scale_t1 = x_TW[block], gradient[block], scale_T1[block]
            dots = torch.mul(g, x, out=buffers("dots", *x.shape))
            g_weight.addmv_(dots.t(), scale_t1[:, 0])
            mean_t1 = torch.mv(dots, weight_W)[:, None].mul_(scale_t1**3)
            torch.mul(g, weight_W, out=gx[block]).mul_(scale_t1).addcmul_(x, mean_t1, value=-1 / x.shape[1])
        return gx, g_weight, None


class SplitProduct(torch.autograd.Function):
    """x [B, T, D] times parts of a weight [F, D], of `sizes` rows each: [B, T, F of the part], each in memory of its own."""

    @staticmethod
    def forward(ctx, x_BTD, weight_FD, sizes):
        ctx.save_for_backward(x_BTD, weight_FD)
        ctx.sizes = sizes
        return tuple(F.linear(x_BTD, part) for part in weight_FD.split(sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        x_BTD, weight_FD = ctx.saved_tensors
        x_TD, g_weight, gx_TD = x_BTD.flatten(0, 1), torch.empty_like(weight_FD), None
        for g, part, g_part in zip(gradients, weight_FD.split(ctx.sizes), g_weight.split(ctx.sizes), strict=True):
            g = g.flatten(0, 1)
            torch.mm(g.t(), x_TD, out=g_part)
            gx_TD = torch.mm(g, part) if gx_TD is None else gx_TD.addmm_(g, part)
        return gx_TD.view_as(x_BTD), g_weight, None


class FeedForward(torch.autograd.Function):
    """down · max(up · x, 0)² of rows [T, D], weights up [F, D] and down [D, F]; of what lies between, only max(up · x, 0) is kept."""

    @staticmethod
    def forward(ctx, x_TD, up_FD, down_DF, needs_gradient):
        output, neurons, buffers = x_TD.new_empty(len(x_TD), len(down_DF)), len(up_FD), Buffers(x_TD.device)
        positive_TF = x_TD.new_empty(len(x_TD), neurons) if needs_gradient else None
        for block in _blocks(len(x_TD), neurons):
            x = x_TD[block]
            active = buffers("active", len(x), neurons)
            positive = torch.mm(x, up_FD.t(), out=positive_TF[block] if needs_gradient else active).clamp_min_(0)
            torch.mm(torch.mul(positive, positive, out=active), down_DF.t(), out=output[block])
        if needs_gradient:
            ctx.save_for_backward(x_TD, up_FD, down_DF, positive_TF)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x_TD, up_FD, down_DF, positive_TF = ctx.saved_tensors
        gx, g_up, g_down, buffers, twice_down = torch.empty_like(x_TD), torch.zeros_like(up_FD), torch.zeros_like(down_DF), Buffers(x_TD.device), 2 * down_DF
        for block in _blocks(*positive_TF.shape):
            x, g, positive = x_TD[block], gradient[block], positive_TF[block]
            active = torch.mul(positive, positive, out=buffers("active", *positive.shape))
            g_down.addmm_(g.t(), active)
            g_before = torch.mm(g, twice_down, out=active).mul_(positive)
            g_up.addmm_(g_before.t(), x)
            torch.mm(g_before, up_FD, out=gx[block])
        return gx, g_up, g_down, None
