"""Rows of hundreds of thousands of tokens through a layer: norm, Mamba-2 and FFN a block of tokens at a time, attention a key-value head at a time.

Between its projections a mixer holds several times what goes in: of 524,288 tokens the FFN of the 9B would hold 45 GiB in bf16, its Mamba-2 mixer 42, its
attention 12 and 32 more in its backward pass. In parts only the mixer's input and output are of the whole row. Where gradients flow each part is computed
again in the backward pass, from its input and, in a Mamba-2 mixer, from what the block before handed on: the convolution's last inputs and the scan's state.

The kernels take that state as transformers hands it to them in generation: through a cache, which here keeps gradients.

Letters: B batch, T tokens, t tokens of a block, D hidden, E channels of the convolution, K its kernel, R query heads of a key-value head, H head dim.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minitron.mamba import block_sizes


def goes_in_parts(hidden_BTD: torch.Tensor) -> bool:
    """Whether a row is long."""
    return hidden_BTD.ndim == 3 and hidden_BTD.shape[1] > block_sizes.LONG_TOKENS


def feed_by_blocks(function: Callable[[torch.Tensor], torch.Tensor], hidden_BTD: torch.Tensor, block_tokens: int | None = None) -> torch.Tensor:
    """function(hidden) [B, T, D] of a mixer that looks at every token alone."""
    parts = hidden_BTD.split(block_sizes.block_sizes(hidden_BTD.shape[1], block_tokens or block_sizes.BLOCK_TOKENS), dim=1)
    return torch.cat([_again(function, part) for part in parts], dim=1)


def mix_by_blocks(function: Callable[..., torch.Tensor], hidden_BTD: torch.Tensor, documents_BT: torch.Tensor | None,
                  block_tokens: int | None = None) -> torch.Tensor:  # fmt: skip
    """function(hidden, cache_params=…, seq_idx=…) [B, T, D] of a Mamba-2 mixer; `documents_BT` int32 numbers a packed row's documents in ascending order.

    A block's documents are numbered from that of the token before it, which is 0 and goes on where the block before ended.
    """
    sizes, kept = block_sizes.block_sizes(hidden_BTD.shape[1], block_tokens or block_sizes.BLOCK_TOKENS), (None, None)
    outputs, first = [], 0
    for part_BtD in hidden_BTD.split(sizes, dim=1):
        documents_Bt = None
        if documents_BT is not None:
            documents_Bt = documents_BT[:, first : first + part_BtD.shape[1]] - documents_BT[:, max(first - 1, 0), None]

        def block(part_BtD, last_inputs, state, documents_Bt=documents_Bt):
            cache = BlockCache(last_inputs, state, documents_Bt)
            return function(part_BtD, cache_params=cache, **({} if documents_Bt is None else {"seq_idx": documents_Bt})), cache.last_inputs, cache.state

        output, *kept = _again(block, part_BtD, *kept)
        outputs.append(output)
        first += part_BtD.shape[1]
    return torch.cat(outputs, dim=1)


def attend_by_heads(module, hidden_BTD: torch.Tensor, attention_mask: torch.Tensor | None, **settings) -> tuple[torch.Tensor, None]:
    """NemotronHAttention.forward [B, T, D], summed up in float32 over the key-value heads, each with its query heads; no weights are given."""
    from transformers.models.nemotron_h import modeling_nemotron_h as modeling

    attend = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, modeling.eager_attention_forward)
    heads, dim = module.num_key_value_groups, module.head_dim

    def one(hidden_BTD, number):
        queries, keys = slice(number * heads * dim, (number + 1) * heads * dim), slice(number * dim, (number + 1) * dim)
        projected = (F.linear(hidden_BTD, matrix.weight[rows])
                     for matrix, rows in ((module.q_proj, queries), (module.k_proj, keys), (module.v_proj, keys)))  # fmt: skip
        states = (rows_BTd.unflatten(2, (-1, dim)).transpose(1, 2) for rows_BTd in projected)
        found, _ = attend(module, *states, attention_mask, dropout=0.0, scaling=module.scaling, **settings)
        return F.linear(found.flatten(2), module.o_proj.weight[:, queries])

    total_BTD = torch.zeros(hidden_BTD.shape, device=hidden_BTD.device)
    for number in range(module.config.num_key_value_heads):
        total_BTD += _again(one, hidden_BTD, number)
    return total_BTD.to(torch.get_autocast_dtype(hidden_BTD.device.type) if torch.is_autocast_enabled(hidden_BTD.device.type) else hidden_BTD.dtype), None


class BlockCache:
    """What transformers' mixer asks of a cache and tells it, of one block."""

    def __init__(self, last_inputs_BkE: torch.Tensor | None, state: torch.Tensor | None, documents_Bt: torch.Tensor | None):
        """k = K − 1; None before the first block. `state` float32 [B, heads, head dim, state]."""
        self.last_inputs, self.state, self.documents_Bt = last_inputs_BkE, state, documents_Bt

    def get_conv_state(self, _layer: int, state_idx: int = 0) -> None:
        """None: there is no step of one token."""

    def get_recurrent_state(self, _layer: int, state_idx: int = 0) -> torch.Tensor | None:
        """The scan starts from it."""
        return self.state

    def update_recurrent_state(self, state: torch.Tensor, layer_idx: int) -> None:
        """The scan ended in it."""
        self.state = state

    def update_conv_state(self, inputs_BEt: torch.Tensor, _layer: int, conv_kernel_size: int) -> torch.Tensor:
        """The block's inputs with K − 1 earlier ones before them, channels side by side; of these, those of a document that has ended are zeros."""
        number, inputs_BtE = conv_kernel_size - 1, inputs_BEt.transpose(1, 2)
        with_earlier = F.pad(inputs_BtE, (0, 0, number, 0)) if self.last_inputs is None else torch.cat([self.last_inputs, inputs_BtE], dim=1)
        self.last_inputs = with_earlier[:, -number:].clone()
        if self.documents_Bt is not None:
            documents = F.pad(self.documents_Bt, (number, 0))[:, -number:]
            self.last_inputs = self.last_inputs * (documents == documents[:, -1:])[..., None]
        return with_earlier.transpose(1, 2)


def _again(function: Callable, *arguments):
    """function(*arguments), computed again in the backward pass where there will be one."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
