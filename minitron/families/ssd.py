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
    """A batch cut into parts as large as the buffers: several rows of all groups, or some groups of one row."""
    batch, _, heads, head_dim = x.shape
    groups = B.shape[2]
    length = chunk_tokens(head_dim, B.shape[3])
    fitting = max(1, block_numbers() * groups // (heads * length * max(head_dim, length)))  # groups of single rows
    rows, some = (fitting // groups, groups) if fitting >= groups else (1, fitting)
    for row in range(0, batch, rows):
        for group in range(0, groups, some):
            yield _Part(slice(row, row + rows), slice(group, group + some), groups)


class _Block:
    """A tensor [R, B, G, ·, ·], the same as one batch of matrices [R·B·G, ·, ·], and as R batches [B·G, ·, ·] for products with B and C."""

    def __init__(self, tensor):
        self.all, self.flat, self.each = tensor, tensor.flatten(0, 2), tensor.flatten(1, 2).unbind(0)


class _Sequence:
    """A part's chunks: what both passes need of dt, A, B and C, made for all chunks at once, and the buffers that they share."""

    def __init__(self, part: _Part, x, dt, A, B, C):
        self.part, self.tokens, self.length = part, x.shape[1], chunk_tokens(x.shape[3], B.shape[3])
        self.B, self.C = (part.grouped(tensor).float().contiguous().flatten(0, 1) for tensor in (B, C))  # [B·G, T, N]
        padded = F.pad(part.heads(dt), (0, -self.tokens % self.length)).unflatten(-1, (-1, self.length))  # no step, no decay
        self.dt = padded[..., None]  # [R, B, G, Z, L, 1]
        self.cum = torch.cumsum(padded * part.per_head(A)[..., None, None], dim=-1)
        self.from_start, self.to_end = (_exp(log)[..., None] for log in (self.cum.clone(), self.cum[..., -1:] - self.cum))
        self.earlier = torch.ones(self.length, self.length, device=x.device).tril_()  # 1 where s ≤ l
        self.blocks: dict[tuple, _Block] = {}

    @property
    def num_chunks(self) -> int:
        return self.cum.shape[3]

    def buffer(self, name: str, *shape: int) -> _Block:
        """Memory [R, B, G, *shape], the same for the same name and shape."""
        if (name, shape) not in self.blocks:
            self.blocks[name, shape] = _Block(torch.empty(*self.cum.shape[:3], *shape, device=self.cum.device))
        return self.blocks[name, shape]


class _Chunk:
    """One chunk of a sequence, with what both passes need of it."""

    def __init__(self, sequence: _Sequence, number: int, x):
        first = number * sequence.length
        self.tokens = slice(first, min(first + sequence.length, sequence.tokens))
        length = self.tokens.stop - first
        self.dt, self.from_start, self.to_end = (t[:, :, :, number, :length] for t in (sequence.dt, sequence.from_start, sequence.to_end))
        self.whole = sequence.from_start[:, :, :, number, -1:]  # [R, B, G, 1, 1]
        self.B, self.C = sequence.B[:, self.tokens], sequence.C[:, self.tokens]
        self.x, self.xd = sequence.part.heads(x, self.tokens), sequence.buffer("xd", length, x.shape[3])
        torch.mul(self.x, self.dt, out=self.xd.all)
        self.earlier = sequence.earlier[:length, :length]
        self.products = torch.bmm(self.C, self.B.transpose(1, 2)).mul_(self.earlier)  # [B·G, L, L]
        self.decay = sequence.buffer("decay", length, length)
        _decay(sequence.cum[:, :, :, number, :length], self.decay.all)

    def weigh(self) -> _Block:
        """y = weights·xd within the chunk; takes the place of the decay."""
        self.decay.all.mul_(self.products.view(*self.decay.all.shape[1:]))
        return self.decay


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
                chunk, state, after = _Chunk(sequence, number, x), blocks[number % len(blocks)], blocks[(number + 1) % len(blocks)]
                inside, carried = (sequence.buffer(name, *chunk.xd.all.shape[3:]) for name in ("inside", "carried"))
                torch.bmm(chunk.weigh().flat, chunk.xd.flat, out=inside.flat)
                for h, out in zip(state.each, carried.each, strict=True):
                    torch.bmm(chunk.C, h, out=out)
                inside.all.addcmul_(carried.all, chunk.from_start)
                torch.addcmul(inside.all, chunk.x, D_RBG, out=part.heads(y, chunk.tokens))
                chunk.xd.all.mul_(chunk.to_end)
                torch.mul(state.all, chunk.whole, out=after.all)
                for xd, out in zip(chunk.xd.each, after.each, strict=True):
                    out.baddbmm_(chunk.B.transpose(1, 2), xd)
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
        gx, g_dt, gB, gC = (torch.empty(tensor.shape, device=x.device) for tensor in (x, dt, B, C))
        gA, gD, g_start, gy = torch.zeros_like(A), torch.zeros_like(D), torch.empty_like(g_final), gy.contiguous()
        for part, states in zip(_parts(x, B), saved, strict=True):
            sequence, g_state, D_RBG = _Sequence(part, x, dt, A, B, C), _Block(part.state(g_final).contiguous()), part.per_head(D)[..., None, None]
            gB_part, gC_part = torch.empty_like(sequence.B), torch.empty_like(sequence.C)
            for number in reversed(range(sequence.num_chunks)):
                chunk, state = _Chunk(sequence, number, x), _Block(states[number])
                gy_view, shape = part.heads(gy, chunk.tokens), chunk.xd.all.shape[3:]
                gy_block, gxd, scratch = (sequence.buffer(name, *shape) for name in ("inside", "gxd", "carried"))
                gy_x = torch.mul(gy_view, chunk.x, out=scratch.all).sum(-1, keepdim=True)  # [R, B, G, L, 1], as the next two
                gy_y = torch.mul(gy_view, part.heads(y, chunk.tokens), out=scratch.all).sum(-1, keepdim=True)
                gy_block.all.copy_(gy_view)

                # Within the chunk: y = W·xd with W = products ∘ decay.
                g_weights = sequence.buffer("g_weights", *chunk.decay.all.shape[3:])
                torch.bmm(gy_block.flat, chunk.xd.flat.transpose(1, 2), out=g_weights.flat)
                g_products = g_weights.all.mul_(chunk.decay.all).sum(0).flatten(0, 1).mul_(chunk.earlier)
                torch.bmm(chunk.weigh().flat.transpose(1, 2), gy_block.flat, out=gxd.flat)
                gB_chunk, gC_chunk = torch.bmm(g_products.transpose(1, 2), chunk.C), torch.bmm(g_products, chunk.B)

                # Through the states at the chunk's start (y = exp(c)·C·h) and at its end (h ← exp(c_end)·h + Bᵀ·xd·exp(c_end − c)).
                gy_block.all.mul_(chunk.from_start)
                for g, out in zip(g_state.each, scratch.each, strict=True):
                    torch.bmm(chunk.B, g, out=out)
                gxd.all.addcmul_(scratch.all, chunk.to_end)
                chunk.xd.all.mul_(chunk.to_end)
                for gy_r, xd_r, h, g in zip(gy_block.each, chunk.xd.each, state.each, g_state.each, strict=True):
                    gC_chunk.baddbmm_(gy_r, h.transpose(1, 2))
                    gB_chunk.baddbmm_(xd_r, g.transpose(1, 2))
                gB_part[:, chunk.tokens], gC_part[:, chunk.tokens] = gB_chunk, gC_chunk
                g_end = torch.mul(g_state.all, states[number + 1], out=sequence.buffer("states", *state.all.shape[3:]).all).sum((3, 4), keepdim=True)
                g_state.all.mul_(chunk.whole)
                for gy_r, g in zip(gy_block.each, g_state.each, strict=True):
                    g.baddbmm_(chunk.C.transpose(1, 2), gy_r)

                gxd_x = torch.mul(gxd.all, chunk.x, out=scratch.all).sum(-1, keepdim=True)
                g_log = (gy_y - D_RBG * gy_x - gxd_x * chunk.dt).flip(3).cumsum(3).flip(3) + g_end
                part.heads(g_dt, chunk.tokens).copy_((gxd_x + g_log * part.per_head(A)[..., None, None]).squeeze(-1))
                part.per_head(gA).add_((g_log * chunk.dt).sum((1, 3, 4))[:, None])
                part.per_head(gD).add_(gy_x.sum((1, 3, 4))[:, None])
                torch.addcmul(gxd.all.mul_(chunk.dt), gy_view, D_RBG, out=part.heads(gx, chunk.tokens))
            for gradient, own in ((gB, gB_part), (gC, gC_part)):
                part.grouped(gradient).copy_(own.view_as(part.grouped(gradient)))
            part.state(g_start).copy_(g_state.all)
        return gx.to(x.dtype), g_dt, gA, gB.to(B.dtype), gC.to(C.dtype), gD, g_start, None


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
