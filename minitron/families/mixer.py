"""NemotronH on a CPU without Mamba's kernels: what takes transformers' place once `ssd.install` puts it there.

The heart of a Mamba-2 mixer (convolution, scan, gated norm) goes a chunk of tokens at a time from the input projection's
output to the output projection's input, so that what lies between is made once, in memory that is used again.

Letters as in ssd.py; I inner width (M·P), E channels of the convolution (I + 2·G·N: x, B, C), K its kernel.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from minitron.families import ssd
from minitron.families.blockwise import Buffers, FeedForward, Norm, convolve, convolve_back, normalise, normalise_back
from minitron.families.packed import by_document
from minitron.families.ssd import Block, Chunk, Part, Sequence, chunk_gradients, chunk_outputs, keeping, own_precision, state_blocks


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of a mixer. in_proj's outputs are z I | x I | B G·N | C G·N | dt M."""

    heads: int
    head_dim: int
    groups: int
    state: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    def parts(self, projected) -> Iterator[Part]:
        return ssd.parts(len(projected), self.heads, self.head_dim, self.groups, self.state, projected.device)

    def time_steps(self, projected, dt_bias):
        """dt before softplus, [B, T, M]."""
        return projected[..., -self.heads :].float() + dt_bias


class _Heart(torch.autograd.Function):
    """From in_proj's output [B, T, …] to the normed [B, T, I], from a state of zeros."""

    @staticmethod
    @own_precision
    def forward(ctx, projected, dt_bias, A, D, conv_weight, conv_bias, norm_weight, sizes, epsilon, needs_gradient):
        normed = torch.empty(*projected.shape[:2], sizes.inner, device=projected.device)
        y = torch.empty_like(normed) if needs_gradient else None
        scale, saved = torch.empty(*projected.shape[:2], sizes.groups, device=projected.device), []
        dt = F.softplus(sizes.time_steps(projected, dt_bias))
        for part in sizes.parts(projected):
            walk = _Walk(sizes, part, projected, dt, A, D, conv_weight, conv_bias, keep_totals=False)
            states, blocks = state_blocks(walk.zero_state(), len(walk.chunks), needs_gradient)
            weight, (normed_part,), scale_part = norm_weight[walk.inner], walk.own(normed), scale[part.rows, :, part.groups]
            for number, tokens in enumerate(walk.chunks):
                gate = walk.gate[:, tokens]
                y_rows = walk.buffers("y", *gate.shape) if y is None else walk.own(y)[0][:, tokens]
                chunk_outputs(walk.chunk(number), walk.D, blocks[number], blocks[number + 1], walk.by_head(y_rows))
                normalise(y_rows, gate, weight, epsilon, normed_part[:, tokens], scale_part[:, tokens], walk.buffers)
            saved.append(states)
        if needs_gradient:
            ctx.sizes = sizes
            ctx.save_for_backward(projected, dt_bias, A, D, conv_weight, conv_bias, norm_weight, y, scale, *saved)
        return normed

    @staticmethod
    @once_differentiable
    @own_precision
    def backward(ctx, gradient):
        projected, dt_bias, A, D, conv_weight, conv_bias, norm_weight, y, scale, *saved = ctx.saved_tensors
        sizes = ctx.sizes
        before_softplus = sizes.time_steps(projected, dt_bias)
        dt, g_dt, g_projected = F.softplus(before_softplus), torch.empty_like(before_softplus), torch.empty(projected.shape, device=projected.device)
        gA, gD, g_norm, g_conv, g_bias = (torch.zeros_like(tensor) for tensor in (A, D, norm_weight, conv_weight, conv_bias))
        for part, states in zip(sizes.parts(projected), saved, strict=True):
            walk = _Walk(sizes, part, projected, dt, A, D, conv_weight, conv_bias, keep_totals=True)
            weight, g_weight, scale_part = norm_weight[walk.inner], g_norm[walk.inner], scale[part.rows, :, part.groups]
            y_part, gradient_part, g_gate = walk.own(y, gradient, g_projected)
            g_state, gA_part, gD_part = Block(torch.zeros_like(states[0])), torch.zeros_like(walk.A), torch.zeros_like(walk.D)
            g_x, g_B, g_C = (torch.empty_like(tensor) for tensor in (walk.x, walk.B, walk.C))
            for number, tokens in reversed(list(enumerate(walk.chunks))):
                y_rows = y_part[:, tokens]
                gy_rows = walk.buffers("gy", *y_rows.shape)
                normalise_back(gradient_part[:, tokens], y_rows, walk.gate[:, tokens], weight, scale_part[:, tokens], gy_rows, g_gate[:, tokens], g_weight,
                               walk.buffers)  # fmt: skip
                gA_chunk, gD_chunk, g_B[:, tokens], g_C[:, tokens] = chunk_gradients(
                    walk.chunk(number), walk.A, walk.D, walk.by_head(y_rows), walk.by_head(gy_rows), states[number], states[number + 1], g_state,
                    walk.by_head(g_x[:, tokens]), part.heads(g_dt, tokens)[..., None],
                )  # fmt: skip
                gA_part += gA_chunk
                gD_part += gD_chunk
            part.per_head(gA).add_(gA_part)
            part.per_head(gD).add_(gD_part)
            for stream, g_after in zip(walk.streams, (walk.by_group(g_x), walk.by_group(g_B), walk.by_group(g_C)), strict=True):
                g_total = walk.buffers("g total", *stream.total.shape)
                torch.ops.aten.silu_backward.grad_input(g_after, stream.total.view(g_after.shape), grad_input=g_total.view(g_after.shape))
                g_projected[part.rows, :, stream.projected], g_taps, g_bias_part = convolve_back(g_total, stream.raw, conv_weight[stream.convolved])
                g_conv[stream.convolved] += g_taps
                g_bias[stream.convolved] += g_bias_part
        g_dt *= torch.sigmoid(before_softplus)
        g_projected[..., -sizes.heads :] = g_dt
        return g_projected.to(projected.dtype), g_dt.sum((0, 1)), gA, gD, g_conv, g_bias, g_norm, None, None, None


class _Stream:
    """x, B or C of a part on its way through the convolution."""

    def __init__(self, part: Part, first: int, width: int, sizes: _Sizes, projected, conv_weight, conv_bias):
        self.convolved = slice(first, first + width)  # its channels among the convolution's
        self.projected = slice(sizes.inner + first, sizes.inner + first + width)  # and among in_proj's
        self.raw = projected[part.rows, :, self.projected].float()
        self.total = convolve(self.raw, conv_weight[self.convolved], conv_bias[self.convolved])  # before silu


class _Walk:
    """A part of the batch on its way through the mixer, and the ways to its tensors (views)."""

    def __init__(self, sizes: _Sizes, part: Part, projected, dt, A, D, conv_weight, conv_bias, *, keep_totals: bool):
        first, some, width = part.groups.start, part.groups.stop - part.groups.start, sizes.inner // sizes.groups
        self.sizes, self.part, self.num_groups, self.buffers = sizes, part, some, Buffers(projected.device)
        self.A, self.D = (part.per_head(vector).contiguous() for vector in (A, D))
        self.sequence = Sequence(part.heads(dt), self.A, ssd.CHUNK_TOKENS)
        self.chunks = self.sequence.chunks()
        self.inner = slice(first * width, (first + some) * width)  # the part's channels of z, x and y
        (self.gate,) = (tensor.float() for tensor in self.own(projected))
        places = ((0, width), (sizes.inner, sizes.state), (sizes.inner + sizes.groups * sizes.state, sizes.state))  # of x, B and C: where, how much a group
        self.streams = [_Stream(part, start + first * each, some * each, sizes, projected, conv_weight, conv_bias) for start, each in places]
        x, *matrices = (stream.total for stream in self.streams)
        self.x = torch.ops.aten.silu.out(x, out=self.buffers("x", *x.shape) if keep_totals else x)
        # As one batch of matrices, [B·G, T, N].
        self.B, self.C = (self.silu_by_group(name, total) for name, total in zip("BC", matrices, strict=True))

    def own(self, *tensors):
        """The part's rows and channels of tensors [B, T, I, …]."""
        return tuple(tensor[self.part.rows, :, self.inner] for tensor in tensors)

    def zero_state(self):
        """[B, G, N, R, P]."""
        return self.A.new_zeros(*self.sequence.shape, self.sizes.state, self.A.shape[3], self.sizes.head_dim)

    def chunk(self, number: int) -> Chunk:
        tokens = self.chunks[number]
        return Chunk(self.sequence, number, self.by_head(self.x[:, tokens]), self.B[:, tokens], self.C[:, tokens])

    def silu_by_group(self, name: str, total):
        """[B, T, G·N] → [B·G, T, N]."""
        grouped = self.by_group(total).transpose(1, 2)
        return torch.ops.aten.silu.out(grouped, out=self.buffers(name, *grouped.shape)).flatten(0, 1)

    def by_head(self, rows):
        """[B, L, G·R·P] → [B, G, L, R, P]."""
        return rows.view(*rows.shape[:2], self.num_groups, -1, self.sizes.head_dim).transpose(1, 2)

    def by_group(self, tensor):
        """[B, T, G·N] or [B·G, T, N] → [B, T, G, N]."""
        if len(tensor) == len(self.streams[0].raw):
            return tensor.unflatten(2, (self.num_groups, -1))
        return tensor.unflatten(0, (-1, self.num_groups)).transpose(1, 2)


def _mixer(module, hidden_states, *, theirs: Callable, cache_params=None, attention_mask=None, seq_idx=None, **kwargs):
    """NemotronHMamba2Mixer.forward; transformers' own where there is a cache, a mask or a limit to the time step.

    `seq_idx` [B, T] numbers the documents of packed rows.
    """
    if cache_params is not None or attention_mask is not None or module.time_step_limit != (0.0, float("inf")) or module.activation != "silu":
        return theirs(module, hidden_states, cache_params=cache_params, attention_mask=attention_mask, seq_idx=seq_idx, **kwargs)
    sizes = _Sizes(module.num_heads, module.head_dim, module.n_groups, module.ssm_state_size)
    bias = module.D.new_zeros(module.conv_dim) if module.conv1d.bias is None else module.conv1d.bias
    weights = (module.dt_bias, -torch.exp(module.A_log.float()), module.D, module.conv1d.weight.squeeze(1), bias, module.norm.weight)
    weights = [weight.float() for weight in weights]

    def heart(projected):
        return _Heart.apply(*keeping(projected, *weights, sizes, module.norm.variance_epsilon))

    projected = module.in_proj(hidden_states)
    normed = heart(projected) if seq_idx is None else by_document(heart, seq_idx, projected)
    return module.out_proj(normed.to(hidden_states.dtype))


def _chunk_scan(hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
                dt_limit=(0.0, float("inf")), return_final_states=False, **_):  # fmt: skip
    """mamba2_chunk_scan, for the mixer with a cache."""
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = torch.clamp(F.softplus(dt) if dt_softplus else dt, *dt_limit)
    y, final = ssd.scan(hidden_states, dt, A, B, C, D, initial_states)
    return (y, final) if return_final_states else y


def _norm(module, hidden_states, *, theirs: Callable):
    """NemotronHRMSNorm.forward."""
    if hidden_states.dtype != torch.float32:
        return theirs(module, hidden_states)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return Norm.apply(rows, module.weight.float(), module.variance_epsilon).view(hidden_states.shape)


def _feed_forward(module, x, *, theirs: Callable):
    """NemotronHMLP.forward; transformers' own where something listens to what lies between (hooks), and for anything but float32 without biases."""
    up, activation, down = module.up_proj, module.act_fn, module.down_proj
    listened = any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks for part in (up, activation, down))
    plain = type(up) is type(down) is nn.Linear and up.bias is None and down.bias is None and module.config.mlp_hidden_act == "relu2"
    if listened or not plain or {x.dtype, up.weight.dtype} != {torch.float32} or torch.is_autocast_enabled(x.device.type):
        return theirs(module, x)
    return FeedForward.apply(*keeping(x.reshape(-1, x.shape[-1]), up.weight, down.weight)).view(*x.shape[:-1], -1)


@functools.cache
def replacements() -> tuple[tuple[object, str, Callable], ...]:
    """What `install` changes, as (owner, name, new function)."""
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    modules = ((modeling.NemotronHMamba2Mixer, _mixer), (modeling.NemotronHRMSNorm, _norm), (modeling.NemotronHMLP, _feed_forward))
    return (modeling, "mamba2_chunk_scan", _chunk_scan), *((owner, "forward", _method(ours, owner.forward)) for owner, ours in modules)


def _method(ours: Callable, theirs: Callable) -> Callable:
    theirs = getattr(theirs, "in_place_of", theirs)  # where ours stands already, not a layer upon it

    @functools.wraps(theirs)
    def forward(module, *args, **kwargs):
        return ours(module, *args, theirs=theirs, **kwargs)

    forward.in_place_of = theirs
    return forward
