"""The Mamba-2 scan (SSD) in plain torch.

transformers' reference repeats B and C for every head, forms every intermediate result for the whole batch at once and
leaves the backward pass to autograd. Here heads of a group share B and C, both passes are written out, and work goes a
chunk at a time through the same few buffers: on a CPU fresh memory, and the way to it, cost more than the arithmetic.

Letters: B batch, T tokens, L chunk length, Z chunks, M heads, G groups, R heads per group (M/G: head m is number m mod R
of group m // R), P head dim, N state. Blocks lie as [R, B, G, …]: B and C of a group then serve R products without a copy.
Source: SSD (arXiv 2405.21060, §6, block decomposition); the backward pass is derived in `chunk_gradients`.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from minitron.families.blockwise import block_numbers

LOWEST_LOG = -80.0


def chunk_tokens(head_dim: int, state: int) -> int:
    """Tokens per chunk. Work inside a chunk grows with its length; states, of P·N numbers a head, get fewer."""
    return 32 if head_dim * state < 4096 else 64


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


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows and groups of a batch, whose chunks are of the size that suits the cache, and the ways to them (views)."""

    rows: slice
    groups: slice
    num_groups: int

    def heads(self, tensor, tokens=slice(None)):
        """[B, T, M] or [B, T, M, P] → [R, B, G, T] or [R, B, G, T, P]."""
        block = tensor[self.rows, tokens]
        return heads_first(block.view(*block.shape[:2], self.num_groups, -1, *block.shape[3:])[:, :, self.groups])

    def grouped(self, tensor, tokens):
        """[B, T, G, N] → [B, G, T, N]."""
        return tensor[self.rows, tokens, self.groups].transpose(1, 2)

    def state(self, tensor):
        """[B, M, P, N] → [R, B, G, N, P]."""
        return tensor[self.rows].unflatten(1, (self.num_groups, -1))[:, self.groups].permute(2, 0, 1, 4, 3)

    def per_head(self, vector):
        """[M] → [R, 1, G, 1, 1]."""
        return vector.unflatten(0, (self.num_groups, -1))[self.groups].t()[:, None, :, None, None]


def heads_first(tensor):
    """[B, T, G, R] or [B, T, G, R, P] → [R, B, G, T] or [R, B, G, T, P]."""
    return tensor.permute(3, 0, 2, 1, *range(4, tensor.ndim))


def parts(batch: int, heads: int, head_dim: int, groups: int, state: int, device: torch.device) -> Iterator[Part]:
    """A batch as parts: several rows of all groups, or, where a row is too much, some groups of one row."""
    length = chunk_tokens(head_dim, state)
    fitting = max(1, block_numbers(device) * groups // (heads * length * max(head_dim, length)))  # groups of single rows
    rows, some = (fitting // groups, groups) if fitting >= groups else (1, fitting)
    for row in range(0, batch, rows):
        for group in range(0, groups, some):
            yield Part(slice(row, min(row + rows, batch)), slice(group, min(group + some, groups)), groups)


class Block:
    """A tensor [R, B, G, ·, ·], the same as one batch of matrices [R·B·G, ·, ·], and as R batches [B·G, ·, ·] for products with B and C."""

    def __init__(self, tensor):
        heads, batch, groups, *matrix = tensor.shape
        self.all, self.flat = tensor, tensor.view(heads * batch * groups, *matrix)
        self.each = tensor.view(heads, batch * groups, *matrix).unbind(0)


class Sequence:
    """A part on its way through the chunks: what both passes need of dt and A, and the buffers of one chunk."""

    def __init__(self, dt_RBGT, A_R1G11, length: int):
        self.tokens, self.length, self.shape = dt_RBGT.shape[3], length, dt_RBGT.shape[:3]
        padded = F.pad(dt_RBGT, (0, -self.tokens % length)).unflatten(-1, (-1, length))  # no step, no decay
        cum = torch.cumsum(padded * A_R1G11, dim=-1)
        from_start, to_end = (_exp(log)[..., None] for log in (cum.clone(), cum[..., -1:] - cum))
        # Of every chunk: [R, B, G, L, 1], the cumulative log decay [R, B, G, L], and the decay of a state over it [R, B, G, 1, 1].
        self.dt, self.from_start, self.to_end, self.cum = (each.unbind(3) for each in (padded[..., None], from_start, to_end, cum))
        self.whole = from_start[..., -1:, :].unbind(3)
        self.earlier = torch.ones(length, length, device=dt_RBGT.device).tril_()  # 1 where s ≤ l
        self.blocks: dict[tuple, Block] = {}

    def chunks(self) -> list[slice]:
        """Tokens of every chunk; the last may be shorter."""
        return [slice(first, min(first + self.length, self.tokens)) for first in range(0, self.tokens, self.length)]

    def buffer(self, name: str, *shape: int) -> Block:
        """Memory [R, B, G, *shape], the same for the same name and shape."""
        if (name, shape) not in self.blocks:
            self.blocks[name, shape] = Block(torch.empty(*self.shape, *shape, device=self.earlier.device))
        return self.blocks[name, shape]


class Chunk:
    """Chunk `number` of a sequence: x [R, B, G, L, P] (any strides), B and C [B·G, L, N], and what both passes make of them."""

    def __init__(self, sequence: Sequence, number: int, x, B, C):
        length = x.shape[3]
        self.sequence, self.x, self.B, self.C, self.shape = sequence, x, B, C, x.shape[3:]
        parts = [each[number] for each in (sequence.dt, sequence.from_start, sequence.to_end, sequence.cum)]
        if length < sequence.length:
            parts = [part[:, :, :, :length] for part in parts]
        self.dt, self.from_start, self.to_end, cum = parts
        self.whole = sequence.whole[number]
        self.earlier = sequence.earlier[:length, :length]
        self.xd, self.decay = sequence.buffer("xd", *self.shape), sequence.buffer("decay", length, length)
        torch.mul(x, self.dt, out=self.xd.all)
        _decay(cum, self.decay.all)
        self.products = torch.bmm(C, B.transpose(1, 2)).mul_(self.earlier)

    def weights(self) -> Block:
        """W with y = W·xd inside the chunk; it takes the decay's place."""
        self.decay.all.mul_(self.products.view(self.decay.all.shape[1:]))
        return self.decay


def _decay(cum, out):
    """exp(c_l − c_s) for s ≤ l, and 1 above the diagonal, which the products mask: [R, B, G, L, L]."""
    return _exp(torch.sub(cum[..., :, None], cum[..., None, :], out=out))


def _exp(log):
    """exp of logarithms of decays, in place. Below LOWEST_LOG exp is a hundred times slower (its results underflow) and e**-80 is nothing beside 1."""
    return log.clamp_(LOWEST_LOG, 0).exp_()


def chunk_outputs(chunk: Chunk, D, state: Block, after: Block, y) -> None:
    """Fills y [R, B, G, L, P] and the state `after` the chunk from the one before it; D [R, 1, G, 1, 1]."""
    inside, carried = (chunk.sequence.buffer(name, *chunk.shape) for name in ("inside", "carried"))
    torch.bmm(chunk.weights().flat, chunk.xd.flat, out=inside.flat)
    for h, out in zip(state.each, carried.each, strict=True):
        torch.bmm(chunk.C, h, out=out)
    inside.all.addcmul_(carried.all, chunk.from_start)
    torch.addcmul(inside.all, chunk.x, D, out=y)
    chunk.xd.all.mul_(chunk.to_end)
    torch.mul(state.all, chunk.whole, out=after.all)
    for xd, out in zip(chunk.xd.each, after.each, strict=True):
        out.baddbmm_(chunk.B.transpose(1, 2), xd)


def chunk_gradients(chunk: Chunk, A, D, y, gy, state: Block, after, g_state: Block, gx, g_dt):
    """Fills gx and g_dt [R, B, G, L, P or 1] and turns the gradient of the state after the chunk into that before it.

    Returns the gradients of A and D [R, 1, G, 1, 1] and of B and C [B·G, L, N].

    With c the cumulative log decay: every path through exp(c_l) is y_l (without D) or the state at the chunk's end, and
    every path through exp(−c_s) is x_s·dt_s. So the gradient of c needs only Σ_p gy·y, Σ_p g(x·dt)·x·dt and, at the
    end, Σ g(state)·state.
    """
    gy_block, gxd, scratch = (chunk.sequence.buffer(name, *chunk.shape) for name in ("inside", "gxd", "carried"))
    gy_x = torch.mul(gy, chunk.x, out=scratch.all).sum(-1, keepdim=True)  # [R, B, G, L, 1], as the next two
    gy_y = torch.mul(gy, y, out=scratch.all).sum(-1, keepdim=True)
    gy_block.all.copy_(gy)

    # Inside the chunk: y = W·xd with W = products ∘ decay.
    g_weights = chunk.sequence.buffer("g_weights", *chunk.decay.all.shape[3:])
    torch.bmm(gy_block.flat, chunk.xd.flat.transpose(1, 2), out=g_weights.flat)
    g_products = g_weights.all.mul_(chunk.decay.all).sum(0).flatten(0, 1).mul_(chunk.earlier)
    torch.bmm(chunk.weights().flat.transpose(1, 2), gy_block.flat, out=gxd.flat)
    gB, gC = torch.bmm(g_products.transpose(1, 2), chunk.C), torch.bmm(g_products, chunk.B)

    # Through the states at the chunk's start (y = exp(c)·C·h) and at its end (h ← exp(c_end)·h + Bᵀ·xd·exp(c_end − c)).
    gy_block.all.mul_(chunk.from_start)
    for g, out in zip(g_state.each, scratch.each, strict=True):
        torch.bmm(chunk.B, g, out=out)
    gxd.all.addcmul_(scratch.all, chunk.to_end)
    chunk.xd.all.mul_(chunk.to_end)
    for gy_r, xd_r, h, g in zip(gy_block.each, chunk.xd.each, state.each, g_state.each, strict=True):
        gC.baddbmm_(gy_r, h.transpose(1, 2))
        gB.baddbmm_(xd_r, g.transpose(1, 2))
    g_end = torch.mul(g_state.all, after, out=chunk.sequence.buffer("states", *after.shape[3:]).all).sum((3, 4), keepdim=True)
    g_state.all.mul_(chunk.whole)
    for gy_r, g in zip(gy_block.each, g_state.each, strict=True):
        g.baddbmm_(chunk.C.transpose(1, 2), gy_r)

    gxd_x = torch.mul(gxd.all, chunk.x, out=scratch.all).sum(-1, keepdim=True)
    g_log = (gy_y - D * gy_x - gxd_x * chunk.dt).flip(3).cumsum(3).flip(3) + g_end
    torch.addcmul(gxd_x, g_log, A, out=g_dt)
    torch.addcmul(gxd.all.mul_(chunk.dt), gy, D, out=gx)
    return (g_log * chunk.dt).sum((1, 3), keepdim=True), gy_x.sum((1, 3), keepdim=True), gB, gC


def state_blocks(start, num_chunks: int, needs_gradient: bool) -> tuple[torch.Tensor, list[Block]]:
    """Room for the state before every chunk and after the last, the first filled; without gradients one place serves for all."""
    states = torch.empty((num_chunks + 1 if needs_gradient else 1, *start.shape), device=start.device)
    states[0] = start
    blocks = [Block(state) for state in states]
    return states, blocks if needs_gradient else blocks * (num_chunks + 1)


class _Scan(torch.autograd.Function):
    @staticmethod
    @own_precision
    def forward(ctx, x, dt, A, B, C, D, start, needs_gradient):
        y, final, saved = torch.empty(x.shape, device=x.device), torch.empty(start.shape, device=x.device), []
        for part in parts(len(x), *x.shape[2:], *B.shape[2:], x.device):
            sequence = Sequence(part.heads(dt), part.per_head(A), chunk_tokens(x.shape[3], B.shape[3]))
            states, blocks = state_blocks(part.state(start), len(sequence.chunks()), needs_gradient)
            for number, tokens in enumerate(sequence.chunks()):
                chunk = Chunk(sequence, number, part.heads(x, tokens), *(_matrices(part.grouped(tensor, tokens)) for tensor in (B, C)))
                chunk_outputs(chunk, part.per_head(D), blocks[number], blocks[number + 1], part.heads(y, tokens))
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
        for part, states in zip(parts(len(x), *x.shape[2:], *B.shape[2:], x.device), saved, strict=True):
            sequence = Sequence(part.heads(dt), part.per_head(A), chunk_tokens(x.shape[3], B.shape[3]))
            g_state = Block(part.state(g_final).contiguous())
            for number, tokens in reversed(list(enumerate(sequence.chunks()))):
                chunk = Chunk(sequence, number, part.heads(x, tokens), *(_matrices(part.grouped(tensor, tokens)) for tensor in (B, C)))
                views = (part.heads(tensor, tokens) for tensor in (y, gy))
                out = part.heads(gx, tokens), part.heads(g_dt, tokens)[..., None]
                gA_part, gD_part, *g_matrices = chunk_gradients(
                    chunk, part.per_head(A), part.per_head(D), *views, Block(states[number]), states[number + 1], g_state, *out
                )
                part.per_head(gA).add_(gA_part)
                part.per_head(gD).add_(gD_part)
                for gradient, own in zip((gB, gC), g_matrices, strict=True):
                    view = part.grouped(gradient, tokens)
                    view.copy_(own.view(view.shape))
            part.state(g_start).copy_(g_state.all)
        return gx.to(x.dtype), g_dt, gA, gB.to(B.dtype), gC.to(C.dtype), gD, g_start, None


def _matrices(tensor):
    """[B, G, L, N] → [B·G, L, N] in float32."""
    return tensor.float().contiguous().flatten(0, 1)


def install() -> None:
    """Put our functions for a CPU in the place of transformers' NemotronH's, in this process from here on: the one place where that happens."""
    from minitron.families.mixer import replacements  # which is built of this module

    for owner, name, function in replacements():
        setattr(owner, name, function)
