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
from torch.autograd.function import once_differentiable

from minitron.families import ssd
from minitron.families.blockwise import Buffers, Norm, SquaredRelu, convolve, convolve_back, normalise, normalise_back
from minitron.families.packed import by_document
from minitron.families.ssd import Block, Chunk, Part, Sequence, chunk_gradients, chunk_outputs, heads_first, keeping, own_precision, state_blocks


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
            walk = _Walk(sizes, part, projected, dt, A, D, conv_weight, conv_bias)
            states, blocks = state_blocks(walk.zero_state(), len(walk.chunks), needs_gradient)
            weight, (normed_part,), scale_part = norm_weight[walk.inner], walk.own(normed), scale[part.rows, :, part.groups]
            for number, tokens in enumerate(walk.chunks):
                chunk, _, _ = walk.chunk(number, keep_total=False)
                gate = walk.gate[:, tokens]
                y_rows = walk.buffers("y", *gate.shape) if y is None else walk.own(y)[0][:, tokens]
                chunk_outputs(chunk, walk.D, blocks[number], blocks[number + 1], walk.by_head(y_rows))
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
            walk = _Walk(sizes, part, projected, dt, A, D, conv_weight, conv_bias)
            weight, g_weight, scale_part = norm_weight[walk.inner], g_norm[walk.inner], scale[part.rows, :, part.groups]
            y_part, gradient_part, g_gate = walk.own(y, gradient, g_projected)
            g_state, gA_part, gD_part = Block(torch.zeros_like(states[0])), torch.zeros_like(walk.A), torch.zeros_like(walk.D)
            g_taps, g_bias_part = walk.taps.new_zeros(len(walk.taps), walk.sequence.length, walk.taps.shape[1]), torch.zeros_like(walk.bias)
            for number, tokens in reversed(list(enumerate(walk.chunks))):
                chunk, total, raw = walk.chunk(number, keep_total=True)
                y_rows, g_total = y_part[:, tokens], walk.buffers("g total", *total.shape)
                gy_rows = walk.buffers("gy", *y_rows.shape)
                normalise_back(gradient_part[:, tokens], y_rows, walk.gate[:, tokens], weight, scale_part[:, tokens], gy_rows, g_gate[:, tokens], g_weight,
                               walk.buffers)  # fmt: skip
                g_x, g_B, g_C = walk.split(g_total)
                gA_chunk, gD_chunk, *g_matrices = chunk_gradients(
                    chunk, walk.A, walk.D, walk.by_head(y_rows), walk.by_head(gy_rows), Block(states[number]), states[number + 1], g_state, g_x,
                    part.heads(g_dt, tokens)[..., None],
                )  # fmt: skip
                gA_part += gA_chunk
                gD_part += gD_chunk
                for view, own in zip((g_B, g_C), g_matrices, strict=True):
                    view.copy_(own.view(view.shape))
                torch.ops.aten.silu_backward.grad_input(g_total, total, grad_input=g_total)
                g_bias_part += g_total.sum((0, 1))
                walk.put_back(g_projected, tokens, convolve_back(g_total, raw, walk.taps, g_taps, walk.buffers))
            part.per_head(gA).add_(gA_part)
            part.per_head(gD).add_(gD_part)
            for columns, own in walk.columns:
                g_conv[columns] += g_taps[:, :, own].sum(1).t()
                g_bias[columns] += g_bias_part[own]
        g_dt *= torch.sigmoid(before_softplus)
        g_projected[..., -sizes.heads :] = g_dt
        return g_projected.to(projected.dtype), g_dt.sum((0, 1)), gA, gD, g_conv, g_bias, g_norm, None, None, None


class _Walk:
    """A part of the batch on its way through the mixer, and the ways to its tensors (views)."""

    def __init__(self, sizes: _Sizes, part: Part, projected, dt, A, D, conv_weight, conv_bias):
        first, some, width = part.groups.start, part.groups.stop - part.groups.start, sizes.inner // sizes.groups
        self.sizes, self.part, self.num_groups, self.buffers = sizes, part, some, Buffers(projected.device)
        self.A, self.D = (part.per_head(vector).contiguous() for vector in (A, D))
        self.sequence = Sequence(part.heads(dt), self.A, ssd.chunk_tokens(sizes.head_dim, sizes.state))
        self.chunks = self.sequence.chunks()
        self.inner = slice(first * width, (first + some) * width)  # the part's channels of z, x and y
        (self.gate,) = (tensor.float() for tensor in self.own(projected))
        # The part's channels of x, B and C among the convolution's, with where they lie side by side; all together where no group is missing.
        self.widths = (some * width, some * sizes.state, some * sizes.state)
        starts = (first * width, sizes.inner + first * sizes.state, sizes.inner + (sizes.groups + first) * sizes.state)
        places = (0, self.widths[0], self.widths[0] + self.widths[1])
        self.columns = [(slice(start, start + size), slice(place, place + size)) for start, place, size in zip(starts, places, self.widths, strict=True)]
        if some == sizes.groups:
            self.columns = [(slice(0, sum(self.widths)),) * 2]
        self.convolved = projected[part.rows, :, sizes.inner : sizes.inner + conv_weight.shape[0]]
        self.taps = torch.cat([conv_weight.t()[:, columns] for columns, _ in self.columns], dim=1).contiguous()
        self.bias = torch.cat([conv_bias[columns] for columns, _ in self.columns])
        self.carry = None

    def own(self, *tensors):
        """The part's rows and channels of tensors [B, T, I, …]."""
        return tuple(tensor[self.part.rows, :, self.inner] for tensor in tensors)

    def zero_state(self):
        """[R, B, G, N, P]."""
        return self.A.new_zeros(*self.sequence.shape, self.sizes.state, self.sizes.head_dim)

    def chunk(self, number: int, *, keep_total: bool) -> tuple[Chunk, torch.Tensor, torch.Tensor]:
        """The chunk for the scan, the convolution's outputs before silu (where they are to be kept), and its inputs with the K − 1 tokens before."""
        tokens, before = self.chunks[number], len(self.taps) - 1
        missing = max(0, before - tokens.start)
        inputs = self.convolved[:, tokens.start - before + missing : tokens.stop]
        if missing or len(self.columns) > 1:
            raw = self.buffers("raw", len(inputs), tokens.stop - tokens.start + before, sum(self.widths))
            raw[:, :missing] = 0
            for columns, own in self.columns:
                raw[:, missing:, own] = inputs[:, :, columns]
        else:
            raw = inputs
        total = convolve(raw, self.taps, self.bias, self.buffers)
        x, B, C = self.split(torch.ops.aten.silu.out(total, out=self.buffers("xBC", *total.shape) if keep_total else total))
        matrices = (self.buffers(name, *view.shape).copy_(view).view(-1, *view.shape[2:]) for name, view in (("B", B), ("C", C)))
        return Chunk(self.sequence, number, x, *matrices), total, raw

    def split(self, rows):
        """Of [B, L, the part's channels]: x [R, B, G, L, P], B and C [B, G, L, N]."""
        x, B, C = torch.split(rows, self.widths, dim=2)
        return self.by_head(x), *(each.view(*each.shape[:2], self.num_groups, self.sizes.state).transpose(1, 2) for each in (B, C))

    def by_head(self, rows):
        """[B, L, G·R·P] → [R, B, G, L, P]."""
        return heads_first(rows.view(*rows.shape[:2], self.num_groups, -1, self.sizes.head_dim))

    def put_back(self, g_projected, tokens: slice, g_raw) -> None:
        """Fills the gradient of the convolution's inputs. It reaches K − 1 tokens back: those wait for the chunk before, which comes next."""
        before = len(self.taps) - 1
        if self.carry is not None:
            g_raw[:, g_raw.shape[1] - before :] += self.carry
        self.carry = g_raw[:, :before].clone()
        g_convolved = g_projected[self.part.rows, tokens, self.sizes.inner :]
        for columns, own in self.columns:
            g_convolved[:, :, columns] = g_raw[:, before:, own]


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


def _squared_relu(module, x, *, theirs: Callable):
    """ReLUSquaredActivation.forward."""
    return SquaredRelu.apply(x.reshape(-1, x.shape[-1])).view(x.shape) if x.dtype == torch.float32 else theirs(module, x)


@functools.cache
def replacements() -> tuple[tuple[object, str, Callable], ...]:
    """What `install` changes, as (owner, name, new function)."""
    from transformers.activations import ReLUSquaredActivation
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    modules = ((modeling.NemotronHMamba2Mixer, _mixer), (modeling.NemotronHRMSNorm, _norm), (ReLUSquaredActivation, _squared_relu))
    return (modeling, "mamba2_chunk_scan", _chunk_scan), *((owner, "forward", _method(ours, owner.forward)) for owner, ours in modules)


def _method(ours: Callable, theirs: Callable) -> Callable:
    theirs = getattr(theirs, "in_place_of", theirs)  # where ours stands already, not a layer upon it

    @functools.wraps(theirs)
    def forward(module, *args, **kwargs):
        return ours(module, *args, theirs=theirs, **kwargs)

    forward.in_place_of = theirs
    return forward
