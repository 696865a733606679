"""mamba-ssm and causal-conv1d as transformers finds them: the same modules, names and arguments, computed by the project's scan on the CPU.

They take tensors of the pretended device alone and refuse layouts that the compiled convolution refuses. `install` comes before transformers' model
is imported, which looks for the packages once.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from pretended_cuda import KernelMemory, Pretended, on_cpu, place

VERSIONS = {"mamba-ssm": "2.3.2.post1", "causal-conv1d": "1.7.0"}
FOREVER = float("inf")


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None):
    """x [B, E, T], weight [E, K], bias [E], seq_idx int32 [B, T]: the causal convolution of each channel, documents apart."""
    _refuse_cpu_in_cpp(x=x, weight=weight, bias=bias, seq_idx=seq_idx)
    if initial_states is not None or return_final_states or final_states_out is not None:
        raise NotImplementedError("the pretended convolution starts from nothing and gives no state")
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError("activation must be None, silu, or swish")
    if x.stride(2) != 1 and x.stride(1) != 1:
        x = x.contiguous()
    channel_last = x.stride(1) == 1 and x.stride(2) > 1
    if channel_last and x.shape[1] % 8:
        raise RuntimeError(f"causal_conv1d only supports channel dimension divisible by 8 for now, got {x.shape[1]} (at {place()})")
    if channel_last and (x.stride(0) % 8 or x.stride(2) % 8):
        told = "causal_conv1d with channel last layout requires strides (x.stride(0) and x.stride(2)) to be multiples of 8"
        raise RuntimeError(f"{told}, got {tuple(x.stride())} (at {place()})")
    if seq_idx is not None and (not channel_last or seq_idx.dtype != torch.int32):
        raise RuntimeError(f"seq_idx must be int32 and is only supported for channel last layout (at {place()})")
    if not 2 <= weight.shape[1] <= 4:
        raise RuntimeError("causal_conv1d only supports width between 2 and 4")

    def computed(x, weight, bias, seq_idx):
        made = convolution(x, weight, bias, seq_idx, activation)
        return made.transpose(1, 2).contiguous().transpose(1, 2) if channel_last else made.contiguous()

    return on_cpu(computed, x, weight, bias, seq_idx)


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None):
    """One step, or a few: x [B, E] or [B, E, T]; conv_state [B, E, S], changed in place."""
    _refuse_cpu_in_cpp(x=x, conv_state=conv_state, weight=weight, bias=bias)
    if cache_seqlens is not None or conv_state_indices is not None:
        raise NotImplementedError("the pretended update knows no lengths and no indices")
    with torch.no_grad():
        new = x[..., None] if x.dim() == 2 else x
        both = torch.cat([conv_state, new.to(conv_state.dtype)], dim=-1)
        conv_state.copy_(both[..., -conv_state.shape[-1] :])
        made = on_cpu(lambda rows, weight, bias: convolution(rows, weight, bias, None, activation), both, weight, bias)[..., -new.shape[-1] :].to(x.dtype)
    return made[..., 0] if x.dim() == 2 else made


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
                              dt_softplus=False, dt_limit=(0.0, FOREVER), return_final_states=False, return_varlen_states=False):  # fmt: skip
    """x [B, T, M, P], dt [B, T, M], A [M], B and C [B, T, G, N], D [M]: y like x, and the final states [B, M, P, N] if asked for."""
    _refuse_cpu_in_triton(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx)
    if z is not None or cu_seqlens is not None or return_varlen_states:
        raise NotImplementedError("the pretended scan knows no z and no cu_seqlens")

    def computed(*tensors):
        y, final = scanned(*tensors, dt_softplus=dt_softplus, dt_limit=dt_limit)
        return (y.to(tensors[0].dtype), final) if return_final_states else y.to(tensors[0].dtype)

    scan = _scan_memory(x.shape[:2], x.shape[2:], B.shape[2:], x.dtype, chunk_size).scan()
    return on_cpu(computed, x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, memory=KernelMemory(forward=scan))


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    """One step of the scan: state [B, M, P, N], changed in place; x and dt [B, M, P], A [M, P, N], B and C [B, G, N], D and dt_bias [M, P]."""
    _refuse_cpu_in_triton(state, x, dt, A, B, C, D, dt_bias)
    if z is not None or state_batch_indices is not None:
        raise NotImplementedError("the pretended update knows no z and no indices")

    def computed(state, x, dt, A, B, C, D, dt_bias):
        dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
        dt = F.softplus(dt) if dt_softplus else dt
        B, C = (matrix.float().repeat_interleave(x.shape[1] // matrix.shape[1], 1)[:, :, None] for matrix in (B, C))
        state = state.float() * torch.exp(dt[..., None] * A.float()) + (dt * x.float())[..., None] * B
        y = (state * C).sum(-1)
        return state, (y if D is None else y + x.float() * D.float()).to(x.dtype)

    with torch.no_grad():
        new_state, y = on_cpu(computed, state, x, dt, A, B, C, D, dt_bias)
        state.copy_(new_state)
    return y


def mamba_split_conv1d_scan_combined(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, seq_idx=None,
                                     dt_limit=(0.0, FOREVER), return_final_states=False, activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6,
                                     outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True):  # fmt: skip
    """From in_proj's output [B, T, 2·M·P + 2·G·N + M] to out_proj's: convolution, scan, gated norm and projection as one operation."""
    _refuse_cpu_in_triton(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, initial_states, seq_idx, rmsnorm_weight, outproj_weight, outproj_bias)
    if initial_states is not None or return_final_states or norm_before_gate or rmsnorm_weight is None or outproj_weight is None:
        raise NotImplementedError("the pretended mixer is the one that NemotronH calls: from nothing, norm behind the gate, with out_proj")
    inner, heads = len(A) * headdim, len(A)
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else outproj_weight.dtype
    state = (len(conv1d_weight) - inner) // 2 // ngroups
    inside = _scan_memory(zxbcdt.shape[:2], (heads, headdim), (ngroups, state), zxbcdt.dtype, chunk_size)
    cast = 0 if half == outproj_weight.dtype else outproj_weight.numel() * half.itemsize  # kept cast
    memory = KernelMemory(keeps=inside.mixer_keeps() + cast, forward=inside.mixer(), backward=inside.mixer_back())

    def computed(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, norm_weight, out_weight, out_bias, seq_idx):
        z, xBC, dt = zxbcdt.split([inner, len(conv1d_weight), heads], dim=-1)
        xBC = convolution(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation).transpose(1, 2)
        x, *matrices = xBC.split([inner, *[(xBC.shape[2] - inner) // 2] * 2], dim=-1)
        x, B, C = x.unflatten(2, (heads, headdim)), *(matrix.unflatten(2, (ngroups, -1)) for matrix in matrices)
        y, _ = scanned(x, dt, A, B, C, D, dt_bias, None, seq_idx, dt_softplus=True, dt_limit=dt_limit)
        gated = (y.flatten(2) * F.silu(z.float())).unflatten(2, (ngroups, -1))
        normed = (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + rmsnorm_eps)).flatten(2) * norm_weight.float()
        return F.linear(normed.to(half), out_weight.to(half), None if out_bias is None else out_bias.to(half))

    return on_cpu(computed, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight, outproj_weight, outproj_bias, seq_idx, memory=memory)


def _scan_memory(rows_and_tokens, heads_and_dim, groups_and_state, dtype, chunk_size):
    """What the kernels take, as the project plans it; test_kernels.py holds that against their own Python."""
    from minitron.mamba.kernel_memory import ScanMemory

    return ScanMemory(*heads_and_dim, *groups_and_state, *rows_and_tokens, dtype.itemsize, chunk_size)


def convolution(x, weight, bias, seq_idx, activation):
    """The definition on CPU tensors [B, E, T]: a sum over taps, of tokens of the same document."""
    tokens, taps = x.shape[2], weight.shape[1]
    total = torch.zeros(x.shape) if bias is None else bias.float()[:, None].expand(x.shape)
    for back in range(min(taps, tokens)):
        earlier = x.float()[..., : tokens - back]
        if seq_idx is not None:
            earlier = earlier * (seq_idx[:, : tokens - back] == seq_idx[:, back:])[:, None]
        total = total + F.pad(earlier * weight.float()[:, taps - 1 - back, None], (back, 0))
    return (total if activation is None else F.silu(total)).to(x.dtype)


def scanned(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, *, dt_softplus, dt_limit):
    """The project's scan of CPU tensors: y, float32, and the final states. Of a packed row the state before goes to the document of number 0."""
    from minitron.mamba import ssd

    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    if seq_idx is None:
        return ssd.scan(x, dt, A, B, C, D, initial_states)
    if initial_states is None:
        initial_states = torch.zeros(len(x), *x.shape[2:], B.shape[3])
    rows = [_documents(*(tensor[row : row + 1] for tensor in (x, dt, B, C, initial_states)), A, D, seq_idx[row]) for row in range(len(x))]
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def _documents(x, dt, B, C, state, A, D, numbers_T):
    """One row, document after document: y [1, T, M, P], and the state after the last."""
    from minitron.mamba import ssd

    outputs, first = [], 0
    for number, length in zip(*(found.tolist() for found in numbers_T.unique_consecutive(return_counts=True)), strict=True):
        x_own, dt_own, B_own, C_own = (tensor[:, first : first + length] for tensor in (x, dt, B, C))
        y, state = ssd.scan(x_own, dt_own, A, B_own, C_own, D, state if number == 0 else torch.zeros_like(state))
        outputs.append(y)
        first += length
    return torch.cat(outputs, dim=1), state


def _refuse_cpu_in_cpp(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Pretended):
            raise RuntimeError(f"Expected {name}.is_cuda() to be true, but got false. (at {place()})")


def _refuse_cpu_in_triton(*tensors: torch.Tensor | None) -> None:
    for number, tensor in enumerate(tensors):
        if tensor is not None and not isinstance(tensor, Pretended):
            raise ValueError(f"Pointer argument (at {number}) cannot be accessed from Triton (cpu tensor?) (at {place()})")


MODULES = {
    "causal_conv1d": (causal_conv1d_fn, causal_conv1d_update),
    "mamba_ssm": (),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.ssd_combined": (mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined),
    "mamba_ssm.ops.triton.selective_state_update": (selective_state_update,),
}


class _Pretended(Distribution):
    def __init__(self, name: str) -> None:
        self._metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSIONS[name]}\n"

    def read_text(self, filename: str) -> str | None:
        return self._metadata if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return path


class _Finder(DistributionFinder):
    """Says that the packages are installed; their modules are in sys.modules already."""

    def find_spec(self, *_: Any) -> None:
        return None

    def find_distributions(self, context: DistributionFinder.Context = DistributionFinder.Context()):  # noqa: B008
        return [_Pretended(name) for name in VERSIONS if context.name is None or context.name.replace("_", "-").lower() == name]


def install() -> None:
    """Put the packages where Python finds them, in the place of those that may be installed."""
    for name, functions in MODULES.items():
        module = ModuleType(name, "pretended")
        module.__spec__, module.__path__, module.__version__ = ModuleSpec(name, None, is_package=True), [], VERSIONS[name.split(".")[0].replace("_", "-")]
        vars(module).update({function.__name__: function for function in functions})
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    sys.meta_path.insert(0, _Finder())
