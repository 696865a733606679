"""NemotronH, Mamba-2 and Granite-4-H on a CPU without Mamba's kernels: what takes transformers' place once dispatch.py puts it there.

The heart of a Mamba-2 mixer (convolution, scan, gated norm) goes a chunk of tokens at a time from the input projection's
output to the output projection's input, so that what lies between is made once, in memory that is used again.

Letters as in ssd.py; I inner width (M·P), E channels of the convolution (I + 2·G·N: x, B, C), K its kernel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from minitron.mamba import ssd
from minitron.mamba.blockwise import Buffers, FeedForward, Norm, SplitProduct, convolve, convolve_back, gated_norm, gated_norm_back
from minitron.mamba.chunks import (
    Block,
    Chunk,
    Part,
    Sequence,
    Sums,
    add_gradients,
    along_heads,
    chunk_gradients,
    chunk_outputs,
    parts,
    state_blocks,
)
from minitron.mamba.packed import by_document
from minitron.mamba.ssd import keeping, own_precision


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of a mixer. in_proj's outputs are z I | x I | B G·N | C G·N | dt M; the convolution's channels E are x, B and C."""

    heads: int
    head_dim: int
    groups: int
    state: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def outputs(self) -> tuple[int, int, int]:
        """Of z, of the convolution's channels, of dt."""
        return self.inner, self.inner + 2 * self.groups * self.state, self.heads

    def parts(self, z) -> Iterator[Part]:
        return parts(len(z), self.heads, self.head_dim, self.groups, self.state, z.device)


class _Heart(torch.autograd.Function):
    """From in_proj's z [B, T, I], x | B | C [B, T, E] and dt [B, T, M] to the gated norm [B, T, I] before its weight, from a state of zeros."""

    @staticmethod
    @own_precision
    def forward(ctx, z, xBC, before_dt, dt_bias, A, D, conv_weight, conv_bias, sizes, epsilon, needs_gradient):
        normed, dt = torch.empty(z.shape, device=z.device), F.softplus(before_dt.float() + dt_bias)
        y = torch.empty_like(normed) if needs_gradient else None
        scale, epsilon, saved = normed.new_empty(*z.shape[:2], sizes.groups), normed.new_tensor(epsilon), []
        for part in sizes.parts(z):
            walk = _Walk(sizes, part, dt, A, D)
            totals = [convolve(xBC[part.rows, :, piece].float(), conv_weight[piece], conv_bias[piece]) for piece in walk.pieces]
            walk.take(totals)
            gates, outputs, scales = walk.split(walk.own(z).float(), walk.own(normed), scale[part.rows, :, part.groups])
            ys = [walk.buffers("y", *gate.shape) for gate in gates] if y is None else walk.split(walk.own(y))[0]
            states, blocks = state_blocks(walk.zero_state(), len(gates), needs_gradient)
            for number, y_rows in enumerate(ys):
                chunk_outputs(walk.chunk(number), walk.D, blocks[number], blocks[number + 1], walk.by_head(y_rows))
                gated_norm(y_rows, gates[number], epsilon, outputs[number], scales[number], walk.buffers)
            saved += [states, *totals]
        if needs_gradient:
            ctx.sizes = sizes
            ctx.save_for_backward(z, xBC, before_dt, dt_bias, A, D, conv_weight, y, scale, *saved)
        return normed

    @staticmethod
    @once_differentiable
    @own_precision
    def backward(ctx, gradient):
        z, xBC, before_dt, dt_bias, A, D, conv_weight, y, scale, *saved = ctx.saved_tensors
        before_softplus, saved = before_dt.float() + dt_bias, iter(saved)
        dt, g_dt, gz = F.softplus(before_softplus), torch.empty_like(before_softplus), torch.empty(z.shape, device=z.device)
        gA, gD, g_taps, g_bias = (torch.zeros_like(tensor) for tensor in (A, D, conv_weight, conv_weight[:, 0]))
        g_xBC = None
        for part in ctx.sizes.parts(z):
            walk, states = _Walk(ctx.sizes, part, dt, A, D), next(saved)
            walk.take([next(saved) for _ in walk.pieces])
            g_totals = [walk.before_convolution(piece, conv_weight.shape[1]) for piece in walk.pieces]
            rows = (walk.own(gradient), walk.own(y), walk.own(z).float(), scale[part.rows, :, part.groups], walk.own(gz))
            sums = _chunks_back(walk, states, walk.split(*rows), walk.streams([total[:, : z.shape[1]] for total in g_totals]))
            add_gradients(part, sums, A, D, g_dt, gA, gD)
            for piece, g_total in zip(walk.pieces, g_totals, strict=True):
                own, taps, bias = convolve_back(g_total, xBC[part.rows, :, piece].float(), conv_weight[piece])
                g_taps[piece] += taps
                g_bias[piece] += bias
                if own.shape == xBC.shape:  # the whole batch at once: no copy
                    g_xBC = own
                else:
                    g_xBC = torch.empty(xBC.shape, device=z.device) if g_xBC is None else g_xBC
                    g_xBC[part.rows, :, piece] = own
        g_dt *= torch.sigmoid(before_softplus)
        own_types = (each.to(of.dtype) for each, of in ((gz, z), (g_xBC, xBC), (g_dt, before_dt)))
        return *own_types, g_dt.sum((0, 1)), gA, gD, g_taps, g_bias, None, None, None


def _chunks_back(walk: "_Walk", states, rows: list, g_streams: list) -> Sums:
    """From the last chunk to the first: fills the gradients of the gates and, before silu, of x, B and C.

    `rows` by chunk: the outputs' gradients, y, gates, the norm's scales, room for the gates' gradients.
    """
    sums, g_state = Sums(walk.sequence), Block(torch.zeros_like(states[0]))
    chunks = list(enumerate(zip(*rows, zip(*g_streams, strict=True), strict=True)))
    for number, (g_rows, y_rows, gate, scales, g_gate, g_stream) in reversed(chunks):
        gy, gx = (walk.buffers(name, *y_rows.shape) for name in ("gy", "gx"))
        gated_norm_back(g_rows, y_rows, gate, scales, gy, g_gate, walk.buffers)
        gB_gC = chunk_gradients(walk.chunk(number), walk.D, walk.by_head(y_rows), walk.by_head(gy), Block(states[number]), states[number + 1], g_state,
                                walk.by_head(gx), sums)  # fmt: skip
        for g_after, total, g_total in zip((gx, *map(walk.ungrouped, gB_gC)), walk.totals[number], g_stream, strict=True):
            torch.ops.aten.silu_backward.grad_input(g_after, total, grad_input=g_total)
    return sums


class _Walk:
    """A part of the batch on its way through the mixer, and the ways to its tensors (views)."""

    def __init__(self, sizes: _Sizes, part: Part, dt, A, D):
        first, some, width = part.groups.start, part.groups.stop - part.groups.start, sizes.inner // sizes.groups
        self.sizes, self.part, self.num_groups, self.buffers = sizes, part, some, Buffers(dt.device)
        self.A, self.D = part.per_head(A).contiguous(), along_heads(part.per_head(D), sizes.head_dim)
        self.sequence = Sequence(part.heads(dt), self.A, sizes.head_dim)
        self.inner = slice(first * width, (first + some) * width)  # the part's channels of z, x and y
        # Its channels of the convolution: one piece where it has all groups, else x's, B's and C's.
        B, C = (slice(start + first * sizes.state, start + (first + some) * sizes.state) for start in (sizes.inner, sizes.inner + sizes.groups * sizes.state))
        self.pieces = [slice(0, C.stop)] if some == sizes.groups else [self.inner, B, C]

    def own(self, tensor):
        """The part's rows and channels of a tensor [B, T, I]."""
        return tensor[self.part.rows, :, self.inner]

    def split(self, *tensors):
        return self.sequence.split(*tensors, dim=1)

    def streams(self, pieces: list):
        """x [B, L, I], B and C [B, L, G, N] of tensors like `pieces`, chunk by chunk."""
        widths = (self.inner.stop - self.inner.start, *[self.num_groups * self.sizes.state] * 2)
        x, *matrices = pieces if len(pieces) == 3 else pieces[0].split(widths, dim=2)
        return self.split(x, *(tensor.unflatten(2, (self.num_groups, -1)) for tensor in matrices))

    def take(self, totals: list) -> None:
        """The convolution's outputs, before silu, by piece."""
        self.totals = list(zip(*self.streams(totals), strict=True))

    def chunk(self, number: int) -> Chunk:
        x, *matrices = self.totals[number]
        B, C = (self.silu(name, matrix.transpose(1, 2)).flatten(0, 1) for name, matrix in zip("BC", matrices, strict=True))
        return Chunk(self.sequence, number, self.by_head(self.silu("x", x)), B, C)

    def silu(self, name: str, total):
        return torch.ops.aten.silu.out(total, out=self.buffers(name, *total.shape))

    def zero_state(self):
        """[B, G, N, R, P]."""
        return self.A.new_zeros(*self.sequence.shape, self.sizes.state, self.A.shape[3], self.sizes.head_dim)

    def before_convolution(self, piece: slice, kernel: int):
        """Room for a gradient as convolve_back takes it, [B, T + K − 1, E of the piece]."""
        room = self.A.new_empty(self.sequence.shape[0], self.sequence.tokens + kernel - 1, piece.stop - piece.start)
        room[:, self.sequence.tokens :] = 0
        return room

    def by_head(self, rows):
        """[B, L, G·R·P] → [B, G, L, R, P]."""
        return rows.view(*rows.shape[:2], self.num_groups, -1, self.sizes.head_dim).transpose(1, 2)

    def ungrouped(self, matrices):
        """[B·G, L, N] → [B, L, G, N]."""
        return matrices.unflatten(0, (-1, self.num_groups)).transpose(1, 2)


def mixer_forward(module, hidden_states, *, theirs: Callable, cache_params=None, attention_mask=None, seq_idx=None, **kwargs):
    """NemotronHMamba2Mixer.forward, Mamba2Mixer's or GraniteMoeHybridMambaLayer's; transformers' own where there is a cache, a mask or a limit to the time
    step.

    `seq_idx` [B, T] numbers the documents of packed rows.
    """
    limited = tuple(module.time_step_limit) != (0.0, float("inf"))
    if cache_params is not None or attention_mask is not None or limited or module.activation != "silu":
        return theirs(module, hidden_states, cache_params=cache_params, attention_mask=attention_mask, seq_idx=seq_idx, **kwargs)
    sizes = _Sizes(module.num_heads, module.head_dim, module.n_groups, module.ssm_state_size)
    bias = module.D.new_zeros(module.conv_dim) if module.conv1d.bias is None else module.conv1d.bias
    weights = (module.dt_bias, -torch.exp(module.A_log.float()), module.D, module.conv1d.weight.squeeze(1), bias)
    weights = [weight.float() for weight in weights]

    def heart(*projected):
        return _Heart.apply(*keeping(*projected, *weights, sizes, module.norm.variance_epsilon))

    if _plain(hidden_states, module.in_proj):
        projected = SplitProduct.apply(hidden_states, module.in_proj.weight, sizes.outputs)
    else:
        projected = module.in_proj(hidden_states).split(sizes.outputs, dim=2)
    normed = heart(*projected) if seq_idx is None else by_document(heart, seq_idx, *projected)
    out, weight = module.out_proj, module.norm.weight
    if _plain(hidden_states, out) and normed.numel() > out.weight.numel():  # the norm's weight goes to the smaller of the two
        return F.linear(normed, out.weight * weight)
    return out((normed * weight.float()).to(hidden_states.dtype))


def _plain(x, *modules) -> bool:
    """Whether these are nothing but products of float32 matrices, to whose inputs and outputs nothing listens (hooks)."""
    heard = any(map(is_heard, modules))
    linear = all(type(part) is nn.Linear and part.bias is None and part.weight.dtype == torch.float32 for part in modules)
    return linear and not heard and x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)


def is_heard(module: nn.Module) -> bool:
    """Whether something listens to a module's inputs and outputs."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def chunk_scan(hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
                dt_limit=(0.0, float("inf")), return_final_states=False, **_):  # fmt: skip
    """mamba2_chunk_scan, for the mixer with a cache."""
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = torch.clamp(F.softplus(dt) if dt_softplus else dt, *dt_limit)
    y, final = ssd.scan(hidden_states, dt, A, B, C, D, initial_states)
    return (y, final) if return_final_states else y


def norm_forward(module, hidden_states, *, theirs: Callable):
    """NemotronHRMSNorm.forward, Mamba2RMSNorm's or GraniteMoeHybridRMSNorm's."""
    if hidden_states.dtype != torch.float32:
        return theirs(module, hidden_states)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return Norm.apply(rows, module.weight.float(), module.variance_epsilon).view(hidden_states.shape)


def mlp_forward(module, x, *, theirs: Callable):
    """NemotronHMLP.forward; transformers' own where something listens to what lies between (hooks), and for anything but float32 without biases."""
    up, activation, down = module.up_proj, module.act_fn, module.down_proj
    if is_heard(activation) or not _plain(x, up, down) or module.config.mlp_hidden_act != "relu2":
        return theirs(module, x)
    return FeedForward.apply(*keeping(x.reshape(-1, x.shape[-1]), up.weight, down.weight)).view(*x.shape[:-1], -1)
