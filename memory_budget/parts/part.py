"""What every mixer says of itself. A mixer stands between a norm and the residual stream; the norms around it are the model's."""

from dataclasses import dataclass
from typing import ClassVar

SCAN_CHUNK_TOKENS = 128  # chunk_size of every published Nemotron-H config


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Parameters of one layer without the norm in front of it.

    matrices: (copies, outputs, inputs) of each linear projection and of the experts: what a quantiser packs.
    others: the number of all remaining parameters (biases, conv1d, per-head vectors, inner norms, router).
    """

    matrices: tuple[tuple[int, int, int], ...]
    others: int

    @property
    def total(self) -> int:
        return self.others + sum(copies * outputs * inputs for copies, outputs, inputs in self.matrices)


class Part:
    """A mixer without caches; subclasses say what they have more.

    kind: the word that parameters are counted under · letter: what patterns call it.
    """

    __slots__ = ()
    kind: ClassVar[str]
    letter: ClassVar[str]

    def parameters(self, *, active_only: bool = False) -> LayerParameters:
        """Of one layer; with active_only, of routed experts only those that one token passes through."""
        raise NotImplementedError

    @property
    def kept_tokens(self) -> int | None:
        """The most tokens of a sequence whose keys and values are kept; None for all, 0 for a mixer that keeps none."""
        return 0

    @property
    def cache_numbers_per_token(self) -> int:
        """Numbers that a kept token takes in the cache."""
        return 0

    @property
    def state_numbers(self) -> int:
        """Numbers of a recurrent state of one sequence."""
        return 0

    @property
    def conv_numbers(self) -> int:
        """Numbers of a short convolution's state of one sequence: its last kernel − 1 inputs, which is what vLLM keeps; transformers keeps kernel columns."""
        return 0

    def activation_bytes(self, tokens: int, number: int) -> int:
        """What lives at once while so many tokens pass, beside the residual stream and the normed input, at `number` bytes a number."""
        raise NotImplementedError


def larger(first: int, second: int) -> int:
    """max() that also works number by number on arrays."""
    return (first + second + abs(first - second)) // 2
