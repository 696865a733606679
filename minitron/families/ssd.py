"""The Mamba-2 scan (SSD) and its causal convolution in plain torch, for machines without the CUDA kernels.

transformers' reference repeats B and C for every head and leaves the backward pass to autograd; here heads
of a group share B and C in one batched product, and both passes are written out. `install()` puts the two
functions in transformers' place: the one documented place where that happens.

Letters: B batch, T tokens, Z chunks of all rows (B·T/L), L chunk length, M heads, G groups, R heads per
group (M/G), P head dim, N state, K conv kernel, E channels of the convolution.
Source: SSD (arXiv 2405.21060, §6, block decomposition); the backward pass is derived in `_Scan.backward`.
"""

import torch
import torch.nn.functional as F

from minitron.families.packed import by_document

CHUNK_TOKENS = 32


def scan(x_BTMP, dt_BTM, A_M, B_BTGN, C_BTGN, D_M=None, initial_state=None):
    """y_t = C_t·h_t + D·x_t with h_t = exp(dt_t·A)·h_{t-1} + dt_t·B_t⊗x_t, per head; float32 throughout.

    Returns (y [B, T, M, P], final state [B, M, P, N]). `dt` is final (bias added, softplus taken).
    `initial_state` is [B, M, P, N] or None for zeros.
    """
    batch, tokens, heads, head_dim = x_BTMP.shape
    padding = -tokens % CHUNK_TOKENS
    x, dt, B, C = (_pad_tokens(t.float(), padding) for t in (x_BTMP, dt_BTM, B_BTGN, C_BTGN))
    groups, state = B.shape[2], B.shape[3]
    if initial_state is None:
        start = x.new_zeros(batch, groups, state, heads // groups * head_dim)
    else:  # [B, M, P, N] → [B, G, N, R·P]
        start = initial_state.float().reshape(batch, groups, -1, state).transpose(2, 3)
    y, final = _Scan.apply(x, dt, A_M.float(), B, C, start)
    final = final.transpose(2, 3).reshape(batch, heads, head_dim, state)
    y = y[:, :tokens]
    if D_M is not None:
        y = torch.addcmul(y, x[:, :tokens], D_M.float()[:, None])
    return y, final


def _pad_tokens(tensor, padding):
    return tensor if padding == 0 else F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, padding))


class _Scan(torch.autograd.Function):
    """Chunked SSD. Group layout [Z, G, L, R·P] serves the products with B and C, head layout [Z, M, L, P] those within a chunk."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, start):
        shape = _Shape(x, B)
        dt_ZML = shape.heads_first(dt)
        cum_ZML = torch.cumsum(dt_ZML * A[:, None], dim=-1)
        B_ZGLN, C_ZGLN = shape.groups_first(B), shape.groups_first(C)
        xd_ZMLP = shape.heads_first(x) * dt_ZML[..., None]

        weights_ZMLL = shape.within_chunk(C_ZGLN, B_ZGLN, _decay(cum_ZML))
        y_ZMLP = torch.matmul(weights_ZMLL, xd_ZMLP)

        to_end_ZML = torch.exp(cum_ZML[..., -1:] - cum_ZML)
        update_ZGNX = B_ZGLN.transpose(2, 3) @ shape.to_groups(xd_ZMLP * to_end_ZML[..., None])
        chunk_decay = shape.per_group(torch.exp(cum_ZML[..., -1]))
        states, final = _carry(start, update_ZGNX, chunk_decay, shape)

        y_ZMLP += shape.to_heads(C_ZGLN @ states) * torch.exp(cum_ZML)[..., None]
        ctx.save_for_backward(x, dt, A, B, C, cum_ZML, states, y_ZMLP)
        return shape.to_rows(y_ZMLP), final

    @staticmethod
    def backward(ctx, gy, g_final):
        """With c the cumulative log decay: every path through exp(c_l) is y_l itself and every path through
        exp(−c_s) is x_s·dt_s, so the gradient of c is Σ_p(gy·y) − Σ_p(xd·g_xd) plus what reaches a chunk's end.
        """
        x, dt, A, B, C, cum_ZML, states, y_ZMLP = ctx.saved_tensors
        shape = _Shape(x, B)
        dt_ZML, x_ZMLP, gy_ZMLP = shape.heads_first(dt), shape.heads_first(x), shape.heads_first(gy).contiguous()
        B_ZGLN, C_ZGLN = shape.groups_first(B), shape.groups_first(C)
        xd_ZMLP = x_ZMLP * dt_ZML[..., None]
        decay_ZMLL = _decay(cum_ZML)
        weights_ZMLL = shape.within_chunk(C_ZGLN, B_ZGLN, decay_ZMLL)

        # Through the carried state: y_off = exp(c_l)·C_l·h.
        gy_off = shape.to_groups(gy_ZMLP * torch.exp(cum_ZML)[..., None])
        gC = gy_off @ states.transpose(2, 3)
        end_decay = torch.exp(cum_ZML[..., -1])
        g_update, g_start = _carry_back(C_ZGLN.transpose(2, 3) @ gy_off, g_final, shape.per_group(end_decay), shape)
        to_end = torch.exp(cum_ZML[..., -1:] - cum_ZML)[..., None]
        gB = shape.to_groups(xd_ZMLP * to_end) @ g_update.transpose(2, 3)
        gxd_end = shape.to_heads(B_ZGLN @ g_update) * to_end
        g_end = (xd_ZMLP * gxd_end).sum((2, 3)) + end_decay * shape.sum_per_head(states * g_update)

        # Within the chunk: y_diag = W·xd, W = (C·Bᵀ) ∘ decay.
        gxd = torch.baddbmm(gxd_end.flatten(0, 1), weights_ZMLL.flatten(0, 1).transpose(1, 2), gy_ZMLP.flatten(0, 1)).view_as(gxd_end)
        g_products = shape.sum_group(torch.matmul(gy_ZMLP, xd_ZMLP.transpose(2, 3)).mul_(decay_ZMLL))
        gC = gC + g_products @ B_ZGLN
        gB = gB + g_products.transpose(2, 3) @ C_ZGLN

        g_xdx = (gxd * x_ZMLP).sum(-1)
        g_cum = (gy_ZMLP * y_ZMLP).sum(-1) - g_xdx * dt_ZML
        g_cum[..., -1] += g_end
        g_log = g_cum.flip(-1).cumsum(-1).flip(-1)
        g_dt = g_xdx + g_log * A[:, None]
        gA = (g_log * dt_ZML).sum((0, 2))
        return shape.to_rows(gxd * dt_ZML[..., None]), shape.to_rows(g_dt), gA, shape.to_rows(gB), shape.to_rows(gC), g_start


def _decay(cum_ZML):
    """exp(c_l − c_s) for s ≤ l, else 0: [Z, M, L, L]. The difference is masked before exp, so nothing overflows."""
    length = cum_ZML.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=cum_ZML.device).triu(1)
    difference = cum_ZML[..., :, None] - cum_ZML[..., None, :]
    return difference.masked_fill_(later, float("-inf")).exp_()


def _carry(start, update_ZGNX, chunk_decay, shape):
    """State at the start of every chunk, and the final one: h ← decay·h + update."""
    update = update_ZGNX.view(shape.batch, shape.chunks, *update_ZGNX.shape[1:])
    decay = chunk_decay.view(shape.batch, shape.chunks, shape.groups, 1, -1)
    states, state = torch.empty_like(update), start
    for chunk in range(shape.chunks):
        states[:, chunk] = state
        state = torch.addcmul(update[:, chunk], state, decay[:, chunk])
    return states.flatten(0, 1), state


def _carry_back(g_states, g_final, chunk_decay, shape):
    """The recurrence run backwards: gradients of every chunk's update and of the start state."""
    g_states = g_states.view(shape.batch, shape.chunks, *g_states.shape[1:])
    decay = chunk_decay.view(shape.batch, shape.chunks, shape.groups, 1, -1)
    g_updates, gradient = torch.empty_like(g_states), g_final
    for chunk in reversed(range(shape.chunks)):
        g_updates[:, chunk] = gradient
        gradient = torch.addcmul(g_states[:, chunk], gradient, decay[:, chunk])
    return g_updates.flatten(0, 1), gradient


class _Shape:
    """The layouts of one call and the ways between them."""

    def __init__(self, x_BTMP, B_BTGN):
        self.batch, tokens, self.heads, self.head_dim = x_BTMP.shape
        self.groups = B_BTGN.shape[2]
        self.chunks = tokens // CHUNK_TOKENS
        self.per = self.heads // self.groups

    def heads_first(self, rows):
        """[B, T, M, …] → [Z, M, L, …], a view."""
        return rows.reshape(self.batch * self.chunks, CHUNK_TOKENS, *rows.shape[2:]).transpose(1, 2)

    groups_first = heads_first

    def to_rows(self, tensor):
        """[Z, M or G, L, …] → [B, T, M or G, …]."""
        return tensor.transpose(1, 2).reshape(self.batch, -1, tensor.shape[1], *tensor.shape[3:])

    def to_groups(self, tensor_ZMLP):
        """[Z, M, L, P] → [Z, G, L, R·P]."""
        split = tensor_ZMLP.view(-1, self.groups, self.per, CHUNK_TOKENS, self.head_dim)
        return split.transpose(2, 3).reshape(-1, self.groups, CHUNK_TOKENS, self.per * self.head_dim)

    def to_heads(self, tensor_ZGLX):
        """[Z, G, L, R·P] → [Z, M, L, P], a copy."""
        split = tensor_ZGLX.view(-1, self.groups, CHUNK_TOKENS, self.per, self.head_dim)
        return split.transpose(2, 3).reshape(-1, self.heads, CHUNK_TOKENS, self.head_dim)

    def within_chunk(self, C_ZGLN, B_ZGLN, decay_ZMLL):
        """(C·Bᵀ) ∘ decay: [Z, M, L, L], the product formed once per group."""
        products = C_ZGLN @ B_ZGLN.transpose(2, 3)
        split = decay_ZMLL.view(-1, self.groups, self.per, CHUNK_TOKENS, CHUNK_TOKENS)
        return (split * products[:, :, None]).view_as(decay_ZMLL)

    def sum_group(self, tensor_ZMLL):
        return tensor_ZMLL.view(-1, self.groups, self.per, CHUNK_TOKENS, CHUNK_TOKENS).sum(2)

    def per_group(self, decay_ZM):
        """[Z, M] → [Z, G, 1, R·P], one value repeated over a head's channels."""
        return decay_ZM.view(-1, self.groups, 1, self.per, 1).expand(-1, -1, -1, -1, self.head_dim).reshape(-1, self.groups, 1, self.per * self.head_dim)

    def sum_per_head(self, tensor_ZGNX):
        """[Z, G, N, R·P] → [Z, M], summed over state and channels."""
        return tensor_ZGNX.sum(2).view(-1, self.heads, self.head_dim).sum(-1)


class _ConvSilu(torch.autograd.Function):
    """silu(depthwise causal convolution + bias) on rows [B, T, E], as K shifted multiply-adds."""

    @staticmethod
    def forward(ctx, x_BTE, weight_EK, bias_E):
        kernel, tokens = weight_EK.shape[1], x_BTE.shape[1]
        padded = F.pad(x_BTE, (0, 0, kernel - 1, 0))
        taps = weight_EK.t().contiguous()
        total = torch.mul(padded[:, :tokens], taps[0]) if bias_E is None else torch.addcmul(bias_E, padded[:, :tokens], taps[0])
        for k in range(1, kernel):
            total.addcmul_(padded[:, k : k + tokens], taps[k])
        ctx.save_for_backward(padded, total, taps)
        ctx.has_bias = bias_E is not None
        return F.silu(total)

    @staticmethod
    def backward(ctx, gradient):
        padded, total, taps = ctx.saved_tensors
        kernel, tokens = taps.shape[0], total.shape[1]
        g_total = torch.ops.aten.silu_backward(gradient, total)
        g_padded = torch.zeros_like(padded)
        for k in range(kernel):
            g_padded[:, k : k + tokens].addcmul_(g_total, taps[k])
        g_taps = torch.stack([(g_total * padded[:, k : k + tokens]).sum((0, 1)) for k in range(kernel)], dim=1)
        return g_padded[:, kernel - 1 :], g_taps, g_total.sum((0, 1)) if ctx.has_bias else None


def _chunk_scan(hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
                dt_limit=(0.0, float("inf")), return_final_states=False, seq_idx=None, **_):  # fmt: skip
    """transformers' signature for `scan`; `seq_idx` [B, T] numbers the documents of packed rows."""
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = torch.clamp(F.softplus(dt) if dt_softplus else dt, *dt_limit)
    if seq_idx is not None:
        assert initial_states is None and not return_final_states, "packed rows begin and end with no state"
        return by_document(lambda x, dt, B, C: scan(x, dt, A, B, C, D)[0], seq_idx, hidden_states, dt, B, C)
    y, final = scan(hidden_states, dt, A, B, C, D, initial_states)
    return (y, final) if return_final_states else y


def _causal_conv(hidden_states, weight, bias=None, activation=None, seq_idx=None, **_):
    """transformers' signature for the convolution: [B, E, T] in and out."""
    assert activation in ("silu", "swish"), activation
    rows = hidden_states.transpose(1, 2).to(weight.dtype)
    result = _ConvSilu.apply(rows, weight, bias) if seq_idx is None else by_document(lambda rows: _ConvSilu.apply(rows, weight, bias), seq_idx, rows)
    return result.transpose(1, 2).to(hidden_states.dtype)


def _no_kernel_for_all(*_, **__):
    """transformers' answer where no kernel does a whole mixer at once; its own stand-in refuses packed rows."""


def install() -> None:
    """Use these functions in transformers' NemotronH, in this process from here on."""
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    modeling.mamba2_chunk_scan = _chunk_scan
    modeling.causal_conv1d_fn = _causal_conv
    modeling.mamba2_split_conv1d_scan_combined = _no_kernel_for_all
