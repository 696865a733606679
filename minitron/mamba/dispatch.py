"""Which function computes a layer of NemotronH: decided by where its tensors are, here and nowhere else.

transformers decides once, by which packages are installed, and hands tensors of a CPU to kernels that only a GPU has. After `install`, tensors on a CPU
go through our functions (mixer.py) and torch's convolution; tensors on a GPU through mamba-ssm's and causal-conv1d's kernels where they are usable, else
through ours too, which keep packed documents apart where transformers' reference refuses to.
"""

import functools
import inspect
from collections.abc import Callable

import torch

from minitron.mamba import mixer
from minitron.mamba.kernels import unusable_kernel

CONVOLUTION_STRIDE = 8  # causal-conv1d wants strides of rows and tokens that are multiples of it where channels lie side by side


def install() -> None:
    """Put the choice in transformers' place, in this process from here on. Doing it again changes nothing."""
    for owner, name, function in replacements():
        setattr(owner, name, function)


@functools.cache
def replacements() -> tuple[tuple[object, str, Callable], ...]:
    """What `install` changes, as (owner, name, new function)."""
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    mixing, norm, feeding = modeling.NemotronHMamba2Mixer, modeling.NemotronHRMSNorm, modeling.NemotronHMLP
    methods = ((mixing, mixer.mixer_forward), (norm, mixer.norm_forward), (feeding, mixer.mlp_forward))
    return (
        (modeling, "mamba2_chunk_scan", _function(mixer.chunk_scan, modeling.mamba2_chunk_scan)),
        (modeling, "causal_conv1d_fn", _function(_convolve, modeling.causal_conv1d_fn, prepare=_even_strides)),
        *((modeling, name, _function(inspect.unwrap(getattr(modeling, name)), getattr(modeling, name)))
          for name in ("causal_conv1d_update", "mamba2_split_conv1d_scan_combined", "mamba2_selective_state_update")),
        *((owner, "forward", _method(ours, owner.forward)) for owner, ours in methods),
    )  # fmt: skip


def is_ours(device: torch.device) -> bool:
    """Whether our functions compute on a device: on every CPU, and on a GPU that lacks usable kernels."""
    return device.type == "cpu" or not _has_kernels()


@functools.cache
def _has_kernels() -> bool:
    return unusable_kernel() is None


def _function(ours: Callable, theirs: Callable, prepare: Callable = lambda first: first) -> Callable:
    """Chooses by the first argument; `prepare` is done to it before it goes to a kernel."""
    theirs = getattr(theirs, "in_place_of", theirs)  # where ours stands already, not a layer upon it

    @functools.wraps(theirs)
    def function(first, *args, **kwargs):
        return ours(first, *args, **kwargs) if is_ours(first.device) else theirs(prepare(first), *args, **kwargs)

    function.in_place_of = theirs
    return function


def _method(ours: Callable, theirs: Callable) -> Callable:
    """A module's forward, chosen by its input; ours may fall back on theirs."""
    theirs = getattr(theirs, "in_place_of", theirs)

    @functools.wraps(theirs)
    def forward(module, hidden_states, *args, **kwargs):
        if is_ours(hidden_states.device):
            return ours(module, hidden_states, *args, theirs=theirs, **kwargs)
        return theirs(module, hidden_states, *args, **kwargs)

    forward.in_place_of = theirs
    return forward


def _convolve(hidden_states, weight, bias=None, activation=None, seq_idx=None, **_):
    """causal_conv1d_fn in plain torch, for the mixer with a cache or a mask. Raises ValueError for packed rows, which never come with either."""
    if seq_idx is not None:
        raise ValueError("packed rows go document by document (packed.py); with a cache or a mask they cannot")
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    return inspect.unwrap(modeling.causal_conv1d_fn)(hidden_states, weight, bias, activation)


def _even_strides(x_BET: torch.Tensor) -> torch.Tensor:
    """The convolution's input as the kernel takes it. It is a slice of in_proj's output, whose width is odd where heads are no multiple of 8."""
    channels_last = x_BET.stride(1) == 1 and (x_BET.stride(0) % CONVOLUTION_STRIDE or x_BET.stride(2) % CONVOLUTION_STRIDE)
    return x_BET.contiguous() if channels_last else x_BET
