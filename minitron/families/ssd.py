"""The Mamba-2 scan (SSD) in plain torch.

transformers' reference repeats B and C for every head, forms every intermediate result for the whole batch at once and
leaves the backward pass to autograd. Here heads of a group share B and C, both passes are written out, and work goes a
chunk at a time through the same few buffers: on a CPU fresh memory, and the way to it, cost more than the arithmetic.

Letters: B batch, T tokens, L chunk length, Z chunks, M heads, G groups, R heads per group (M/G: head m is of rank m mod R
in group m // R), P head dim, N state. Blocks lie as [B, G, ·, R, P]: the heads of a group are then one matrix for its B and C.
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
STEEPEST_LOG = 60.0  # of a decay to divide by: e**60 times anything usual is far from float32's largest, e**88


CHUNK_TOKENS = 32  # more means more work inside chunks and steeper decays over them, fewer more states between them


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
        """[B, T, M] or [B, T, M, P] → [B, G, T, R] or [B, G, T, R, P]."""
        return tensor[self.rows, tokens].unflatten(2, (self.num_groups, -1))[:, :, self.groups].transpose(1, 2)

    def grouped(self, tensor, tokens):
        """[B, T, G, N] → [B, G, T, N]."""
        return tensor[self.rows, tokens, self.groups].transpose(1, 2)

    def state(self, tensor):
        """[B, M, P, N] → [B, G, N, R, P]."""
        return tensor[self.rows].unflatten(1, (self.num_groups, -1))[:, self.groups].permute(0, 1, 4, 2, 3)

    def per_head(self, vector):
        """[M] → [1, G, 1, R, 1]."""
        return vector.unflatten(0, (self.num_groups, -1))[self.groups][None, :, None, :, None]


def parts(batch: int, heads: int, head_dim: int, groups: int, state: int, device: torch.device) -> Iterator[Part]:
    """A batch as parts: several rows of all groups, or, where a row is too much, some groups of one row."""
    fitting = max(1, block_numbers(device) * groups // (heads * CHUNK_TOKENS * head_dim))  # groups of single rows
    rows, some = (fitting // groups, groups) if fitting >= groups else (1, fitting)
    for row in range(0, batch, rows):
        for group in range(0, groups, some):
            yield Part(slice(row, min(row + rows, batch)), slice(group, min(group + some, groups)), groups)


class Block:
    """A tensor [B, G, ·, R, P], and the same as one batch of matrices for products with B and C: [B·G, ·, R·P]."""

    def __init__(self, tensor):
        self.all, self.flat = tensor, tensor.view(tensor.shape[0] * tensor.shape[1], tensor.shape[2], -1)


class Sequence:
    """A part on its way through the chunks: what both passes need of dt and A, and the buffers of one chunk."""

    def __init__(self, dt_BGTR, A_1G1R1, length: int):
        self.tokens, self.length, self.shape = dt_BGTR.shape[2], length, dt_BGTR.shape[:2]
        padded = F.pad(dt_BGTR, (0, 0, 0, -self.tokens % length)).unflatten(2, (-1, length))  # no step, no decay
        cum = torch.cumsum(padded * A_1G1R1.transpose(3, 4), dim=3)
        end = cum[:, :, :, -1:]
        to_end, steep = _exp(end - cum), (end < -STEEPEST_LOG).flatten(0, 1).any(0)[:, 0]
        from_end = torch.exp((cum - end).clamp_(max=STEEPEST_LOG)).masked_fill_(steep[:, None], 0.0)
        # Of every chunk: the cumulative log decay [B, G, L, R]; [B, G, L, R, 1] each: the step, the same with the decay from there to the end, that
        # decay alone, and its inverse; the decay of a state over the chunk [B, G, 1, R, 1]; and which ranks are too steep to divide by it.
        self.cum, tokenwise = cum.unbind(2), (padded, padded * to_end, to_end, from_end)
        self.dt, self.dt_to_end, self.to_end, self.from_end = (each[..., None].unbind(2) for each in tokenwise)
        self.whole = _exp(end.clone())[..., None].unbind(2)
        self.steep = [[rank for rank, is_steep in enumerate(ranks) if is_steep] for ranks in steep.tolist()]
        self.earlier = torch.ones(length, length, device=dt_BGTR.device).tril_()  # 1 where s ≤ l
        self.blocks: dict[tuple, Block] = {}

    def chunks(self) -> list[slice]:
        """Tokens of every chunk; the last may be shorter."""
        return [slice(first, min(first + self.length, self.tokens)) for first in range(0, self.tokens, self.length)]

    def buffer(self, name: str, *shape: int) -> Block:
        """Memory [B, G, *shape], the same for the same name and shape."""
        if (name, shape) not in self.blocks:
            self.blocks[name, shape] = Block(torch.empty(*self.shape, *shape, device=self.earlier.device))
        return self.blocks[name, shape]


class Chunk:
    """Chunk `number` of a sequence: x [B, G, L, R, P] (any strides), B and C [B·G, L, N], and what both passes make of them."""

    def __init__(self, sequence: Sequence, number: int, x, B, C):
        length = x.shape[2]
        self.sequence, self.x, self.B, self.C, self.shape = sequence, x, B, C, x.shape[2:]
        parts = [each[number] for each in (sequence.cum, sequence.dt, sequence.dt_to_end, sequence.to_end, sequence.from_end)]
        if length < sequence.length:
            parts = [part[:, :, :length] for part in parts]
        self.cum, self.dt, self.dt_to_end, self.to_end, self.from_end = parts
        self.whole, self.steep = sequence.whole[number], sequence.steep[number]
        self.earlier = sequence.earlier[:length, :length]
        self.u = sequence.buffer("u", *self.shape)
        torch.mul(x, self.dt_to_end, out=self.u.all)
        self.products = torch.bmm(C, B.transpose(1, 2)).mul_(self.earlier)

    def steep_rank(self, rank: int):
        """Of the heads of a rank, as batches of matrices: x·dt [B·G, L, P], the decay from s to l [B·G, L, L] (1 above the diagonal), that from the
        start [B·G, L, 1]."""
        cum = self.cum[..., rank].flatten(0, 1)
        return (self.x[..., rank, :] * self.dt[..., rank, :]).flatten(0, 1), _decay(cum), _exp(cum.clone())[..., None]


def _decay(cum):
    """exp(c_l − c_s) for s ≤ l, and 1 above the diagonal, which the products mask: [·, L, L]."""
    return _exp(cum[..., :, None] - cum[..., None, :])


def _exp(log):
    """exp of logarithms of decays, in place. Below LOWEST_LOG exp is a hundred times slower (its results underflow) and e**-80 is nothing beside 1."""
    return log.clamp_(LOWEST_LOG, 0).exp_()


def chunk_outputs(chunk: Chunk, D, state: Block, after: Block, y) -> None:
    """Fills y [B, G, L, R, P] and the state `after` the chunk from the one before it (the same memory, perhaps); D [1, G, 1, R, 1].

    With e_l the decay from token l to the chunk's end, u = x·dt·e and h the state before it, decayed to its end: y_l = (C_l·h + Σ_{s ≤ l} C_l·B_s u_s) / e_l
    + D·x_l, and the state after it is h + Σ B_s u_s. The heads of a group thus share their products. Steep heads, whose e is too
    small to divide by, take the decay of every pair of tokens.
    """
    steep = {rank: _steep_outputs(chunk, rank, state) for rank in chunk.steep}
    inside = chunk.sequence.buffer("inside", *chunk.shape)
    torch.mul(state.all, chunk.whole, out=after.all)
    torch.bmm(chunk.C, after.flat, out=inside.flat)
    inside.flat.baddbmm_(chunk.products, chunk.u.flat)
    inside.all.mul_(chunk.from_end)
    for rank, own in steep.items():
        inside.all[..., rank, :] += own.view_as(inside.all[..., rank, :])
    torch.addcmul(inside.all, chunk.x, D, out=y)
    after.flat.baddbmm_(chunk.B.transpose(1, 2), chunk.u.flat)


def _steep_outputs(chunk: Chunk, rank: int, state: Block):
    """y without D of the heads of a rank, [B·G, L, P]."""
    xd, decay, from_start = chunk.steep_rank(rank)
    carried = torch.bmm(chunk.C, state.all[..., rank, :].flatten(0, 1)).mul_(from_start)
    return carried.baddbmm_(decay.mul_(chunk.products), xd)


def chunk_gradients(chunk: Chunk, A, D, y, gy, state, after, g_state: Block, gx, g_dt):
    """Fills gx and g_dt [B, G, L, R, P or 1] and turns the gradient of the state after the chunk into that before it.

    Returns the gradients of A and D [1, G, 1, R, 1] and of B and C [B·G, L, N]. `state` and `after` are the states before and after the chunk.

    With c the cumulative log decay: every path through exp(c_l) is y_l (without D) or the state at the chunk's end, and
    every path through exp(−c_s) is x_s·dt_s. So the gradient of c needs only Σ_p gy·y, Σ_p g(x·dt)·x·dt and, at the
    end, Σ g(state)·state.
    """
    g_out, g_u, scratch = (chunk.sequence.buffer(name, *chunk.shape) for name in ("inside", "g_u", "scratch"))
    gy_x = torch.mul(gy, chunk.x, out=scratch.all).sum(-1, keepdim=True)  # [B, G, L, R, 1], as the next two
    gy_y = torch.mul(gy, y, out=scratch.all).sum(-1, keepdim=True)
    torch.mul(gy, chunk.from_end, out=g_out.all)  # 0 of steep heads

    decayed = chunk.sequence.buffer("decayed", *after.shape[2:])
    g_end = torch.mul(g_state.all, after, out=decayed.all).sum((2, 4), keepdim=True)
    torch.mul(state, chunk.whole, out=decayed.all)
    g_products = torch.bmm(g_out.flat, chunk.u.flat.transpose(1, 2))
    steep = {rank: _steep_gradients(chunk, rank, state, gy, g_products) for rank in chunk.steep}
    g_products.mul_(chunk.earlier)
    gC = torch.bmm(g_products, chunk.B).baddbmm_(g_out.flat, decayed.flat.transpose(1, 2))
    gB = torch.bmm(g_products.transpose(1, 2), chunk.C).baddbmm_(chunk.u.flat, g_state.flat.transpose(1, 2))
    torch.bmm(chunk.products.transpose(1, 2), g_out.flat, out=g_u.flat)
    g_u.flat.baddbmm_(chunk.B, g_state.flat)
    g_state.flat.baddbmm_(chunk.C.transpose(1, 2), g_out.flat)
    g_state.all.mul_(chunk.whole)

    gxd_x = torch.mul(g_u.all, chunk.x, out=scratch.all).sum(-1, keepdim=True).mul_(chunk.to_end)
    g_u.all.mul_(chunk.dt_to_end)
    for rank, (gxd, gC_rank, g_state_rank) in steep.items():
        gxd, x = gxd.view_as(g_u.all[..., rank, :]), chunk.x[..., rank, :]
        g_u.all[..., rank, :] += gxd * chunk.dt[..., rank, :]
        gxd_x[..., rank, :] += (gxd * x).sum(-1, keepdim=True)
        gC += gC_rank
        g_state.all[..., rank, :] += g_state_rank.view_as(g_state.all[..., rank, :])
    g_log = (gy_y - D * gy_x - gxd_x * chunk.dt).flip(2).cumsum(2).flip(2) + g_end
    torch.addcmul(gxd_x, g_log, A, out=g_dt)
    torch.addcmul(g_u.all, gy, D, out=gx)
    return (g_log * chunk.dt).sum((0, 2), keepdim=True), gy_x.sum((0, 2), keepdim=True), gB, gC


def _steep_gradients(chunk: Chunk, rank: int, state, gy, g_products):
    """Of the heads of a rank, through _steep_outputs: adds to g_products [B·G, L, L] and returns the gradients of x·dt [B·G, L, P], C [B·G, L, N] and
    the state [B·G, N, P]."""
    xd, decay, from_start = chunk.steep_rank(rank)
    gy_rank, state_rank = gy[..., rank, :].flatten(0, 1), state[..., rank, :].flatten(0, 1)
    g_products += torch.bmm(gy_rank, xd.transpose(1, 2)).mul_(decay)
    gxd = torch.bmm(decay.mul_(chunk.products).transpose(1, 2), gy_rank)
    g_carried = gy_rank * from_start
    return gxd, torch.bmm(g_carried, state_rank.transpose(1, 2)), torch.bmm(chunk.C.transpose(1, 2), g_carried)


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
            sequence = Sequence(part.heads(dt), part.per_head(A), CHUNK_TOKENS)
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
            sequence = Sequence(part.heads(dt), part.per_head(A), CHUNK_TOKENS)
            g_state = Block(part.state(g_final).contiguous())
            for number, tokens in reversed(list(enumerate(sequence.chunks()))):
                chunk = Chunk(sequence, number, part.heads(x, tokens), *(_matrices(part.grouped(tensor, tokens)) for tensor in (B, C)))
                views = (part.heads(tensor, tokens) for tensor in (y, gy))
                out = part.heads(gx, tokens), part.heads(g_dt, tokens)[..., None]
                gA_part, gD_part, *g_matrices = chunk_gradients(
                    chunk, part.per_head(A), part.per_head(D), *views, states[number], states[number + 1], g_state, *out
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
