"""Packed rows on machines without the CUDA kernels, which take document numbers (`seq_idx`) themselves.

A causal function of rows is run on every document as a row of its own. B batch, T tokens, L tokens of a group's longest document.
"""

from collections.abc import Callable

import torch


def by_document(function: Callable[..., torch.Tensor], documents_BT: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    """function(*rows) as if every document stood alone: `rows` are [B, T, …] each, and so is the result.

    `documents_BT` numbers the documents of a row in ascending order. Documents of like length run together, padded on the right, where
    nothing causal looks; no more than half of what runs is padding.
    """
    num_tokens = documents_BT.numel()
    is_first_BT = documents_BT.diff(dim=1, prepend=documents_BT[:, :1] - 1) != 0
    starts = is_first_BT.flatten().nonzero()[:, 0]
    lengths = starts.diff(append=starts.new_tensor([num_tokens]))
    group_of = lengths.double().log2().ceil().long()
    places, results = [], []
    for group in group_of.unique():
        first, length = starts[group_of == group, None], lengths[group_of == group, None]
        offsets_L = torch.arange(int(length.max()), device=first.device)
        places_DL, real_DL = (first + offsets_L).clamp(max=num_tokens - 1), offsets_L < length
        places.append(places_DL[real_DL])
        results.append(function(*(row.flatten(0, 1)[places_DL] for row in rows))[real_DL])
    order = torch.cat(places).argsort()
    return torch.cat(results)[order].unflatten(0, documents_BT.shape)
