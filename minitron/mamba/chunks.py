"""One chunk of a Mamba-2 scan, forward and backward, and how a batch is taken apart into chunks.

Letters as in ssd.py. Blocks lie as [B, G, ·, R, P]: the heads of a group are then one matrix for its B and C.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minitron.mamba.block_sizes import SCAN_TOKENS
from minitron.mamba.blockwise import block_numbers

LOWEST_LOG = -80.0
STEEPEST_LOG = 60.0  # of a decay to divide by: e**60 times anything usual is far from float32's largest, e**88


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows and groups of a batch, whose chunks are of the size that suits the cache, and the ways to them (views)."""

    rows: slice
    groups: slice
    num_groups: int

    def heads(self, tensor):
        """[B, T, M] or [B, T, M, P] → [B, G, T, R] or [B, G, T, R, P]."""
        return tensor[self.rows].unflatten(2, (self.num_groups, -1))[:, :, self.groups].transpose(1, 2)

    def grouped(self, tensor):
        """[B, T, G, N] → [B, G, T, N]."""
        return tensor[self.rows, :, self.groups].transpose(1, 2)

    def state(self, tensor):
        """[B, M, P, N] → [B, G, N, R, P]."""
        return tensor[self.rows].unflatten(1, (self.num_groups, -1))[:, self.groups].permute(0, 1, 4, 2, 3)

    def per_head(self, vector):
        """[M] → [1, G, 1, R, 1]."""
        return vector.unflatten(0, (self.num_groups, -1))[self.groups][None, :, None, :, None]


def parts(batch: int, heads: int, head_dim: int, groups: int, state: int, device: torch.device) -> Iterator[Part]:
    """A batch as parts: several rows of all groups, or, where a row is too much, some groups of one row."""
    fitting = max(1, block_numbers(device) * groups // (heads * SCAN_TOKENS * head_dim))  # groups of single rows
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

    def __init__(self, dt_BGTR, A_1G1R1, head_dim: int):
        self.tokens, self.length, self.shape = dt_BGTR.shape[2], (length := SCAN_TOKENS), dt_BGTR.shape[:2]
        self.padded = padded = F.pad(dt_BGTR, (0, 0, 0, -self.tokens % length)).unflatten(2, (-1, length))  # no step, no decay
        cum = torch.cumsum(padded * A_1G1R1.transpose(3, 4), dim=3)
        end = cum[:, :, :, -1:]
        to_end, steep = _exp(end - cum), (end < -STEEPEST_LOG).flatten(0, 1).any(0)[:, 0]
        from_end = torch.exp((cum - end).clamp_(max=STEEPEST_LOG)).masked_fill_(steep[:, None], 0.0)
        # Of every chunk: the cumulative log decay [B, G, L, R]; [B, G, L, R, 1] each: the step, the same with the decay from there to the end, that
        # decay alone, and its inverse; the decay of a state over the chunk [B, G, 1, R, P]; and which ranks are too steep to divide by it.
        self.cum, tokenwise = cum.unbind(2), (padded, padded * to_end, to_end, from_end)
        self.dt, self.dt_to_end, self.to_end, self.from_end = (each[..., None].unbind(2) for each in tokenwise)
        self.whole = _exp(end.clone())[..., None].expand(*[-1] * 5, head_dim).contiguous().unbind(2)
        self.steep = [[rank for rank, is_steep in enumerate(ranks) if is_steep] for ranks in steep.tolist()]
        self.earlier = torch.ones(length, length, device=dt_BGTR.device).tril_()  # 1 where s ≤ l
        self.blocks: dict[tuple, Block] = {}

    def split(self, *tensors, dim: int = 2):
        """Every tensor's views of the chunks, tokens along `dim`; the last may be shorter."""
        return [tensor.split(self.length, dim) for tensor in tensors]

    def buffer(self, name: str, *shape: int) -> Block:
        """Memory [B, G, *shape], the same for the same name and shape."""
        if (name, shape) not in self.blocks:
            self.blocks[name, shape] = Block(torch.empty(*self.shape, *shape, device=self.earlier.device))
        return self.blocks[name, shape]


class Chunk:
    """Chunk `number` of a sequence: x [B, G, L, R, P] (any strides), B and C [B·G, L, N], and what both passes make of them."""

    def __init__(self, sequence: Sequence, number: int, x, B, C):
        length = x.shape[2]
        self.sequence, self.number, self.x, self.B, self.C, self.shape = sequence, number, x, B, C, x.shape[2:]
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
    """Fills y [B, G, L, R, P] and the state `after` the chunk from the one before it (the same memory, perhaps); D [1, G, 1, R, P].

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


class Sums:
    """What the gradients of dt, A and D are made of: sums over P of gy·x, gy·y and, x·dt being xd, of g_xd·x, [B, G, Z, L, R] each; and, h being the
    state after a chunk, Σ g·h, [B, G, Z, R]."""

    def __init__(self, sequence: Sequence):
        self.sequence, dt = sequence, sequence.padded
        self.by_token, self.at_end = dt.new_zeros(3, *dt.shape), dt.new_empty(*dt.shape[:3], dt.shape[4])

    def chunk(self, number: int, length: int):
        """A chunk's gy·x, gy·y and g_xd·x, [B, G, L, R], and Σ g·h, [B, G, R], to fill."""
        return *self.by_token[:, :, :, number, :length], self.at_end[:, :, number]

    def gradients(self, A, D):
        """Of dt [B, G, T, R], A and D [1, G, 1, R, 1] as they are.

        With c the cumulative log decay, every path through exp(c_l) is y_l (without D) or the state at the chunk's end, and every path through
        exp(−c_s) is xd_s. So the gradient of c needs only these sums.
        """
        (gy_x, gy_y, gxd_x), A, D = self.by_token, A.transpose(3, 4), D.transpose(3, 4)
        g_log = (gy_y - D * gy_x - gxd_x * self.sequence.padded).flip(3).cumsum(3).flip(3).add_(self.at_end[:, :, :, None])
        g_dt = torch.addcmul(gxd_x, g_log, A).flatten(2, 3)[:, :, : self.sequence.tokens]
        gA, gD = (terms.sum((0, 2, 3))[None, :, None, :, None] for terms in (g_log * self.sequence.padded, gy_x))
        return g_dt, gA, gD


def chunk_gradients(chunk: Chunk, D, y, gy, state: Block, after, g_state: Block, gx, sums: Sums):
    """Fills gx [B, G, L, R, P] and the chunk's sums, and turns the gradient of the state after the chunk into that before it.

    Returns those of B and C [B·G, L, N]. D [1, G, 1, R, P]; y and gy lie as gx; `state` and `after` are the states before and after the chunk.
    """
    g_out, g_u, scratch = (chunk.sequence.buffer(name, *chunk.shape) for name in ("inside", "g_u", "scratch"))
    gy_x, gy_y, gxd_x, at_end = sums.chunk(chunk.number, chunk.shape[0])
    torch.sum(torch.mul(g_state.all, after, out=chunk.sequence.buffer("ends", *after.shape[2:]).all), (2, 4), out=at_end)
    torch.sum(torch.mul(gy, chunk.x, out=scratch.all), -1, out=gy_x)
    torch.sum(torch.mul(gy, y, out=scratch.all), -1, out=gy_y)
    torch.mul(gy, chunk.from_end, out=g_out.all)  # 0 of steep heads

    g_products = torch.bmm(g_out.flat, chunk.u.flat.transpose(1, 2))
    steep = {rank: _steep_gradients(chunk, rank, state.all, gy, g_products) for rank in chunk.steep}
    g_products.mul_(chunk.earlier)
    torch.mul(g_out.all, chunk.whole, out=scratch.all)
    gC = torch.bmm(g_products, chunk.B).baddbmm_(scratch.flat, state.flat.transpose(1, 2))
    gB = torch.bmm(g_products.transpose(1, 2), chunk.C).baddbmm_(chunk.u.flat, g_state.flat.transpose(1, 2))
    torch.bmm(chunk.products.transpose(1, 2), g_out.flat, out=g_u.flat).baddbmm_(chunk.B, g_state.flat)
    g_state.flat.baddbmm_(chunk.C.transpose(1, 2), g_out.flat)
    g_state.all.mul_(chunk.whole)

    torch.sum(torch.mul(g_u.all, chunk.x, out=scratch.all), -1, out=gxd_x).mul_(chunk.to_end[..., 0])
    g_u.all.mul_(chunk.dt_to_end)
    for rank, (gxd, gC_rank, g_state_rank) in steep.items():
        gxd, x = gxd.view_as(g_u.all[..., rank, :]), chunk.x[..., rank, :]
        g_u.all[..., rank, :] += gxd * chunk.dt[..., rank, :]
        gxd_x[..., rank] += (gxd * x).sum(-1)
        gC += gC_rank
        g_state.all[..., rank, :] += g_state_rank.view_as(g_state.all[..., rank, :])
    torch.addcmul(g_u.all, gy, D, out=gx)
    return gB, gC


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


def add_gradients(part: Part, sums: Sums, A, D, g_dt, gA, gD) -> None:
    """A part's, to those of dt [B, T, M], A and D [M]."""
    of_dt, *of_heads = sums.gradients(part.per_head(A), part.per_head(D))
    part.heads(g_dt).copy_(of_dt)
    for gradient, own in zip((gA, gD), of_heads, strict=True):
        part.per_head(gradient).add_(own)


def along_heads(vector_1G1R1, head_dim: int):
    """[1, G, 1, R, P], side by side in memory: elementwise work then goes by whole rows, not by a head's few numbers."""
    return vector_1G1R1.expand(-1, -1, -1, -1, head_dim).contiguous()
