"""Which function computes a layer of NemotronH, Mamba-2 or Granite-4-H: decided by where its tensors are, here and nowhere else.

transformers decides once, by which packages are installed, and hands tensors of a CPU to kernels that only a GPU has. After `install`, tensors on a CPU
go through our functions (mixer.py) and torch's convolution; tensors on a GPU through mamba-ssm's and causal-conv1d's kernels where they are usable, else
through ours too, which keep packed documents apart where transformers' reference refuses to.
"""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from minitron.mamba import mixer, token_blocks
from minitron.mamba.kernels import unusable_kernel

CONVOLUTION_STRIDE = 8  # causal-conv1d wants strides of rows and tokens that are multiples of it where channels lie side by side


def install() -> None:
    """Put the choice in transformers' place, in this process from here on. Doing it again changes nothing."""
    for owner, name, function in replacements():
        setattr(owner, name, function)


@functools.cache
def replacements() -> tuple[tuple[object, str, Callable], ...]:
    """What `install` changes, as (owner, name, new function)."""
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
    from transformers.models.mamba2 import modeling_mamba2 as mamba2
    from transformers.models.nemotron_h import modeling_nemotron_h as nemotron_h

    methods = (
        (nemotron_h.NemotronHMamba2Mixer, mixer.mixer_forward, _mix_long), (nemotron_h.NemotronHRMSNorm, mixer.norm_forward, _feed_long),
        (nemotron_h.NemotronHMLP, mixer.mlp_forward, _feed_long), (nemotron_h.NemotronHAttention, _theirs, _attend_long),
        (nemotron_h.NemotronHTopkRouter, _route, _route_exactly),
        (mamba2.Mamba2Mixer, mixer.mixer_forward, _mix_long), (mamba2.Mamba2RMSNorm, mixer.norm_forward, _feed_long),
        (granite.GraniteMoeHybridMambaLayer, mixer.mixer_forward, _mix_long), (granite.GraniteMoeHybridRMSNorm, mixer.norm_forward, _feed_long),
        (granite.GraniteMoeHybridTopKRouter, _route, _route_exactly),
    )  # fmt: skip
    return (*_functions(nemotron_h), *_functions(mamba2), *_functions(granite),
            *((owner, "forward", _method(ours, owner.forward, in_parts)) for owner, ours, in_parts in methods))  # fmt: skip


def _functions(modeling: ModuleType) -> tuple[tuple[object, str, Callable], ...]:
    """Those of a module of transformers that a Mamba-2 mixer calls."""
    return (
        (modeling, "mamba2_chunk_scan", _function(mixer.chunk_scan, modeling.mamba2_chunk_scan)),
        (modeling, "causal_conv1d_fn", _function(_convolve, modeling.causal_conv1d_fn, prepare=_as_kernels_take)),
        *((modeling, name, _function(inspect.unwrap(getattr(modeling, name)), getattr(modeling, name)))
          for name in ("causal_conv1d_update", "mamba2_split_conv1d_scan_combined", "mamba2_selective_state_update")),
    )  # fmt: skip


def is_ours(device: torch.device) -> bool:
    """Whether our functions compute on a device: on every CPU, and on a GPU that lacks usable kernels."""
    return device.type == "cpu" or not _has_kernels()


@functools.cache
def _has_kernels() -> bool:
    return unusable_kernel() is None


def _function(ours: Callable, theirs: Callable, prepare: Callable = lambda first, **named: (first, named)) -> Callable:
    """Chooses by the first argument; `prepare` is done to it and what is given by name before they go to a kernel."""
    theirs = getattr(theirs, "in_place_of", theirs)  # where ours stands already, not a layer upon it

    @functools.wraps(theirs)
    def function(first, *args, **kwargs):
        if is_ours(first.device):
            return ours(first, *args, **kwargs)
        first, kwargs = prepare(first, **kwargs)
        return theirs(first, *args, **kwargs)

    function.in_place_of = theirs
    return function


def _method(ours: Callable, theirs: Callable, in_parts: Callable) -> Callable:
    """A module's forward, chosen by its input; ours may fall back on theirs, and theirs may go in parts."""
    theirs = getattr(theirs, "in_place_of", theirs)

    @functools.wraps(theirs)
    def forward(module, hidden_states, *args, **kwargs):
        if is_ours(hidden_states.device):
            return ours(module, hidden_states, *args, theirs=theirs, **kwargs)
        return in_parts(functools.partial(theirs, module), hidden_states, *args, **kwargs)

    forward.in_place_of = theirs
    return forward


def _convolve(hidden_states, weight, bias=None, activation=None, seq_idx=None, **_):
    """causal_conv1d_fn in plain torch, for the mixer with a cache or a mask. Raises ValueError for packed rows, which never come with either."""
    if seq_idx is not None:
        raise ValueError("packed rows go document by document (packed.py); with a cache or a mask they cannot")
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    return inspect.unwrap(modeling.causal_conv1d_fn)(hidden_states, weight, bias, activation)


def _as_kernels_take(x_BET: torch.Tensor, **named) -> tuple[torch.Tensor, dict]:
    """The convolution's input, a slice of in_proj's output, whose width is odd where heads are no multiple of 8; and `seq_idx` [B, ≤ T] with a number for
    every input, 0 for those that a block of a long row has from the one before."""
    documents_BT = named.get("seq_idx")
    if documents_BT is not None and documents_BT.shape[1] < x_BET.shape[2]:
        named["seq_idx"] = F.pad(documents_BT, (x_BET.shape[2] - documents_BT.shape[1], 0))
    channels_last = x_BET.stride(1) == 1 and (x_BET.stride(0) % CONVOLUTION_STRIDE or x_BET.stride(2) % CONVOLUTION_STRIDE)
    if not channels_last:
        return x_BET, named
    return (x_BET.contiguous() if documents_BT is None else x_BET.transpose(1, 2).contiguous().transpose(1, 2)), named


def _mix_long(forward: Callable, hidden_states, cache_params=None, attention_mask=None, seq_idx=None, **_):
    """A Mamba-2 mixer's forward, by blocks where the row is long and whole. What else the model was given, positions say, is no kernel's."""
    if cache_params is None and attention_mask is None and token_blocks.goes_in_parts(hidden_states):
        return token_blocks.mix_by_blocks(forward, hidden_states, seq_idx)
    documents = {} if seq_idx is None else {"seq_idx": seq_idx}
    return forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **documents)


def _feed_long(forward: Callable, x):
    return token_blocks.feed_by_blocks(forward, x) if token_blocks.goes_in_parts(x) else forward(x)


def _attend_long(forward: Callable, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
    """Attention's forward, by heads where the row is long and whole and nothing listens to its projections, as ZeRO-3 does."""
    (module,) = forward.args
    if past_key_values is None and token_blocks.goes_in_parts(hidden_states) and not any(map(mixer.is_heard, module.children())):
        return token_blocks.attend_by_heads(module, hidden_states, attention_mask, **kwargs)
    return forward(hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)


def _route_exactly(forward: Callable, hidden_states):
    """A router's forward in float32, which it asks for and autocast would undo: of the tokens of a trained model bf16 sends one in a hundred elsewhere."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        return forward(hidden_states)


def _route(module, hidden_states, *, theirs: Callable):
    return _route_exactly(functools.partial(theirs, module), hidden_states)


def _theirs(module, *args, theirs: Callable, **kwargs):
    return theirs(module, *args, **kwargs)
