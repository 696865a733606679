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
    step = max(1, 2 * CORE_NUMBERS * torch.get_num_threads() // width)
    return (slice(first, min(first + step, tokens)) for first in range(0, tokens, step))


# The depthwise causal convolution: oneDNN's, which is quickest where channels lie side by side, as they do here.


def convolve(x_BTE: torch.Tensor, taps_EK: torch.Tensor, bias_E: torch.Tensor | None, *, ahead: bool = False) -> torch.Tensor:
    """Σ_k taps_k · x_{t − (K − 1) + k} + bias as [B, T, E], zeros before the first token; `ahead` takes x_{t + k}, zeros after the last."""
    tokens, before = x_BTE.shape[1], taps_EK.shape[1] - 1
    weight_E11K = taps_EK[:, None, None].contiguous(memory_format=torch.channels_last)
    total_BE1t = F.conv2d(x_BTE.transpose(1, 2)[:, :, None], weight_E11K, bias_E, padding=(0, before), groups=len(taps_EK))
    first = before if ahead else 0
    return total_BE1t[:, :, 0, first : first + tokens].transpose(1, 2)


def convolve_back(g_BTE: torch.Tensor, x_BTE: torch.Tensor, taps_EK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of convolve's inputs [B, T, E], taps [E, K] and bias [E] from that of its outputs."""
    (_, tokens, channels), kernel = g_BTE.shape, taps_EK.shape[1]
    step = min(tokens, max(1, block_numbers(g_BTE.device) // (kernel * channels)))
    g_taps_KtE = g_BTE.new_zeros(kernel, step, channels)  # still to be summed over t
    for g_TE, x_TE in zip(g_BTE, x_BTE, strict=True):
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            for lag, g_tap_tE in zip(reversed(range(kernel)), g_taps_KtE, strict=True):
                first = min(max(start, lag), stop)
                g_tap_tE[: stop - first].addcmul_(g_TE[first:stop], x_TE[max(0, first - lag) : max(0, stop - lag)])
    return convolve(g_BTE, taps_EK.flip(1), None, ahead=True), g_taps_KtE.sum(1).t(), g_BTE.sum((0, 1))


# RMSNorm of x · silu(gate), in groups of channels.


def normalise(x_tW, gate_tW, weight_W, epsilon: float, out_tW, scale_tG, buffers: Buffers) -> None:
    """out = weight · u · scale with u = x·silu(gate), or x without a gate, and scale = 1/√(mean of u² over a group + ε), which is filled too."""
    u_tW = x_tW if gate_tW is None else torch.ops.aten.silu.out(gate_tW, out=buffers("gated", *gate_tW.shape)).mul_(x_tW)
    u_tGw = u_tW.unflatten(-1, (scale_tG.shape[-1], -1))
    norms = torch.linalg.vector_norm(u_tGw, dim=-1)
    torch.rsqrt(norms.square_().div_(u_tGw.shape[-1]).add_(epsilon), out=scale_tG)
    scaled_tGw = torch.mul(u_tGw, scale_tG[..., None], out=buffers("scaled", *u_tGw.shape) if gate_tW is None else u_tGw)
    torch.mul(scaled_tGw.flatten(-2), weight_W, out=out_tW)


def normalise_back(g_tW, x_tW, gate_tW, weight_W, scale_tG, gx_tW, g_gate_tW, g_weight_W, buffers: Buffers) -> None:
    """Fills the gradients of x and the gate, and adds to that of the weight: g_u = s·(g·w) − u·s³·mean(g·w·u)."""
    u, silu = _gated(x_tW, gate_tW, buffers)
    split, scale = (scale_tG.shape[-1], -1), scale_tG[..., None]
    # Sums over channels and over tokens as products of matrices, [G, T, W/G] each.
    dots = torch.mul(g_tW, u, out=buffers("dots", *u.shape)).view(-1, scale_tG.shape[-1], u.shape[-1] // scale_tG.shape[-1]).transpose(0, 1)
    mean = torch.bmm(dots, weight_W.view(len(dots), -1, 1)).div_(dots.shape[-1]).transpose(0, 1).reshape(scale.shape)
    g_weight_W += torch.bmm(scale_tG.reshape(-1, 1, len(dots)).transpose(0, 2), dots).flatten()
    g_u = torch.mul(g_tW, weight_W, out=gx_tW if gate_tW is None else buffers("g u", *u.shape)).unflatten(-1, split)
    g_u.mul_(scale).addcmul_(u.unflatten(-1, split), mean.mul_(scale**3), value=-1)
    if gate_tW is not None:
        g_u = g_u.flatten(-2)
        torch.mul(g_u, silu, out=gx_tW)
        torch.ops.aten.silu_backward.grad_input(g_u.mul_(x_tW), gate_tW, grad_input=g_gate_tW)


def _gated(x, gate, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor | None]:
    if gate is None:
        return x, None
    silu = torch.ops.aten.silu.out(gate, out=buffers("silu", *gate.shape))
    return torch.mul(x, silu, out=buffers("gated", *x.shape)), silu


class Norm(torch.autograd.Function):
    """weight · RMSNorm(x) of rows [T, W]."""

    @staticmethod
    def forward(ctx, x_TW, weight_W, epsilon):
        output, scale_T1, buffers = torch.empty_like(x_TW), x_TW.new_empty(len(x_TW), 1), Buffers(x_TW.device)
        for block in _blocks(*x_TW.shape):
            normalise(x_TW[block], None, weight_W, epsilon, output[block], scale_T1[block], buffers)
        ctx.save_for_backward(x_TW, weight_W, scale_T1)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x_TW, weight_W, scale_T1 = ctx.saved_tensors
        gx, g_weight, buffers = torch.empty_like(x_TW), torch.zeros_like(weight_W), Buffers(x_TW.device)
        for block in _blocks(*x_TW.shape):
            normalise_back(gradient[block], x_TW[block], None, weight_W, scale_T1[block], gx[block], None, g_weight, buffers)
        return gx, g_weight, None


class FeedForward(torch.autograd.Function):
    """down · max(up · x, 0)² of rows [T, D], weights up [F, D] and down [D, F]; of what lies between, only that before the activation is kept."""

    @staticmethod
    def forward(ctx, x_TD, up_FD, down_DF, needs_gradient):
        output, neurons, buffers = x_TD.new_empty(len(x_TD), len(down_DF)), len(up_FD), Buffers(x_TD.device)
        before_TF = x_TD.new_empty(len(x_TD), neurons) if needs_gradient else None
        for block in _blocks(len(x_TD), neurons):
            x = x_TD[block]
            before = torch.mm(x, up_FD.t(), out=before_TF[block] if needs_gradient else buffers("active", len(x), neurons))
            active = torch.clamp_min(before, 0, out=buffers("active", len(x), neurons))
            torch.mm(active.mul_(active), down_DF.t(), out=output[block])
        if needs_gradient:
            ctx.save_for_backward(x_TD, up_FD, down_DF, before_TF)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x_TD, up_FD, down_DF, before_TF = ctx.saved_tensors
        gx, g_up, g_down, buffers = torch.empty_like(x_TD), torch.zeros_like(up_FD), torch.zeros_like(down_DF), Buffers(x_TD.device)
        for block in _blocks(*before_TF.shape):
            x, g, before = x_TD[block], gradient[block], before_TF[block]
            positive = torch.clamp_min(before, 0, out=buffers("positive", *before.shape))
            active = torch.mul(positive, positive, out=buffers("active", *before.shape))
            g_down.addmm_(g.t(), active)
            g_before = torch.mm(g, down_DF, out=active).mul_(positive.mul_(2))
            g_up.addmm_(g_before.t(), x)
            torch.mm(g_before, up_FD, out=gx[block])
        return gx, g_up, g_down, None
