"""The Mamba-2 scan (SSD) in plain torch.

transformers' reference repeats B and C for every head, forms every intermediate result for the whole batch at once and
leaves the backward pass to autograd. Here heads of a group share B and C, both passes are written out, and work goes a
chunk at a time through the same few buffers: on a CPU fresh memory, and the way to it, cost more than the arithmetic.

Letters: B batch, T tokens, L chunk length, Z chunks, M heads, G groups, R heads per group (M/G: head m is of rank m mod R
in group m // R), P head dim, N state. Source: SSD (arXiv 2405.21060, §6, block decomposition); a chunk's work is in chunks.py.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.function import once_differentiable

from minitron.mamba import chunks


def scan(x_BTMP, dt_BTM, A_M, B_BTGN, C_BTGN, D_M=None, initial_state=None):
    """y_t = C_t·h_t + D·x_t with h_t = exp(dt_t·A)·h_{t-1} + dt_t·B_t⊗x_t, per head; float32 throughout.

    Returns (y [B, T, M, P], final state [B, M, P, N]). `dt` is final (bias added, softplus taken), `A` at most 0.
    `initial_state` is [B, M, P, N] or None for zeros. Inputs may be of lower precision and of any strides.
    """
    batch, _, heads, head_dim = x_BTMP.shape
    if initial_state is None:
        initial_state = torch.zeros(batch, heads, head_dim, B_BTGN.shape[3], device=x_BTMP.device)
    D_M = torch.zeros(heads, device=x_BTMP.device) if D_M is None else D_M.float()
    return _Scan.apply(*keeping(x_BTMP, dt_BTM.float(), A_M.float(), B_BTGN, C_BTGN, D_M, initial_state.float()))


def keeping(*inputs) -> tuple:
    """The inputs, and whether what the backward pass needs must be kept (which a Function cannot see from inside)."""
    return *inputs, torch.is_grad_enabled() and any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in inputs)


def own_precision(function: Callable) -> Callable:
    """For a Function's passes, the forward one given its input first: autocast, which would round results to bf16 too, is off.

    Where the input was bf16 and the CPU has AMX, factors of products are rounded to bf16, sums stay float32. The backward pass goes as the
    forward pass went.
    """

    @functools.wraps(function)
    def run(ctx, first, *others):
        ctx.is_bf16 = getattr(ctx, "is_bf16", first.dtype == torch.bfloat16)
        with torch.autocast(first.device.type, enabled=False), _bf16_products(ctx.is_bf16 and first.device.type == "cpu"):
            return function(ctx, first, *others)

    return run


@contextmanager
def _bf16_products(wanted: bool) -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    if wanted and torch.cpu._is_amx_tile_supported():
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class _Scan(torch.autograd.Function):
    @staticmethod
    @own_precision
    def forward(ctx, x, dt, A, B, C, D, start, needs_gradient):
        y, final, saved = torch.empty(x.shape, device=x.device), torch.empty(start.shape, device=x.device), []
        for part in chunks.parts(len(x), *x.shape[2:], *B.shape[2:], x.device):
            walk = _Walk(part, x, dt, A, B, C, D)
            states, blocks = chunks.state_blocks(part.state(start), len(walk.xs), needs_gradient)
            (ys,) = walk.sequence.split(part.heads(y))
            for number, y_chunk in enumerate(ys):
                chunks.chunk_outputs(walk.chunk(number), walk.D, blocks[number], blocks[number + 1], y_chunk)
            part.state(final).copy_(blocks[-1].all)
            saved.append(states)
        if needs_gradient:
            ctx.save_for_backward(x, dt, A, B, C, D, y, *saved)
        return y, final

    @staticmethod
    @once_differentiable
    @own_precision
    def backward(ctx, gy, g_final):
        x, dt, A, B, C, D, y, *saved = ctx.saved_tensors
        gx, g_dt, gB, gC, g_start = (torch.empty(tensor.shape, device=x.device) for tensor in (x, dt, B, C, g_final))
        gA, gD = torch.zeros_like(A), torch.zeros_like(D)
        for part, states in zip(chunks.parts(len(x), *x.shape[2:], *B.shape[2:], x.device), saved, strict=True):
            walk = _Walk(part, x, dt, A, B, C, D)
            g_state, sums = chunks.Block(part.state(g_final).contiguous()), chunks.Sums(walk.sequence)
            views = list(zip(*walk.sequence.split(*(part.heads(tensor) for tensor in (y, gy, gx))), strict=True))
            g_matrices = list(zip(*walk.sequence.split(*(part.grouped(tensor) for tensor in (gB, gC))), strict=True))
            for number in reversed(range(len(views))):
                y_chunk, gy_chunk, gx_chunk = views[number]
                g_own = chunks.chunk_gradients(
                    walk.chunk(number), walk.D, y_chunk, gy_chunk, chunks.Block(states[number]), states[number + 1], g_state, gx_chunk, sums
                )
                for view, own in zip(g_matrices[number], g_own, strict=True):
                    view.copy_(own.view(view.shape))
            chunks.add_gradients(part, sums, A, D, g_dt, gA, gD)
            part.state(g_start).copy_(g_state.all)
        return gx.to(x.dtype), g_dt, gA, gB.to(B.dtype), gC.to(C.dtype), gD, g_start, None


class _Walk:
    """A part of a scan's inputs on its way through the chunks."""

    def __init__(self, part: chunks.Part, x, dt, A, B, C, D):
        self.A, self.D = part.per_head(A), chunks.along_heads(part.per_head(D), x.shape[3])
        self.sequence = chunks.Sequence(part.heads(dt), self.A, x.shape[3])
        self.B, self.C = (_matrices(part.grouped(tensor)) for tensor in (B, C))
        (self.xs,), self.Bs_and_Cs = self.sequence.split(part.heads(x)), self.sequence.split(self.B, self.C, dim=1)

    def chunk(self, number: int) -> chunks.Chunk:
        return chunks.Chunk(self.sequence, number, self.xs[number], *(matrices[number] for matrices in self.Bs_and_Cs))


def _matrices(tensor):
    """[B, G, L, N] → [B·G, L, N] in float32."""
    return tensor.float().contiguous().flatten(0, 1)
