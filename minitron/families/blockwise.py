"""NemotronH's convolution, norms and activation on a CPU: forward and backward, a block of tokens at a time.

autograd would make and read a dozen tensors of the whole batch for each; here a block passes through all of them while it
lies in the processor's cache, and what the backward pass needs is computed again rather than kept. float32 throughout.

Letters: B batch, T tokens, E channels, K convolution kernel, W width, G groups of the gated norm.
"""

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

CORE_NUMBERS = 2**17  # float32 numbers of a block for every core: 256 KiB, so that the handful in use stays in its cache


def block_numbers() -> int:
    """How large a block is, in float32 numbers."""
    return CORE_NUMBERS * torch.get_num_threads()


class Buffers:
    """Float32 tensors by name and shape; a name gives the same memory again, with what was left in it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.tensors: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def __call__(self, name: str, shape: torch.Size) -> torch.Tensor:
        if (name, shape) not in self.tensors:
            self.tensors[name, shape] = torch.empty(shape, device=self.device)
        return self.tensors[name, shape]


def _blocks(tokens: int, width: int) -> Iterator[slice]:
    step = max(1, block_numbers() // width)
    return (slice(first, min(first + step, tokens)) for first in range(0, tokens, step))


class ConvSilu(torch.autograd.Function):
    """silu(depthwise causal convolution + bias) of rows [B, T, E] with weights [E, K], as K shifted multiply-adds."""

    @staticmethod
    def forward(ctx, x_BTE, weight_EK, bias_E):
        output = torch.empty(x_BTE.shape, dtype=x_BTE.dtype, device=x_BTE.device)
        buffers, taps_KE = Buffers(x_BTE.device), weight_EK.t().float().contiguous()
        for row in range(len(x_BTE)):
            for block in _blocks(*x_BTE.shape[1:]):
                total, _ = _convolved(x_BTE[row], block, taps_KE, bias_E, buffers)
                torch.ops.aten.silu.out(total, out=output[row, block])
        ctx.save_for_backward(x_BTE, weight_EK, bias_E)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x_BTE, weight_EK, bias_E = ctx.saved_tensors
        buffers, taps_KE = Buffers(x_BTE.device), weight_EK.t().float().contiguous()
        gx, g_taps, g_bias = torch.empty(x_BTE.shape, device=x_BTE.device), torch.zeros_like(taps_KE), torch.zeros_like(taps_KE[0])
        for row in range(len(x_BTE)):
            for block in _blocks(*x_BTE.shape[1:]):
                total, x = _convolved(x_BTE[row], block, taps_KE, bias_E, buffers)
                g_total = torch.ops.aten.silu_backward.grad_input(gradient[row, block].float(), total, grad_input=total)
                g_bias += g_total.sum(0)
                torch.mul(g_total, taps_KE[-1], out=gx[row, block])
                for k, taps in enumerate(taps_KE):
                    g_taps[k] += torch.mul(g_total, x[k : k + len(total)], out=buffers("products", total.shape)).sum(0)
                    back = len(taps_KE) - 1 - k  # this tap reads so many tokens before; before the first token there is nothing
                    start = max(block.start - back, 0)
                    if 0 < back and start < block.stop - back:
                        gx[row, start : block.stop - back].addcmul_(g_total[start - (block.stop - back) :], taps)
        return gx.to(x_BTE.dtype), g_taps.t().to(weight_EK.dtype), None if bias_E is None else g_bias.to(bias_E.dtype)


def _convolved(x_TE, block: slice, taps_KE, bias_E, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution's outputs for a block of t tokens, and its inputs [t + K − 1, E]: the K − 1 tokens before, or zeros, come first."""
    tokens, before = block.stop - block.start, len(taps_KE) - 1
    x, total = buffers("x", (tokens + before, x_TE.shape[1])), buffers("total", (tokens, x_TE.shape[1]))
    missing = max(0, before - block.start)
    x[:missing] = 0
    x[missing:] = x_TE[block.start + missing - before : block.stop]
    torch.mul(x[before:], taps_KE[-1], out=total)
    if bias_E is not None:
        total += bias_E
    for k in range(before):
        total.addcmul_(x[k : k + tokens], taps_KE[k])
    return total, x


class GatedNorm(torch.autograd.Function):
    """weight · RMSNorm(x · silu(gate)) of rows [T, W], each of `groups` equal runs of channels by its own mean square; gate may be None."""

    @staticmethod
    def forward(ctx, x_TW, gate_TW, weight_W, groups, epsilon):
        output, scale_TG = torch.empty_like(x_TW), x_TW.new_empty(len(x_TW), groups, 1)
        buffers, size = Buffers(x_TW.device), x_TW.shape[1] // groups
        for block in _blocks(*x_TW.shape):
            gated, _ = _gated(x_TW[block], None if gate_TW is None else gate_TW[block], buffers)
            by_group = gated.unflatten(1, (groups, size))
            mean_square = torch.linalg.vector_norm(by_group, dim=-1, keepdim=True).square_().div_(size)
            torch.rsqrt(mean_square.add_(epsilon), out=scale_TG[block])
            torch.mul(by_group, scale_TG[block], out=output[block].unflatten(1, (groups, size)))
            output[block] *= weight_W
        ctx.save_for_backward(x_TW, gate_TW, weight_W, scale_TG)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """With u = x·silu(gate) and s its scale: g_u = s·(g·w) − u·s³·mean(g·w·u)."""
        x_TW, gate_TW, weight_W, scale_TG = ctx.saved_tensors
        groups = scale_TG.shape[1]
        split = (groups, x_TW.shape[1] // groups)
        gx, g_gate, buffers = torch.empty_like(x_TW), None if gate_TW is None else torch.empty_like(gate_TW), Buffers(x_TW.device)
        g_weight = torch.zeros(next(_blocks(*x_TW.shape)).stop, *split, device=x_TW.device)
        for block in _blocks(*x_TW.shape):
            x, g, scale = x_TW[block], gradient[block], scale_TG[block]
            u, silu = _gated(x, None if gate_TW is None else gate_TW[block], buffers)
            g_u = torch.mul(g, u, out=buffers("dots", u.shape)).unflatten(1, split)
            g_weight[: len(x)].addcmul_(g_u, scale)
            mean = g_u.mul_(weight_W.view(split)).mean(-1, keepdim=True)
            g_u = torch.mul(g, weight_W, out=buffers("g_u", u.shape)) if gate_TW is not None else torch.mul(g, weight_W, out=gx[block])
            g_u.unflatten(1, split).mul_(scale).addcmul_(u.unflatten(1, split), mean.mul_(scale**3), value=-1)
            if gate_TW is not None:
                torch.mul(g_u, silu, out=gx[block])
                torch.ops.aten.silu_backward.grad_input(g_u.mul_(x), gate_TW[block], grad_input=g_gate[block])
        return gx, g_gate, g_weight.sum(0).flatten(), None, None


def _gated(x, gate, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x · silu(gate) and silu(gate); x itself without a gate."""
    if gate is None:
        return x, None
    silu = torch.ops.aten.silu.out(gate, out=buffers("silu", gate.shape))
    return torch.mul(x, silu, out=buffers("gated", x.shape)), silu


class SquaredRelu(torch.autograd.Function):
    """max(x, 0)² of rows [T, W]."""

    @staticmethod
    def forward(ctx, x_TW):
        ctx.save_for_backward(x_TW)
        output = torch.empty_like(x_TW)
        for block in _blocks(*x_TW.shape):
            positive = torch.clamp_min(x_TW[block], 0, out=output[block])
            positive *= positive
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x_TW,) = ctx.saved_tensors
        gx, zero = torch.empty_like(x_TW), x_TW.new_zeros(())
        for block in _blocks(*x_TW.shape):
            positive = torch.clamp_min(x_TW[block], 0, out=gx[block])
            torch.addcmul(zero, positive, gradient[block], value=2, out=positive)
        return gx
