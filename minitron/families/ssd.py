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

from minitron.families.blockwise import BLOCK_NUMBERS, Buffers, ConvSilu, GatedNorm, SquaredRelu

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
    """Some rows and groups of a batch, whose tensors fit the buffers, and the ways to its blocks (views)."""

    rows: slice
    groups: slice
    num_groups: int

    def heads(self, tensor, tokens=slice(None)):
        """[B, T, M, …] → [R, B, G, T, …]."""
        split = tensor[self.rows, tokens].unflatten(2, (self.num_groups, -1))[:, :, self.groups]
        return split.movedim((3, 0, 2, 1), (0, 1, 2, 3))

    def grouped(self, tensor, tokens):
        """[B, T, G, N] → [B, G, T, N]."""
        return tensor[self.rows, tokens, self.groups].transpose(1, 2)

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
    fitting = max(1, BLOCK_NUMBERS * groups // (heads * length * max(head_dim, length)))  # groups of single rows
    rows, some = (fitting // groups, groups) if fitting >= groups else (1, fitting)
    for row in range(0, batch, rows):
        for group in range(0, groups, some):
            yield _Part(slice(row, row + rows), slice(group, group + some), groups)


def _chunks(x, B) -> list[slice]:
    length = chunk_tokens(x.shape[3], B.shape[3])
    return [slice(first, min(first + length, x.shape[1])) for first in range(0, x.shape[1], length)]


class _Chunk:
    """One chunk of a part, with what both passes need of it."""

    def __init__(self, part: _Part, tokens: slice, x, dt, A, B, C, buffers: Buffers):
        self.dt = part.heads(dt, tokens).contiguous()  # [R, B, G, L]
        cum = torch.cumsum(self.dt * part.per_head(A)[..., None], dim=-1)
        self.from_start, self.to_end = (_exp(log)[..., None] for log in (cum.clone(), cum[..., -1:] - cum))
        self.whole = self.from_start[..., -1:, :]
        self.x = part.heads(x, tokens)
        self.xd = torch.mul(self.x, self.dt[..., None], out=buffers("xd", self.x.shape))
        self.B, self.C = (buffers(name, (block := part.grouped(tensor, tokens)).shape).copy_(block) for name, tensor in (("B", B), ("C", C)))
        length = cum.shape[-1]
        self.products = buffers("products", (*self.B.shape[:2], length, length))
        torch.bmm(self.C.flatten(0, 1), self.B.flatten(0, 1).transpose(1, 2), out=self.products.flatten(0, 1)).tril_()
        self.decay = _decay(cum, buffers("decay", (*cum.shape, length)))


def _decay(cum, out):
    """exp(c_l − c_s) for s ≤ l, and 1 above the diagonal, which the products mask: [R, B, G, L, L]."""
    return _exp(torch.sub(cum[..., :, None], cum[..., None, :], out=out))


def _exp(log):
    """exp of logarithms of decays, in place. Below LOWEST_LOG exp is a hundred times slower (its results underflow) and e**-80 is nothing beside 1."""
    return log.clamp_(LOWEST_LOG, 0).exp_()


def _shared(left, right, out):
    """out[r] = left · right[r] for every r: [B, G, ·, ·] times [R, B, G, ·, ·]."""
    for each, result in zip(right, out, strict=True):
        torch.bmm(left.flatten(0, 1), each.flatten(0, 1), out=result.flatten(0, 1))
    return out


def _add_shared(left, right, out):
    """out[r] += left · right[r]."""
    for each, result in zip(right, out, strict=True):
        result.flatten(0, 1).baddbmm_(left.flatten(0, 1), each.flatten(0, 1))


def _add_summed(left, right, out):
    """out += Σ_r left[r] · right[r]ᵀ: [R, B, G, ·, ·] twice."""
    for one, other in zip(left, right, strict=True):
        out.flatten(0, 1).baddbmm_(one.flatten(0, 1), other.flatten(0, 1).transpose(1, 2))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, start, needs_gradient):
        y, final, saved = torch.empty(x.shape, device=x.device), torch.empty(start.shape, device=x.device), []
        for part in _parts(x, B):
            buffers, state, chunks = Buffers(x.device), part.state(start), _chunks(x, B)
            # The state before every chunk and after the last one, or, where no gradient is wanted, just two in turns.
            states = torch.empty((len(chunks) + 1 if needs_gradient else 2, *state.shape), device=x.device)
            state = states[0].copy_(state)
            for number, tokens in enumerate(chunks):
                chunk = _Chunk(part, tokens, x, dt, A, B, C, buffers)
                weights = chunk.decay.mul_(chunk.products)
                block = torch.bmm(weights.flatten(0, 2), chunk.xd.flatten(0, 2), out=buffers("y", chunk.xd.shape).flatten(0, 2)).view_as(chunk.xd)
                carried = _shared(chunk.C, state, buffers("carried", chunk.xd.shape))
                block.addcmul_(carried, chunk.from_start)
                torch.addcmul(block, chunk.x, part.per_head(D)[..., None, None], out=part.heads(y, tokens))
                state = torch.mul(state, chunk.whole, out=states[(number + 1) % len(states)])
                _add_shared(chunk.B.transpose(2, 3), chunk.xd.mul_(chunk.to_end), state)
            part.state(final).copy_(state)
            saved.append(states)
        if needs_gradient:
            ctx.save_for_backward(x, dt, A, B, C, D, y, *saved)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_final):
        """With c a chunk's cumulative log decay: every path through exp(c_l) is y_l (without D) or the state at the chunk's
        end, and every path through exp(−c_s) is x_s·dt_s. So the gradient of c needs only Σ_p gy·y, Σ_p g(x·dt)·x·dt and,
        at the end, Σ g(state)·state.
        """
        x, dt, A, B, C, D, y, *saved = ctx.saved_tensors
        gx, g_dt, gB, gC = (torch.empty(tensor.shape, device=x.device) for tensor in (x, dt, B, C))
        gA, gD, g_start, gy = torch.zeros_like(A), torch.zeros_like(D), torch.empty_like(g_final), gy.contiguous()
        for part, states in zip(_parts(x, B), saved, strict=True):
            buffers, g_state, D_RBG = Buffers(x.device), part.state(g_final).contiguous(), part.per_head(D)[..., None]
            for number, tokens in reversed(list(enumerate(_chunks(x, B)))):
                chunk, gy_view = _Chunk(part, tokens, x, dt, A, B, C, buffers), part.heads(gy, tokens)
                gy_block = buffers("gy", gy_view.shape).copy_(gy_view)
                gy_x = torch.mul(gy_view, chunk.x, out=buffers("dots", gy_view.shape)).sum(-1)
                gy_y = torch.mul(gy_view, part.heads(y, tokens), out=buffers("dots", gy_view.shape)).sum(-1)

                # Within the chunk: y = W·xd with W = products ∘ decay.
                g_weights = torch.bmm(gy_block.flatten(0, 2), chunk.xd.flatten(0, 2).transpose(1, 2), out=buffers("g_weights", chunk.decay.shape).flatten(0, 2))
                g_products = g_weights.view_as(chunk.decay).mul_(chunk.decay).sum(0).tril_()
                weights = chunk.decay.mul_(chunk.products)
                gxd = torch.bmm(weights.flatten(0, 2).transpose(1, 2), gy_block.flatten(0, 2), out=buffers("gxd", chunk.xd.shape).flatten(0, 2)).view_as(chunk.xd)
                gB_block, gC_block = g_products.transpose(2, 3) @ chunk.C, g_products @ chunk.B

                # Through the states at the chunk's start (y = exp(c)·C·h) and at its end (h ← exp(c_end)·h + Bᵀ·xd·exp(c_end − c)).
                gy_block.mul_(chunk.from_start)
                _add_summed(gy_block, states[number], gC_block)
                gxd.addcmul_(_shared(chunk.B, g_state, buffers("carried", chunk.xd.shape)), chunk.to_end)
                _add_summed(chunk.xd.mul_(chunk.to_end), g_state, gB_block)
                g_end = torch.mul(g_state, states[number + 1], out=buffers("states", g_state.shape)).sum((3, 4))
                g_state = g_state.mul_(chunk.whole)
                _add_shared(chunk.C.transpose(2, 3), gy_block, g_state)

                gxd_x = torch.mul(gxd, chunk.x, out=buffers("dots", gxd.shape)).sum(-1)
                g_cum = gy_y - D_RBG * gy_x - gxd_x * chunk.dt
                g_log = g_cum.flip(-1).cumsum(-1).flip(-1) + g_end[..., None]
                part.heads(g_dt, tokens).copy_(gxd_x + g_log * part.per_head(A)[..., None])
                part.per_head(gA).add_((g_log * chunk.dt).sum((1, 3))[:, None])
                part.per_head(gD).add_(gy_x.sum((1, 3))[:, None])
                torch.addcmul(gxd.mul_(chunk.dt[..., None]), gy_view, D_RBG[..., None], out=part.heads(gx, tokens))
                part.grouped(gB, tokens).copy_(gB_block)
                part.grouped(gC, tokens).copy_(gC_block)
            part.state(g_start).copy_(g_state)
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
