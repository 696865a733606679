"""The Mamba-2 scan (SSD) in plain torch, and the one place where it and its neighbours take transformers' place.

transformers' reference repeats B and C for every head, forms every intermediate result for the whole batch at once and
leaves the backward pass to autograd. Here heads of a group share B and C, both passes are written out, and work goes a
block at a time through the same few buffers: on a CPU fresh memory, and the way to it, cost more than the arithmetic.

Letters: B batch, T tokens, L chunk length, M heads, G groups, R heads per group (M/G: head m is number m mod R of group
m // R), P head dim, N state. Blocks lie as [R, B, G, …]: B and C of a group then serve R products without a copy.
Source: SSD (arXiv 2405.21060, §6, block decomposition); the backward pass is derived in `_Scan.backward`.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from minitron.families.blockwise import ConvSilu, GatedNorm, SquaredRelu, block_numbers

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
    inputs = (x_BTMP, dt_BTM.float(), A_M.float(), B_BTGN, C_BTGN, D_M, initial_state.float())
    return _Scan.apply(*inputs, torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs))


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows and groups of a batch, whose tensors fit the buffers, and the ways to them (views)."""

    rows: slice
    groups: slice
    num_groups: int
    num_heads: int  # of every group that make a block

    def heads(self, tensor, tokens=slice(None)):
        """[B, T, M, …] → [R, B, G, T, …]."""
        split = tensor[self.rows, tokens].unflatten(2, (self.num_groups, -1))[:, :, self.groups]
        return split.movedim((3, 0, 2, 1), (0, 1, 2, 3))

    def grouped(self, tensor):
        """[B, T, G, N] → [B, G, T, N]."""
        return tensor[self.rows, :, self.groups].transpose(1, 2)

    def state(self, tensor):
        """[B, M, P, N] → [R, B, G, N, P]."""
        split = tensor[self.rows].unflatten(1, (self.num_groups, -1))[:, self.groups]
        return split.movedim((2, 0, 1, 4, 3), (0, 1, 2, 3, 4))

    def per_head(self, vector):
        """[M] → [R, 1, G]."""
        return vector.unflatten(0, (self.num_groups, -1))[self.groups].t()[:, None]


def _parts(x, B) -> Iterator[_Part]:
    """A batch cut into parts such that a block of one or more heads of every group is of the size that suits the cache."""
    batch, _, heads, head_dim = x.shape
    groups = B.shape[2]
    length = chunk_tokens(head_dim, B.shape[3])
    fitting = max(1, block_numbers() // (length * max(head_dim, length)))  # heads of single rows
    rows, some = (min(batch, fitting // groups), groups) if fitting >= groups else (1, fitting)
    for row in range(0, batch, rows):
        for group in range(0, groups, some):
            yield _Part(slice(row, row + rows), slice(group, group + some), groups, min(heads // groups, max(1, fitting // (rows * some))))


class _Block:
    """A tensor [R, B, G, ·, ·], the same as one batch of matrices [R·B·G, ·, ·], and as R batches [B·G, ·, ·] for products with B and C."""

    def __init__(self, tensor):
        self.all, self.flat, self.each = tensor, tensor.flatten(0, 2), tensor.flatten(1, 2).unbind(0)


class _Sequence:
    """A part of a batch on its way through the chunks: what both passes need of dt, A, B and C, and buffers for some heads of one chunk."""

    def __init__(self, part: _Part, x, dt, A, B, C):
        self.part, self.tokens, self.length = part, x.shape[1], chunk_tokens(x.shape[3], B.shape[3])
        self.B, self.C = (part.grouped(tensor).float().contiguous().flatten(0, 1) for tensor in (B, C))  # [B·G, T, N]
        padded = F.pad(part.heads(dt), (0, -self.tokens % self.length)).unflatten(-1, (-1, self.length))  # no step, no decay
        self.dt = padded[..., None]  # [R, B, G, Z, L, 1] for Z chunks
        self.cum = torch.cumsum(padded * part.per_head(A)[..., None, None], dim=-1)
        self.from_start, self.to_end = (_exp(log)[..., None] for log in (self.cum.clone(), self.cum[..., -1:] - self.cum))
        self.earlier = torch.ones(self.length, self.length, device=x.device).tril_()  # 1 where s ≤ l
        self.num_chunks, self.blocks = self.cum.shape[3], {}
        step = part.num_heads
        self.heads = [slice(first, first + step) for first in range(0, len(self.cum), step)]

    def chunk(self, number: int) -> slice:
        """Its tokens."""
        return slice(number * self.length, min((number + 1) * self.length, self.tokens))

    def products(self, tokens: slice):
        """C·Bᵀ of a chunk, 0 above the diagonal: [B·G, L, L]."""
        length = tokens.stop - tokens.start
        return torch.bmm(self.C[:, tokens], self.B[:, tokens].transpose(1, 2)).mul_(self.earlier[:length, :length])

    def decay(self, heads: slice, number: int, length: int) -> _Block:
        block = self.buffer("decay", heads, length, length)
        _decay(self.cum[heads, :, :, number, :length], block.all)
        return block

    def scaled(self, x_block, heads: slice, number: int) -> _Block:
        """x·dt."""
        block = self.buffer("xd", heads, *x_block.shape[3:])
        torch.mul(x_block, self.dt[heads, :, :, number, : x_block.shape[3]], out=block.all)
        return block

    def buffer(self, name: str, heads: slice, *shape: int) -> _Block:
        """Memory [heads, B, G, *shape], the same for the same name and shape."""
        size = (name, len(range(len(self.cum))[heads]), *shape)
        if size not in self.blocks:
            self.blocks[size] = _Block(torch.empty(size[1], *self.cum.shape[1:3], *shape, device=self.cum.device))
        return self.blocks[size]


def _decay(cum, out):
    """exp(c_l − c_s) for s ≤ l, and 1 above the diagonal, which the products mask: [R, B, G, L, L]."""
    return _exp(torch.sub(cum[..., :, None], cum[..., None, :], out=out))


def _exp(log):
    """exp of logarithms of decays, in place. Below LOWEST_LOG exp is a hundred times slower (its results underflow) and e**-80 is nothing beside 1."""
    return log.clamp_(LOWEST_LOG, 0).exp_()


def _without_autocast(function: Callable) -> Callable:
    """Autocast would round the factors of products to bf16."""

    @functools.wraps(function)
    def run(ctx, first, *others):
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *others)

    return run


class _Scan(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(ctx, x, dt, A, B, C, D, start, needs_gradient):
        y, final, saved = torch.empty(x.shape, device=x.device), torch.empty(start.shape, device=x.device), []
        for part in _parts(x, B):
            sequence, first = _Sequence(part, x, dt, A, B, C), part.state(start)
            # The state before every chunk and after the last one, or, where no gradient is wanted, just two in turns.
            states = torch.empty((sequence.num_chunks + 1 if needs_gradient else 2, *first.shape), device=x.device)
            states[0] = first
            blocks, D_RBG = [_Block(state) for state in states], part.per_head(D)[..., None, None]
            for number in range(sequence.num_chunks):
                _outputs(sequence, number, x, D_RBG, blocks[number % len(blocks)], blocks[(number + 1) % len(blocks)], y)
            part.state(final).copy_(blocks[sequence.num_chunks % len(blocks)].all)
            saved.append(states)
        if needs_gradient:
            ctx.save_for_backward(x, dt, A, B, C, D, y, *saved)
        return y, final

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, gy, g_final):
        """With c a chunk's cumulative log decay: every path through exp(c_l) is y_l (without D) or the state at the chunk's
        end, and every path through exp(−c_s) is x_s·dt_s. So the gradient of c needs only Σ_p gy·y, Σ_p g(x·dt)·x·dt and,
        at the end, Σ g(state)·state.
        """
        x, dt, A, B, C, D, y, *saved = ctx.saved_tensors
        g = _Gradients(*(torch.empty(tensor.shape, device=x.device) for tensor in (x, dt, B, C)), torch.zeros_like(A), torch.zeros_like(D))
        g_start, gy = torch.empty_like(g_final), gy.contiguous()
        for part, states in zip(_parts(x, B), saved, strict=True):
            sequence, g_state = _Sequence(part, x, dt, A, B, C), _Block(part.state(g_final).contiguous())
            for number in reversed(range(sequence.num_chunks)):
                _gradients(sequence, number, x, A, D, y, gy, _Block(states[number]), states[number + 1], g_state, g)
            part.state(g_start).copy_(g_state.all)
        return g.x.to(x.dtype), g.dt, g.A, g.B.to(B.dtype), g.C.to(C.dtype), g.D, g_start, None


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Of the inputs, in their shapes."""

    x: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor


def _outputs(sequence: _Sequence, number: int, x, D_RBG, state: _Block, after: _Block, y) -> None:
    """One chunk forward: fills its part of `y` and the state `after` it."""
    tokens = sequence.chunk(number)
    B, C, products = sequence.B[:, tokens], sequence.C[:, tokens], sequence.products(tokens)
    x_chunk, y_chunk = sequence.part.heads(x, tokens), sequence.part.heads(y, tokens)
    for heads in sequence.heads:
        x_block, (length, head_dim) = x_chunk[heads], x_chunk.shape[3:]
        from_start, to_end = (factor[heads, :, :, number] for factor in (sequence.from_start, sequence.to_end))
        xd, weights = sequence.scaled(x_block, heads, number), sequence.decay(heads, number, length)
        weights.all.mul_(products.view(weights.all.shape[1:]))
        inside, carried = (sequence.buffer(name, heads, length, head_dim) for name in ("inside", "carried"))
        torch.bmm(weights.flat, xd.flat, out=inside.flat)
        for h, out in zip(state.each[heads], carried.each, strict=True):
            torch.bmm(C, h, out=out)
        inside.all.addcmul_(carried.all, from_start[:, :, :, :length])
        torch.addcmul(inside.all, x_block, D_RBG[heads], out=y_chunk[heads])
        xd.all.mul_(to_end[:, :, :, :length])
        torch.mul(state.all[heads], from_start[:, :, :, -1:], out=after.all[heads])
        for xd_r, out in zip(xd.each, after.each[heads], strict=True):
            out.baddbmm_(B.transpose(1, 2), xd_r)


def _gradients(sequence: _Sequence, number: int, x, A, D, y, gy, state: _Block, after, g_state: _Block, g: _Gradients) -> None:
    """One chunk backward: fills its part of `g`, and turns the gradient of the state after it into that of the state before."""
    part, tokens = sequence.part, sequence.chunk(number)
    B, C, products = sequence.B[:, tokens], sequence.C[:, tokens], sequence.products(tokens)
    x_chunk, y_chunk, gy_chunk, gx_chunk, g_dt_chunk = (part.heads(tensor, tokens) for tensor in (x, y, gy, g.x, g.dt))
    A_RBG, D_RBG, gA_RBG, gD_RBG = (part.per_head(vector)[..., None, None] for vector in (A, D, g.A, g.D))
    gB, gC, g_products = torch.zeros_like(B), torch.zeros_like(C), torch.zeros_like(products)
    length, head_dim = x_chunk.shape[3:]
    for heads in sequence.heads:
        x_block, gy_view = x_chunk[heads], gy_chunk[heads]
        from_start, to_end, dt = (factor[heads, :, :, number] for factor in (sequence.from_start, sequence.to_end, sequence.dt))
        from_start, to_end, dt, whole = from_start[:, :, :, :length], to_end[:, :, :, :length], dt[:, :, :, :length], from_start[:, :, :, -1:]
        xd, weights = sequence.scaled(x_block, heads, number), sequence.decay(heads, number, length)
        gy_block, gxd, scratch = (sequence.buffer(name, heads, length, head_dim) for name in ("inside", "gxd", "carried"))
        gy_x = torch.mul(gy_view, x_block, out=scratch.all).sum(-1, keepdim=True)  # [R, B, G, L, 1], as the next two
        gy_y = torch.mul(gy_view, y_chunk[heads], out=scratch.all).sum(-1, keepdim=True)
        gy_block.all.copy_(gy_view)

        # Within the chunk: y = W·xd with W = products ∘ decay.
        g_weights = sequence.buffer("g_weights", heads, length, length)
        torch.bmm(gy_block.flat, xd.flat.transpose(1, 2), out=g_weights.flat)
        g_products += g_weights.all.mul_(weights.all).sum(0).flatten(0, 1)
        weights.all.mul_(products.view(weights.all.shape[1:]))
        torch.bmm(weights.flat.transpose(1, 2), gy_block.flat, out=gxd.flat)

        # Through the states at the chunk's start (y = exp(c)·C·h) and at its end (h ← exp(c_end)·h + Bᵀ·xd·exp(c_end − c)).
        gy_block.all.mul_(from_start)
        for g_r, out in zip(g_state.each[heads], scratch.each, strict=True):
            torch.bmm(B, g_r, out=out)
        gxd.all.addcmul_(scratch.all, to_end)
        xd.all.mul_(to_end)
        g_end = torch.mul(g_state.all[heads], after[heads], out=sequence.buffer("states", heads, *after.shape[3:]).all).sum((3, 4), keepdim=True)
        for gy_r, xd_r, h, g_r in zip(gy_block.each, xd.each, state.each[heads], g_state.each[heads], strict=True):
            gC.baddbmm_(gy_r, h.transpose(1, 2))
            gB.baddbmm_(xd_r, g_r.transpose(1, 2))
        g_state.all[heads].mul_(whole)
        for gy_r, g_r in zip(gy_block.each, g_state.each[heads], strict=True):
            g_r.baddbmm_(C.transpose(1, 2), gy_r)

        gxd_x = torch.mul(gxd.all, x_block, out=scratch.all).sum(-1, keepdim=True)
        g_log = (gy_y - D_RBG[heads] * gy_x - gxd_x * dt).flip(3).cumsum(3).flip(3) + g_end
        g_dt_chunk[heads] = (gxd_x + g_log * A_RBG[heads]).squeeze(-1)
        gA_RBG[heads] += (g_log * dt).sum((1, 3), keepdim=True)
        gD_RBG[heads] += gy_x.sum((1, 3), keepdim=True)
        torch.addcmul(gxd.all.mul_(dt), gy_view, D_RBG[heads], out=gx_chunk[heads])
    g_products.mul_(sequence.earlier[:length, :length])
    part.grouped(g.B)[:, :, tokens] = gB.baddbmm_(g_products.transpose(1, 2), C).view(part.grouped(g.B)[:, :, tokens].shape)
    part.grouped(g.C)[:, :, tokens] = gC.baddbmm_(g_products, B).view(part.grouped(g.C)[:, :, tokens].shape)


def _chunk_scan(hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
                dt_limit=(0.0, float("inf")), return_final_states=False, **_):  # fmt: skip
    """transformers' signature for `scan`."""
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = torch.clamp(F.softplus(dt) if dt_softplus else dt, *dt_limit)
    y, final = scan(hidden_states, dt, A, B, C, D, initial_states)
    return (y, final) if return_final_states else y


def _causal_conv(hidden_states, weight, bias=None, activation=None, **_):
    """transformers' signature for the convolution: [B, E, T] in and out."""
    assert activation in ("silu", "swish"), activation
    rows = hidden_states.transpose(1, 2).to(weight.dtype)
    return ConvSilu.apply(rows, weight, bias).transpose(1, 2).to(hidden_states.dtype)


def _norm(module, hidden_states):
    """NemotronHRMSNorm.forward for float32."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return GatedNorm.apply(rows, None, module.weight.float(), 1, module.variance_epsilon).view(hidden_states.shape)


def _gated_norm(module, hidden_states, gate=None):
    """NemotronHRMSNormGated.forward for float32."""
    rows, gates = (None if tensor is None else tensor.float().reshape(-1, tensor.shape[-1]) for tensor in (hidden_states, gate))
    groups = rows.shape[1] // module.group_size
    return GatedNorm.apply(rows, gates, module.weight.float(), groups, module.variance_epsilon).view(hidden_states.shape)


def _squared_relu(module, x):
    """ReLUSquaredActivation.forward for float32."""
    return SquaredRelu.apply(x.reshape(-1, x.shape[-1])).view(x.shape)


def _for_float32(ours: Callable, theirs: Callable) -> Callable:
    """A module's forward that is ours for float32 inputs, where the gain is, and transformers' own for others."""

    @functools.wraps(theirs)
    def forward(module, x, *args, **kwargs):
        return (ours if x.dtype == torch.float32 else theirs)(module, x, *args, **kwargs)

    return forward


@functools.cache
def replacements() -> tuple[tuple[object, str, Callable], ...]:
    """What `install` changes, as (owner, name, new function)."""
    from transformers.activations import ReLUSquaredActivation
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    forwards = ((modeling.NemotronHRMSNorm, _norm), (modeling.NemotronHRMSNormGated, _gated_norm), (ReLUSquaredActivation, _squared_relu))
    functions = (modeling, "mamba2_chunk_scan", _chunk_scan), (modeling, "causal_conv1d_fn", _causal_conv)
    return *functions, *((owner, "forward", _for_float32(ours, owner.forward)) for owner, ours in forwards)


def install() -> None:
    """Use these functions in transformers' NemotronH, in this process from here on."""
    for owner, name, function in replacements():
        setattr(owner, name, function)
