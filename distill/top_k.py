"""A distribution's k likeliest tokens and the mass of all others, and the bytes that is stored in.

B batch, T tokens, V vocabulary, K kept tokens, N tokens of any number of rows.
"""

from dataclasses import dataclass

import numpy as np
import torch

from distill.products import logits_of

LEVEL_BITS = 6  # a log-probability is one of 64 even steps from the likeliest kept token down to the least likely


@dataclass(frozen=True, slots=True)
class TopK:
    """Of every token's distribution the K likeliest ids and the mass of the rest; kept and tail mass add up to 1.

    ids_BTK int64, in no particular order; log_probabilities_BTK and tail_log_mass_BT float32, nats; −inf where K = V leaves no tail.
    """

    ids_BTK: torch.Tensor
    log_probabilities_BTK: torch.Tensor
    tail_log_mass_BT: torch.Tensor

    def to(self, device: torch.device | str) -> "TopK":
        """The same on another device."""
        return TopK(self.ids_BTK.to(device), self.log_probabilities_BTK.to(device), self.tail_log_mass_BT.to(device))


def top_k_of_logits(logits_BTV: torch.Tensor, k: int) -> TopK:
    """The K = k likeliest tokens under logits of any leading dimensions. Raises ValueError where k is not in 1…V."""
    _check_k(k, logits_BTV.shape[-1])
    logits_BTV = logits_BTV.float()
    normaliser_BT = logits_BTV.logsumexp(-1)
    kept_BTK, ids_BTK = logits_BTV.topk(k, dim=-1)
    # Summed over the others, not 1 − kept: a tail of 1e-9 would be lost in the rounding of the kept mass.
    tail_BT = logits_BTV.scatter(-1, ids_BTK, float("-inf")).logsumexp(-1) - normaliser_BT
    return TopK(ids_BTK, kept_BTK - normaliser_BT[..., None], tail_BT)


def top_k_of_hidden(hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, k: int, *, chunk_tokens: int = 128) -> TopK:
    """The same for logits = hidden · weightᵀ, which exist for `chunk_tokens` tokens at a time only."""
    chunks = [top_k_of_logits(logits_of(chunk_ND, weight_VD), k) for chunk_ND in hidden_BTD.flatten(0, -2).split(chunk_tokens)]
    fields = [torch.cat([getattr(chunk, name) for chunk in chunks]) for name in TopK.__slots__]
    return TopK(*(field.reshape(*hidden_BTD.shape[:-1], *field.shape[1:]) for field in fields))


@dataclass(frozen=True, slots=True)
class TopKCode:
    """How the top k of a vocabulary of V tokens become a fixed number of bytes a token, and back.

    The ids ascend and are coded as Elias and Fano did (high bits in unary, low bits as they are: within half a bit
    per id of the least that a set of k of V can take). A log-probability is a step of LEVEL_BITS from the likeliest
    kept one down; the distance between those ends (the range) and the tail's log mass are float16. Reading scales the kept
    tokens to what the tail leaves of 1. At k = 128 of 131,072: 160 + 32 + 96 + 4 = 292 bytes.
    Even steps: finer ones for the likelier tokens lost more than they gained on Zipf and Gaussian logits of that size.
    Where k = V ids need no bytes, and every log-probability is a float16.
    """

    vocabulary: int
    k: int

    def __post_init__(self) -> None:
        _check_k(self.k, self.vocabulary)

    @property
    def is_whole(self) -> bool:
        """Whether the whole distribution is kept."""
        return self.k == self.vocabulary

    @property
    def low_bits(self) -> int:
        """Bits of an id that are stored as they are."""
        return (self.vocabulary // self.k).bit_length() - 1

    @property
    def high_length(self) -> int:
        """Bits of the unary part: a one per id, a zero per step of the high bits."""
        return self.k + (self.vocabulary - 1 >> self.low_bits)

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """Bytes a token of: the ids' low bits, their high bits, the levels, range and tail."""
        return tuple(-(-bits // 8) for bits in (self.k * self.low_bits, self.high_length, self.k * LEVEL_BITS, 32))

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.vocabulary if self.is_whole else sum(self.part_bytes)

    def encode(self, top_k: TopK) -> np.ndarray:
        """uint8 [N, bytes_per_token] for the N = B·T tokens, row by row. Raises FloatingPointError where a kept probability is nan, or is 0 and k < V."""
        ids_NK, order_NK = top_k.ids_BTK.reshape(-1, self.k).cpu().sort(dim=-1)
        log_probabilities_NK = top_k.log_probabilities_BTK.reshape(-1, self.k).cpu().gather(-1, order_NK).numpy()
        least = log_probabilities_NK.min()
        if np.isnan(least) or (least == -np.inf and not self.is_whole):
            raise FloatingPointError(f"the {self.k:,} likeliest tokens' log-probabilities are not all finite")
        if self.is_whole:
            return np.maximum(log_probabilities_NK, np.finfo(np.float16).min).astype(np.float16).view(np.uint8)
        drops_NK = log_probabilities_NK.max(axis=1, keepdims=True) - log_probabilities_NK
        # Equal probabilities have no range: 0.001 nats stand for it. The levels are steps of the range as it will be read.
        range_N1 = drops_NK.max(axis=1, keepdims=True).clip(1e-3, np.finfo(np.float16).max).astype(np.float16)
        levels_NK = np.rint(drops_NK / range_N1.astype(np.float32) * (2**LEVEL_BITS - 1)).clip(0, 2**LEVEL_BITS - 1).astype(np.int32)
        tail_N1 = top_k.tail_log_mass_BT.reshape(-1, 1).cpu().numpy().astype(np.float16)
        parts = self._encode_ids(ids_NK.numpy()), _pack(levels_NK, LEVEL_BITS), range_N1.view(np.uint8), tail_N1.view(np.uint8)
        return np.concatenate(parts, axis=1)

    def decode(self, codes: np.ndarray) -> TopK:
        """The TopK of codes uint8 [..., bytes_per_token]; ids ascend."""
        shape, codes = codes.shape[:-1], codes.reshape(-1, self.bytes_per_token)
        if self.is_whole:
            ids_NK = torch.arange(self.k).expand(len(codes), -1)
            log_NK, tail_N = torch.from_numpy(codes.view(np.float16).astype(np.float32)), torch.full((len(codes),), float("-inf"))
        else:
            low, high, levels, ends = np.split(codes, np.cumsum(self.part_bytes)[:-1], axis=1)
            ids_NK = torch.from_numpy(self._decode_ids(low, high))
            range_N1, tail_N1 = np.split(np.ascontiguousarray(ends).view(np.float16).astype(np.float32), 2, axis=1)
            log_NK = torch.from_numpy(_unpack(levels, LEVEL_BITS, self.k).astype(np.float32) * (range_N1 / -(2**LEVEL_BITS - 1)))
            tail_N = torch.from_numpy(tail_N1[:, 0])
        log_NK = log_NK.log_softmax(-1) + (-torch.expm1(tail_N)).log()[:, None]
        return TopK(ids_NK.reshape(*shape, self.k), log_NK.reshape(*shape, self.k), tail_N.reshape(shape))

    def _encode_ids(self, ids_NK: np.ndarray) -> np.ndarray:
        high = np.zeros((len(ids_NK), self.high_length), dtype=np.uint8)
        np.put_along_axis(high, (ids_NK >> self.low_bits) + np.arange(self.k), 1, axis=1)
        return np.concatenate([_pack(ids_NK & (2**self.low_bits - 1), self.low_bits), np.packbits(high, axis=1)], axis=1)

    def _decode_ids(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        ones = np.flatnonzero(np.unpackbits(high, axis=1, count=self.high_length)).reshape(-1, self.k)
        high_NK = ones - np.arange(len(ones))[:, None] * self.high_length - np.arange(self.k)
        return high_NK << self.low_bits | _unpack(low, self.low_bits, self.k)


def _pack(values_NK: np.ndarray, bits: int) -> np.ndarray:
    """Non-negative integers below 2^bits as uint8 [N, ⌈K·bits/8⌉], one bit of all K after another."""
    planes = [(values_NK >> bit & 1).astype(bool) for bit in range(bits)]
    return np.packbits(np.concatenate([np.empty((len(values_NK), 0), dtype=bool), *planes], axis=1), axis=1)


def _unpack(packed: np.ndarray, bits: int, k: int) -> np.ndarray:
    """int64 [N, K], the inverse of _pack."""
    planes = np.unpackbits(packed, axis=1, count=k * bits).reshape(len(packed), bits, k)
    values_NK = np.zeros((len(packed), k), dtype=np.int64)
    for bit in range(bits):
        values_NK |= planes[:, bit].astype(np.int64) << bit
    return values_NK


def _check_k(k: int, vocabulary: int) -> None:
    if not 1 <= k <= vocabulary:
        raise ValueError(f"the tokens kept of a distribution (k = {k:,}) must be from 1 to the vocabulary, {vocabulary:,}")
