"""In which order the rows of an epoch come: a whole permutation up to some length, beyond it one computed place by place, without an array."""

from collections.abc import Sequence

import numpy as np

WHOLE_UP_TO = 2**24  # rows: 128 MiB of int64
ROUNDS = 8


class Shuffle:
    """A permutation of range(length) that follows from the numbers of `seed` alone.

    Up to `whole_up_to` it is numpy's. Beyond that it is a Feistel network over the least power of 4 that holds the length; a place that it sends beyond the
    length goes through it again until it is within (cycle walking: Black and Rogaway, CT-RSA 2002, §4), fewer than 4 times on average.
    """

    def __init__(self, seed: Sequence[int], length: int, *, whole_up_to: int = WHOLE_UP_TO):
        random = np.random.default_rng(seed)
        self.length, self._order_R = length, random.permutation(length) if length <= whole_up_to else None
        self._half_bits = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
        self._keys = random.integers(2**64, size=ROUNDS, dtype=np.uint64) if self._order_R is None else ()

    def at(self, places: np.ndarray) -> np.ndarray:
        """What stands at these places, int64 like them, each from 0 to length − 1."""
        if self._order_R is not None:
            return self._order_R[places]
        found = self._through(places.astype(np.uint64))
        while len(beyond := np.flatnonzero(found >= self.length)):
            found[beyond] = self._through(found[beyond])
        return found.astype(np.int64)

    def _through(self, values: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        left, right = values >> self._half_bits, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return (left << self._half_bits) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """Every bit of the result hangs on every bit of the value: the last steps of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))
